"""Probes: rounded as the codec does, errors mirrored, averaged over ranks, padding left out."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from tightrec.compression.bounds import Bound
from tightrec.compression.codec import decode, encode
from tightrec.compression.layout import Layout
from tightrec.sharding import probe as probing
from tightrec.sharding.parts import Part, Peers, Slot
from tightrec.sharding.probe import Probe
from tightrec.trainer.exchange_watch import ExchangeWatch

CPU = torch.device("cpu")
BOUNDS = [Bound(value=0.05), Bound(value=0.03, of="range"), Bound(value=0.5, of="rms")]


def _slot(name: str, dim: int, column: int = 0) -> Slot:
    return Slot(name=name, feature=name, table=f"t_{name}", dim=dim, column=column, mean=False)


def _parts() -> list[Part]:
    """a: halves on two ranks; b: on the second; c: data-parallel."""
    peers = Peers(group=None, rank=0, size=2, ranks=(0, 1))
    halves = ((_slot("a", 2),), (_slot("a", 2, column=2), _slot("b", 3)))
    return [
        Part(sharding_type="column_wise", kind="spread", sources=halves, source=0, peers=(peers,)),
        Part(sharding_type="data_parallel", kind="local", sources=((_slot("c", 2),),), source=0, peers=()),
    ]


class _Policy:
    """Asks for one table, and notes what it is told."""

    told: dict[str, Any]

    def probe_plan(self) -> list[tuple[str, float]]:
        return [("t_a", 0.02)]

    def bound(self, direction: str, table: str) -> Bound | None:
        assert direction == "forward"
        return {"t_a": Bound(value=0.1, of="range"), "t_b": None}[table]

    def observe_probe(self, step: int, measured: Any, total_dne: float, values: Any) -> None:
        self.told = {"step": step, "measured": list(measured), "total": total_dne, "values": values}

    def report(self) -> dict[str, Any]:
        return {"step": self.told["step"]}


ROWS = {"a": 5, "b": 7, "c": 11}


def _pooled() -> KeyedTensor:
    values = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    return KeyedTensor(["c", "b", "a"], [2, 3, 4], values)


def _probe(monkeypatch: pytest.MonkeyPatch, ranks: int = 1) -> tuple[Probe, _Policy]:
    """With so many ranks that all measure the same."""
    monkeypatch.setattr(probing.dist, "all_reduce", lambda tensor, group: tensor.mul_(ranks))
    policy = _Policy()
    return Probe(policy, _parts(), None, CPU), policy  # type: ignore[arg-type]


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.of)
def test_a_probe_quantises_to_what_the_codec_decodes_to(bound: Bound) -> None:
    values = torch.randn(200, 24, generator=torch.Generator().manual_seed(3))
    values[7, 3] = 1e9 if bound.of == "absolute" else 9.0
    layout = Layout.flat([[200]], [24])
    frames = encode(values.reshape(-1), layout, [bound], "packed")
    sent = decode(frames, layout).view(200, 24)
    assert not torch.equal(sent, values)
    assert torch.equal(probing._rounded(values, bound), sent)


def test_a_block_of_equal_values_and_an_empty_one_stay_as_they_are() -> None:
    for block in (torch.full((5, 2), 7.0), torch.zeros(0, 4), torch.zeros(3, 2)):
        assert torch.equal(probing._rounded(block, Bound(value=0.03, of="range")), block)


def test_only_the_columns_of_tables_that_travel_are_quantised_each_shard_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probe, policy = _probe(monkeypatch)
    exact, seen = _pooled(), []

    def measure(pooled: KeyedTensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(pooled.values() - exact.values())
        return torch.tensor(1.0), torch.tensor(10.0), torch.tensor(3.0)

    assert not probe.ready
    probe.keep(6, exact, ROWS)
    assert probe.ready
    assert probe.run(measure) == {"step": 6}
    assert not probe.ready
    # Exact; the table that was asked for and its mirror image; all tables that travel and theirs.
    none, single, single_back, every, every_back = seen
    assert not none.any()
    torch.testing.assert_close(single, -single_back, rtol=0, atol=1e-6)
    torch.testing.assert_close(every, -every_back, rtol=0, atol=1e-6)
    for found, share in ((single, 0.02), (every, 0.1)):
        assert not found[:, :5].any(), "c does not travel, b is lossless"
        for half in (slice(5, 7), slice(7, 9)):
            block = exact.values()[:, half]
            want = probing._rounded(block, Bound(value=share, of="range")) - block
            torch.testing.assert_close(found[:, half], want, rtol=0, atol=1e-6)
    assert policy.told["values"] == {"t_a": 5 * 4.0, "t_b": 7 * 3.0}, "distinct rows times columns"


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_is_measured_is_the_second_order_per_row_over_the_entropy_of_the_clicks(
    monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    probe, policy = _probe(monkeypatch, ranks)
    exact, squares = _pooled(), []

    def measure(pooled: KeyedTensor) -> tuple[Tensor, Tensor, Tensor]:
        errors = (pooled.values() - exact.values()).double()
        squares.append(float(errors.square().sum()))
        # A first-order term a thousand times larger, which a single direction of the error would show.
        return (1e3 * errors + errors.square()).sum(), torch.tensor(20.0), torch.tensor(5.0)

    probe.keep(0, exact, ROWS)
    probe.run(measure)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    ((table, share, dne),) = policy.told["measured"]
    assert (table, share) == ("t_a", 0.02)
    # Nothing of this grows with the number of ranks: it is per row.
    assert dne == pytest.approx((squares[1] + squares[2]) / 2 / 20 / entropy, rel=1e-3)
    assert policy.told["total"] == pytest.approx((squares[3] + squares[4]) / 2 / 20 / entropy, rel=1e-3)


def test_a_probe_without_a_click_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    probe, policy = _probe(monkeypatch)
    for rows in (torch.tensor(0.0), torch.tensor(20.0)):
        probe.keep(0, _pooled(), ROWS)
        probe.run(lambda pooled, rows=rows: (pooled.values().sum(), rows, torch.tensor(0.0)))
        assert math.isnan(policy.told["total"])


class _Dense(nn.Module):
    """Stands for a DLRM: the logit is the sum of a row's columns, and of its hashed vectors."""

    def hashed(self, sparse: Tensor) -> list[Tensor]:
        return [sparse]

    def from_pooled(self, dense: Tensor, pooled: KeyedTensor, hashed: list[Tensor]) -> Tensor:
        return pooled.values().sum(1) + dense.sum(1) + sum(each.sum(1) for each in hashed)


def test_padding_rows_do_not_count_in_a_probes_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from tightrec.trainer import exchange_watch

    monkeypatch.setattr(exchange_watch, "DLRM", _Dense)
    seen = []

    class Stub:
        ready = True

        def run(self, measure: Any) -> dict[str, Any]:
            seen.append([float(each) for each in measure(pooled)])
            return {"total_dne": 0.0, "budget": None, "multiplier": 1.0, "tables": {}}

    steering = SimpleNamespace(probe=Stub(), codec=SimpleNamespace(framed=True))
    told: list[int] = []
    log = SimpleNamespace(probe=lambda step, **rest: told.append(step))
    watch = ExchangeWatch(steering, nn.ModuleList([_Dense()]), [], None, log)  # type: ignore[arg-type]
    for rows in (4, 3):
        pooled = KeyedTensor(["a"], [2], _pooled().values()[:rows, :2])
        weights = torch.tensor([1.0, 1, 1, 0])[:rows]
        labels = torch.tensor([1.0, 0, 1, 0])[:rows]
        batch = SimpleNamespace(dense=torch.ones(rows, 1), labels=labels, weights=weights)
        batch.sparse = torch.full((rows, 2), 0.25)
        watch.end(5, batch)  # type: ignore[arg-type]
    padded, whole = seen
    assert padded == whole
    assert whole[1:] == [3.0, 2.0] and whole[0] > 0
    assert told == [5, 5]
