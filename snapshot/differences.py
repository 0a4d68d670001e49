"""How far a low-precision model is from the float32 one, stage by stage, over many batches.

A layer has two errors: what it adds itself (fed with the float32 model's values) and what has gathered by
then (fed with what the low-precision model made so far). The first tells where an error enters, the second
how it grows. After the numeric debugger of IEEE Micro 2021 (arXiv 2105.12676).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tightrec.snapshot.model import TABLES, Scorer

TABLE = "table:"
"""Stands before a table's name in a stage's: the table's own columns of the stage ``tables``."""

ScorerInputs = tuple[Tensor, Tensor, Tensor]
"""Dense values [B, dense columns], ids and offsets, as :class:`Scorer` takes them."""


@dataclass
class Difference:
    """Sums over the values of two tensors that should agree, in float64."""

    signal: float = 0.0
    """Sum of the squares of the exact values."""

    noise: float = 0.0
    """Sum of the squared differences."""

    other: float = 0.0
    """Sum of the squares of the other values."""

    product: float = 0.0
    """Sum of their products."""

    max_error: float = 0.0
    """Largest absolute difference."""

    not_finite: int = 0
    """Values that are NaN or Inf where the exact ones are not; they make the sums NaN or Inf too."""

    def update(self, exact: Tensor, other: Tensor) -> None:
        """Take in two tensors of one shape."""
        if not exact.numel():
            return
        a, b = exact.double().flatten(), other.double().flatten()
        error = b - a
        self.signal += float(a @ a)
        self.noise += float(error @ error)
        self.other += float(b @ b)
        self.product += float(a @ b)
        largest = float(error.abs().max())
        # Python's max would lose a NaN that comes second.
        self.max_error = largest if math.isnan(largest) else max(self.max_error, largest)
        self.not_finite += int((a.isfinite() & ~b.isfinite()).sum())

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise ratio in decibels; inf: equal; NaN: not finite, or no signal."""
        if self.noise == 0:
            return math.inf
        if self.signal == 0 or not math.isfinite(self.noise) or not math.isfinite(self.signal):
            return math.nan
        return 10 * math.log10(self.signal / self.noise)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two; NaN: not finite, or one of them is zero."""
        norms = math.sqrt(self.signal) * math.sqrt(self.other)
        return min(1.0, max(-1.0, self.product / norms)) if norms > 0 and math.isfinite(norms) else math.nan


@dataclass
class Stage:
    """One part of the model, measured."""

    name: str
    """See :meth:`Scorer.stages`; ``table:NAME`` for one table's columns."""

    gathered: Difference = field(default_factory=Difference)
    """Of what it puts out when all before it is of low precision too."""

    own: Difference | None = None
    """Of what it puts out when fed with float32 values; None: it has no weights of its own."""

    terms: float = 0.0
    """Sum of the squares of all that a layer adds up for its outputs: products and biases."""

    taken: tuple[float, float] | None = None
    """A layer's smallest and largest input in the float32 model."""

    kind: str = ""
    """Its type; empty where it has none of its own."""

    @property
    def own_db(self) -> float:
        """SQNR of its own error. The signal is the terms that it adds up where they are larger than their
        sums: sums that cancel, such as logits near 0, cannot be better than what they are made of."""
        if self.own is None:
            return math.nan
        return replace(self.own, signal=max(self.own.signal, self.terms)).sqnr_db


def measure(
    exact: Scorer,
    low: Scorer,
    pairs: Iterable[tuple[ScorerInputs, ScorerInputs]],
    weights: Mapping[str, tuple[Tensor, Tensor | None]],
) -> list[Stage]:
    """Run two models side by side.

    Args:
        exact: the float32 model.
        low: the same model at other types.
        pairs: the same rows for each, with the ids that it knows.
        weights: float32 weight [N, K] and bias [N] of every layer.

    Returns:
        Every stage in the order in which it runs, each table before the stage of all ``tables``.
    """
    names = [f"{TABLE}{shape.name}" for shape in low.lookup.shapes] if low.lookup else []
    stages = {name: Stage(name, own=Difference()) for name in names}
    layers = low.layers
    with torch.inference_mode():
        for batch, low_batch in pairs:
            seen: list[tuple[str, Tensor | None, Tensor]] = []
            exact(*batch, lambda *part, seen=seen: seen.append(part))
            for (name, taken, wanted), (_, found) in zip(seen, low.stages(*low_batch), strict=True):
                if name == TABLES:
                    _tables([stages[table] for table in names], wanted, found, exact.dim)
                stage = stages.setdefault(name, Stage(name))
                stage.gathered.update(wanted, found)
                if taken is not None:
                    stage.own = stage.own or Difference()
                    stage.own.update(wanted, layers[name](taken))
                    stage.terms += _terms(taken, *weights[name])
                    stage.taken = _wider(stage.taken, taken)
    return list(stages.values())


def _tables(stages: list[Stage], wanted: Tensor, found: Tensor, dim: int) -> None:
    for place, stage in enumerate(stages):
        columns = slice(place * dim, (place + 1) * dim)
        stage.gathered.update(wanted[:, columns], found[:, columns])
        # A table takes ids, so that nothing gathers before it.
        stage.own = stage.gathered


def _terms(x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    added = float((x.double().square().sum(0) * weight.double().square().sum(0)).sum())
    return added if bias is None else added + len(x) * float(bias.double().square().sum())


def _wider(known: tuple[float, float] | None, values: Tensor) -> tuple[float, float] | None:
    if not values.numel():
        return known
    low, high = (float(value) for value in values.aminmax())
    return (low, high) if known is None else (min(known[0], low), max(known[1], high))
