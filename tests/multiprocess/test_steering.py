"""Steering on real ranks: probes, classes, modes and plain or compressed come out alike on all of them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from exchange_cases import Case, Trained, batch_of, fused, lossy
from ranks import run_ranks
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedTensor

from tightrec.compression.policy.config import BoundConfig
from tightrec.compression.policy.estimates import ModeCost, ModeTrial, Trial
from tightrec.sharding.config import CodecConfig
from tightrec.sharding.measures import DirectionMeasures, Measures
from tightrec.sharding.sharder import CompressedEmbeddingBagCollectionSharder
from tightrec.sharding.traffic import counted_traffic

pytestmark = pytest.mark.multiprocess

# t1 and t4 lie on one rank, t2 in rows on both, t3 does not travel.
CASE = Case(kinds="t0rd0", batches=(16, 16))
PROBED = replace(
    CASE,
    codec=CodecConfig(
        forward="lossy",
        budget_ne=1e-3,
        bound=BoundConfig(probe_every=3),
        stats_every=0,
        exact_evaluation=False,
    ),
)


def _sharder(case: Case) -> CompressedEmbeddingBagCollectionSharder:
    return CompressedEmbeddingBagCollectionSharder(codec=case.codec, fused_params=fused(case))


def _forward(trained: Trained, rank: int, world: int) -> Tensor:
    """A training forward that changes no weights."""
    return trained.model(batch_of(trained.case, 0, rank, world)[0]).detach()


def _probes(rank: int, world: int) -> dict[str, Any]:
    ours, plain = Trained(PROBED, world, _sharder(PROBED)), Trained(CASE, world, _sharder(CASE))
    steering = ours.module.steering
    exact = plain.evaluate(batch_of(CASE, 0, rank, world)[0])
    same, evaluated = [], []
    for _ in range(8):
        same.append(torch.equal(_forward(ours, rank, world), exact))
        evaluated.append(torch.equal(ours.evaluate(batch_of(CASE, 0, rank, world)[0]), exact))
    steering.pilot.config = replace(steering.pilot.config, exact_evaluation=True)
    exactly = torch.equal(ours.evaluate(batch_of(CASE, 0, rank, world)[0]), exact)
    told: list[Any] = []
    observe = steering.policy.observe_probe
    steering.policy.observe_probe = lambda *args: (told.append(args), observe(*args))
    losses: list[float] = []

    def measure(pooled: KeyedTensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of ranks with other losses, rows and clicks."""
        loss = (1 + rank) * pooled.values().double().square().sum()
        losses.append(float(loss))
        return loss, torch.tensor(10.0 * (1 + rank)), torch.tensor(4.0 - rank)

    record = steering.probe.run(measure)
    return {
        "same": same,
        "evaluated": evaluated,
        "exactly": exactly,
        "losses": losses,
        "told": told,
        "record": record,
        "state": steering.state_dict(),
    }


def test_a_probes_forward_is_exact_and_all_ranks_draw_the_mean_from_it():
    found = run_ranks(2, _probes)
    for rank in found:
        assert rank["same"] == [step in (3, 6) for step in range(8)]
        assert not any(rank["evaluated"]), "evaluations are no probes"
        assert rank["exactly"], "codec.exact_evaluation"
    for what in ("told", "record", "state"):
        assert found[0][what] == found[1][what], what
    ((step, measured, total, values),) = found[0]["told"]
    assert step == 6 and found[0]["state"]["step"] == 8
    assert {table for table, *_ in measured} == set(values) == {"t0", "t1", "t2", "t4"}, "t3 does not travel"
    rises = []
    for rank in found:
        exact, *others = rank["losses"]
        rises.append([(a + b) / 2 - exact for a, b in zip(others[::2], others[1::2], strict=True)])
    share = (4 + 3) / (10 + 20)
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    want = [sum(both) / (10 + 20) / entropy for both in zip(*rises, strict=True)]
    assert [dne for *_, dne in measured] + [total] == pytest.approx(want, rel=1e-9)
    assert min(want) > 0


def _classes(rank: int, world: int) -> tuple[Any, ...]:
    bound = BoundConfig(level="homogenisation", sample_after=2, sample_batches=3)
    case = replace(CASE, codec=replace(lossy("range:0.03"), bound=bound))
    ours = Trained(case, world, _sharder(case))
    for name, part, _ in ours.shards():
        if name in ("t1", "t2"):
            # Small differences beside large ones, which the range follows.
            part.mul_(1e-3)
            part[::3] = 1.0
    policy = ours.module.steering.policy
    bounds, counts = [], []
    for _ in range(7):
        _forward(ours, rank, world)
        ours.evaluate(batch_of(case, 1, rank, world)[0])
        counts.append(policy.homogenisation_counts())
        bounds.append({t: policy.bound("forward", t).value for t in ("t0", "t1", "t2", "t4")})
    return bounds, policy.state_dict(), counts[4]


def test_homogenisation_classes_tables_alike_on_ranks_that_saw_others():
    (bounds, state, counts), (others, other_state, other_counts) = run_ranks(2, _classes)
    assert (bounds, state) == (others, other_state)
    assert counts != other_counts, "this test needs ranks that counted different rows"
    assert all(value == pytest.approx(0.03) for step in bounds[:5] for value in step.values())
    tight, loose = pytest.approx(0.01), pytest.approx(0.05)
    assert bounds[5] == bounds[6] == {"t0": loose, "t1": tight, "t2": tight, "t4": loose}


BYTES = {"auto": 0.6, "raw": 4.0, "half": 2.0, "packed": 1.0, "dedup": 1.5, "entropy": 0.6}
SLOWNESS = {"auto": 9, "raw": 1, "half": 3, "packed": 2, "dedup": 4, "entropy": 9}


class _Planted:
    """What a rank believes to measure, each something else."""

    def __init__(self, rank: int) -> None:
        self.unlike = 1 + rank
        self.second_per_byte, self.second_per_value = 0.0, 0.0

    def trial(self, rows: Tensor, bound: Any) -> Trial:
        second = self.second_per_value * self.unlike
        costs = {
            mode: ModeCost(
                bytes_per_value=BYTES[mode],
                encode_s=second * SLOWNESS[mode],
                decode_s=second * SLOWNESS[mode],
                encode_call_s=1e-6,
                decode_call_s=1e-6,
            )
            for mode in BYTES
        }
        return Trial(values=rows.numel(), costs=costs)  # type: ignore[arg-type]

    @contextmanager
    def measured(self) -> Iterator[None]:
        take = Measures.take_step

        def planted(measures: Measures, way: Any) -> DirectionMeasures | None:
            last = take(measures, way)
            if last is not None:
                wire = max(last.sent_bytes, last.received_bytes)
                last.exchange_s = 1e-4 + wire * self.second_per_byte * self.unlike
                last.sizes_s = 0.0
                last.encode_s = last.decode_s = 1e3 * self.second_per_value if last.framed else 0.0
            return last

        trial = patch.object(ModeTrial, "run", lambda _, rows, bound: self.trial(rows, bound))
        with patch.object(Measures, "take_step", planted), trial:
            yield


SLOW_LINK, FAST_LINK = (1e-5, 1e-11), (1e-12, 1e-6)
"""Seconds of a byte and of a value."""


def _steer(rank: int, world: int, mode: str, phases: list[tuple[tuple[float, float], int]]) -> dict[str, Any]:
    codec = CodecConfig(
        forward="auto", backward="auto", mode=mode, examine_every=10, stats_every=0, shadow_every=7
    )  # type: ignore[arg-type]
    case = replace(CASE, codec=codec)
    ours = Trained(case, world, _sharder(case))
    steering, planted = ours.module.steering, _Planted(rank)
    found: dict[str, Any] = {
        "plain": [],
        "modes": [],
        "reports": [],
        "messages": [],
        "losses": [],
        "bytes": [],
    }
    with planted.measured(), counted_traffic() as traffic:
        for (planted.second_per_byte, planted.second_per_value), steps in phases:
            for _ in range(steps):
                step = len(found["plain"])
                loss, _ = ours.step(*batch_of(case, step, rank, world))
                # Evaluations in between, of other sizes on other ranks.
                if step % 5 == 0:
                    ours.evaluate(batch_of(replace(case, batches=(9, 2)), step, rank, world)[0])
                found["losses"].append(loss)
                found["plain"].append(dict(steering.pilot.plain))
                found["bytes"].append(traffic.take()["forward"])
                found["modes"].append({way: dict(by) for way, by in steering.pilot.modes_by_table.items()})
        found["reports"] = steering.modes.take_reports()
        found["messages"] = steering.messages()
    return found


def _steered(rank: int, world: int, cases: list[Any]) -> list[dict[str, Any]]:
    return [_steer(rank, world, *case) for case in cases]


def test_auto_goes_where_the_measured_times_say_on_all_ranks_at_once():
    cases = [
        ("measured", [(SLOW_LINK, 34)]),
        ("measured", [(FAST_LINK, 34)]),
        ("auto", [(FAST_LINK, 24), (SLOW_LINK, 110)]),
    ]
    first, second = run_ranks(2, _steered, cases, timeout=120)
    for found, other in zip(first, second, strict=True):
        for what in ("plain", "modes", "messages", "reports"):
            assert found[what] == other[what], what
        assert all(math.isfinite(loss) for loss in found["losses"])
    slow, fast, turned = first
    ways = ("forward", "backward")
    assert not any(step[way] for step in slow["plain"] for way in ways)
    assert len(slow["reports"]) == 6, "at 10, 20 and 30, for both directions"
    # What frames really hold counts beside what was planted, but no table is raw where bytes are dear.
    modes = {way: set(slow["modes"][-1][way].values()) for way in ways}
    assert all("entropy" in of and "raw" not in of for of in modes.values()), modes
    assert fast["modes"][-1] == {way: dict.fromkeys(("t0", "t1", "t2", "t4"), "raw") for way in ways}
    # An examination is decided on in the step after it.
    assert [step["forward"] for step in fast["plain"]] == [step > 10 for step in range(34)]
    assert fast["plain"][-1]["backward"]
    assert all("plain" in line and "ms" in line for line in fast["messages"])
    last = fast["reports"][-1]
    assert last["plain"] and "compressed" in last["reason"] and "plain" in last["reason"]
    assert fast["bytes"][32] > 2 * slow["bytes"][32], "plain rows were really sent"
    assert turned["plain"][23] == {"forward": True, "backward": True}
    assert turned["plain"][-1] == {"forward": False, "backward": False}, "it comes back when the link slows"
    assert [line.split(": ")[1].split(" ")[1] for line in turned["messages"] if "forward" in line] == [
        "plain",
        "compressed",
    ]
