"""What a byte costs on a link, and what every mode makes of a block."""

import math
import random

import pytest
import torch

from tightrec.compression.bounds import Bound
from tightrec.compression.codec import encode
from tightrec.compression.layout import Layout
from tightrec.compression.policy import estimates
from tightrec.compression.policy.estimates import LinkEstimate, ModeTrial
from tightrec.compression.telemetry import frame_tables


def test_the_link_is_found_though_a_third_of_the_large_exchanges_waited() -> None:
    draw = random.Random(0)
    link = LinkEstimate()
    for number in range(60):
        size = (1e4, 2e5, 1e6)[number % 3]
        waited = 5e-3 if number % 9 == 2 else 0.0
        link.record(size, 1e-3 + size / 2e9 + waited + draw.uniform(0, 2e-5))
    link.record(1e9, math.nan)
    found = link.estimate()
    assert found is not None
    assert found.fitted
    assert found.gb_s == pytest.approx(2.0, rel=0.05)
    assert found.latency_s == pytest.approx(1e-3, rel=0.05)
    assert found.seconds(1e6) == pytest.approx(1.5e-3, rel=0.05)


def test_exchanges_of_one_size_use_the_latency_known_from_before() -> None:
    link = LinkEstimate(window=8)
    assert link.estimate() is None
    link.record(0, 1e-3)
    assert link.estimate() is None  # no bytes, nothing to learn of them
    for _ in range(8):
        link.record(1e6, 3e-3)
    found = link.estimate()
    assert found is not None
    assert not found.fitted
    assert (found.latency_s, found.seconds_per_byte) == (0.0, pytest.approx(3e-9))
    link.record(0, 1e-3)
    assert link.estimate() == estimates.Link(latency_s=1e-3, seconds_per_byte=2e-9, fitted=True)
    for number in range(8):  # differences as small as these tell nothing
        link.record(1.1e6 + 1e4 * (number % 2), 3.2e-3 + 2e-5 * (number % 2))
    found = link.estimate()
    assert found is not None
    assert not found.fitted
    assert (found.latency_s, found.seconds_per_byte) == (pytest.approx(1e-3), pytest.approx(2e-9))


def test_bytes_are_free_where_larger_exchanges_take_no_longer_and_a_latency_is_never_negative() -> None:
    link = LinkEstimate()
    for size, seconds in ((1e3, 1e-3), (1e6, 0.9e-3)):
        link.record(size, seconds)
    found = link.estimate()
    assert found is not None
    assert found.seconds_per_byte == 0.0
    assert found.gb_s == math.inf
    steep = LinkEstimate()
    for size, seconds in ((1e5, 1e-4), (1e6, 2e-3)):
        steep.record(size, seconds)
    found = steep.estimate()
    assert found is not None
    assert found.latency_s == 0.0
    assert found.seconds_per_byte == pytest.approx(1.5e-9)


def test_sizes_that_say_something_new_are_asked_for() -> None:
    link = LinkEstimate()
    link.record(1e3, 1e-3)
    assert link.probe_bytes(1_600_000) == 1_600_000
    link.record(1_600_000, 1e-3)
    assert link.probe_bytes(1_600_000) is None
    only_plain = LinkEstimate()
    only_plain.record(1_600_000, 1e-3)
    assert only_plain.probe_bytes(1_600_000) == 100_000


def test_a_trial_finds_the_bytes_that_the_codec_writes() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 16, generator=generator)[torch.randint(0, 40, (200,), generator=generator)]
    bound = Bound(value=0.03, of="range")
    found = ModeTrial(rounds=1).run(rows.requires_grad_(), bound)
    assert found.values == 3200
    layout = Layout.flat([[200]], [16])
    for mode in ("raw", "half", "packed", "dedup"):
        frames = encode(rows.detach().reshape(-1), layout, bound, mode)
        used = frame_tables(frames.buffer, frames.offsets, frames.sizes, layout).bytes[0, 0]
        assert found.costs[mode].bytes_per_value == used / 3200
    sizes = {mode: cost.bytes_per_value for mode, cost in found.costs.items()}
    # With a codebook of its own, which is not counted: smaller than what it codes.
    assert sizes["entropy"] < sizes["dedup"] < sizes["packed"] < sizes["half"] < sizes["raw"]
    assert all(cost.encode_s > 0 and cost.decode_s > 0 for cost in found.costs.values())
    assert ModeTrial(rounds=1, max_rows=50).run(rows, bound).values == 800
    with pytest.raises(ValueError, match="N at least 1"):
        ModeTrial().run(rows[:0], bound)


def test_a_trial_tells_a_calls_time_from_a_values(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    sizes = set()

    def taking(call: str, fixed: float, each: float) -> None:
        real = getattr(estimates, call)

        def slow(first: object, layout: Layout, *args: object, **kwargs: object) -> object:
            sizes.add(layout.totals.values)
            now[0] += fixed + each * layout.totals.values
            return real(first, layout, *args, **kwargs)

        monkeypatch.setattr(estimates, call, slow)

    taking("encode", 1e-3, 2e-9)
    taking("decode", 3e-3, 1e-9)
    found = ModeTrial(clock=lambda: now[0], least_values=2000).run(torch.ones(10, 4), 0.1)
    for cost in found.costs.values():
        assert cost.encode_s == pytest.approx(2e-9)
        assert cost.decode_s == pytest.approx(1e-9)
        assert cost.encode_call_s == pytest.approx(1e-3)
        assert cost.decode_call_s == pytest.approx(3e-3)
    assert sizes == {40, 2000}
    coarse = ModeTrial(clock=lambda: 0.0).run(torch.ones(10, 4), 0.1).costs["packed"]
    assert (coarse.encode_s, coarse.encode_call_s) == (0.0, 0.0)
