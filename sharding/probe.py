"""Probes: what each table's error bound costs in normalised entropy, measured on one step's own batch.

In a probe's step the forward exchange is lossless. Afterwards each rank quantises single tables of what it
received, at bounds of the policy's choosing, runs the dense layers again and compares the losses.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torchrec.sparse.jagged_tensor import KeyedTensor

from tightrec.compression.bounds import Bound
from tightrec.compression.policy.policy import BoundPolicy
from tightrec.compression.policy.sensitivity import mirrored, symmetric_dne
from tightrec.kernels.format import MIN_BOUND
from tightrec.sharding.parts import Part

Measure = Callable[[KeyedTensor], tuple[Tensor, Tensor, Tensor]]
"""Of a pooled output, on this rank: sum of its rows' log losses, number of rows, number of positives."""

_CODES = 2.0**22
"""Codes are below this."""


class Probe:
    """The exact pooled output of the last probe's step, until it has been measured.

    Args:
        policy: says what to measure and takes what was measured.
        parts: of the module.
        group: all ranks.
        device: of the tensors.
    """

    def __init__(self, policy: BoundPolicy, parts: Sequence[Part], group: Any, device: torch.device) -> None:
        self._policy, self._group, self._device = policy, group, device
        self._columns: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
        self._sent: list[tuple[str, str, int]] = []
        for part in parts:
            for slot in part.received:
                if part.peers:
                    self._columns[slot.table].append((slot.name, slot.column, slot.dim))
                    # Of a sum, every rank sends a part.
                    copies = part.peers[0].size if part.kind in ("sum", "two_level") else 1
                    self._sent.append((slot.table, slot.feature, slot.dim * copies))
        self._kept: tuple[int, KeyedTensor, Mapping[str, int]] | None = None

    @property
    def ready(self) -> bool:
        """Whether :meth:`run` has something to measure; the same on all ranks."""
        return self._kept is not None

    def keep(self, step: int, pooled: KeyedTensor, rows: Mapping[str, int]) -> None:
        """Remember an exact pooled output, and how many distinct bags of each feature it came from."""
        values = pooled.values().detach()
        self._kept = (
            step,
            KeyedTensor(pooled.keys(), pooled.length_per_key(), values, key_dim=1),
            rows,
        )

    def run(self, measure: Measure) -> dict[str, Any]:
        """Measure the probe's plan, agree over the ranks and let the policy decide; a collective.

        Returns:
            the record of kind ``probe`` (:mod:`tightrec.trainer.report.records`).
        """
        assert self._kept is not None
        step, pooled, bags = self._kept
        self._kept = None
        policy = self._policy
        plan = policy.probe_plan()
        now = {table: policy.bound("forward", table) for table in self._columns}
        changed = [{table: Bound(value=share, of="range")} for table, share in plan]
        changed.append({table: bound for table, bound in now.items() if bound is not None})
        with torch.no_grad():
            base, rows, positives = measure(pooled)
            rises = [self._rise(measure, pooled, base, bounds) for bounds in changed]
        sent = dict.fromkeys(self._columns, 0.0)
        for table, feature, width in self._sent:
            sent[table] += bags[feature] * width
        volume = torch.tensor(list(sent.values()), dtype=torch.float64)
        measured_here = torch.stack([rows, positives, *rises]).double()
        numbers = torch.cat([volume.to(self._device), measured_here.to(self._device)])
        dist.all_reduce(numbers, group=self._group)
        values = dict(zip(sent, numbers[: len(sent)].tolist(), strict=True))
        count, ones, *losses = numbers[len(sent) :].tolist()
        entropy = _entropy(ones / count) if count else 0.0
        dne = [loss / count / entropy if entropy else float("nan") for loss in losses]
        measured = [(table, share, each) for (table, share), each in zip(plan, dne, strict=False)]
        policy.observe_probe(step, measured, dne[-1], values)
        return policy.report()

    def _rise(self, measure: Measure, exact: KeyedTensor, base: Tensor, bounds: dict[str, Bound]) -> Tensor:
        """By how much the sum of losses rises with some tables quantised.

        The mean of the errors and of their opposites: the first-order effect of one batch's errors, which
        averages out over training and hides the rest, cancels.
        """
        rounded = self._quantised(exact, bounds)
        values = mirrored(exact.values(), rounded.values())
        opposite = KeyedTensor(exact.keys(), exact.length_per_key(), values, key_dim=1)
        return symmetric_dne(base, measure(rounded)[0], measure(opposite)[0])

    def _quantised(self, pooled: KeyedTensor, bounds: dict[str, Bound]) -> KeyedTensor:
        """The pooled output with the columns of some tables as they would arrive."""
        values = pooled.values().clone()
        starts = dict(zip(pooled.keys(), pooled.offset_per_key(), strict=False))
        for table, bound in bounds.items():
            for name, column, dim in self._columns[table]:
                first = starts[name] + column
                block = values[:, first : first + dim]
                block.copy_(_rounded(block, bound))
        return KeyedTensor(pooled.keys(), pooled.length_per_key(), values, key_dim=1)


def _rounded(block: Tensor, bound: Bound) -> Tensor:
    """What the codec's codes of a block's values decode to (docs/FORMAT.md, section 5).

    Values that get no code stay; so does a block of equal values, whose range is 0.
    """
    if not block.numel():
        return block
    error = torch.full((), bound.value, dtype=torch.float32, device=block.device)
    if bound.of == "range":
        error = error * block.max() - error * block.min()
    elif bound.of == "rms":
        error = error * block.double().square().mean().sqrt().float()
    error = error.clamp_min(MIN_BOUND)
    scaled = block * (1 / (2 * error))
    decoded = torch.round(scaled) * (2 * error)
    coded = (scaled.abs() < _CODES) & ((block - decoded).abs() <= error)
    return torch.where(coded, decoded, block)


def _entropy(share: float) -> float:
    """Of a coin with this share of heads, in nats."""
    coin = torch.tensor([share, 1 - share], dtype=torch.float64)
    return float(torch.special.entr(coin).sum())
