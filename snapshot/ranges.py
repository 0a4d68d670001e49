"""The range in which the input of an int8 layer is quantised, from a streaming histogram of what it saw.

The four ways of choosing are those of the low-precision inference of Facebook's recommendation models
(Deng et al., IEEE Micro 2021, arXiv 2105.12676); the criteria are written out at `_squared_errors` and
`divergence`.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BINS = 8192
"""Most bins of a histogram. Once a range has grown, between half of them and all are in use."""

SHARE = 0.9999
"""Of the values other than zero, the share that `percentile` keeps: half of the rest lies beyond each end."""

SHRINK = 2 ** (-1 / 8)
"""Ratio of neighbouring candidates of `l2` and `kl` on each side of zero, ..."""

SHRINKS = 64
"""... and how many of them there are, the whole side first: the narrowest is 1/256 of it."""

METHODS = ("min_max", "percentile", "l2", "kl")
"""Ways of choosing a range."""

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


def affine(low: float, high: float, bits: int) -> tuple[float, int]:
    """Scale (a float32 value) and zero point with which [low, high] is quantised to `bits` unsigned bits.

    The range is widened to hold zero, and the zero point is an integer: zero comes back exactly. Rounding
    it moves both ends by at most half a step. A range without extent, or
    with a step below float32's normal numbers, has the scale 1.
    """
    low, high, top = min(low, 0.0), max(high, 0.0), 2**bits - 1
    scale = float(np.float32((high - low) / top))
    if scale < 2**-126:  # operators multiply by its reciprocal, which could overflow
        return 1.0, 0
    return scale, min(max(round(-low / scale), 0), top)


class Histogram:
    """Counts of values in bins of equal width, in bounded memory however many batches there are.

    The width is a power of two and zero is an edge, so that a growing range merges whole bins: the counts
    depend on the values alone, not on how they were split into batches or on which batch came first.
    Zeros are kept apart: every range represents them exactly, so that a spike of them (ReLU) must not
    draw a range towards it. Minimum and maximum are exact.
    """

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0
        self.zeros = 0
        self.total = 0
        self._exponent = -149  # the finest width that float32 can tell apart
        self._first = 0
        self._counts: Counts = np.zeros(1, dtype=np.int64)

    def update(self, values: Tensor) -> None:
        """Count values (any shape, any floating type and device).

        Raises ValueError where a value is not finite; nothing is counted then.
        """
        flat = values.detach().reshape(-1).to("cpu", torch.float32)
        if flat.numel() == 0:
            return
        if not bool(torch.isfinite(flat).all()):
            bad = int((~torch.isfinite(flat)).sum())
            raise ValueError(
                f"{bad} of {flat.numel()} values are NaN or infinite, which no range can hold: "
                "look at the rows and at the layers before this one"
            )
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        kept = flat[flat != 0].double().numpy()
        self.total += flat.numel()
        self.zeros += flat.numel() - len(kept)
        self._widen()
        if len(kept):
            places = np.floor(np.ldexp(kept, -self._exponent)).astype(np.int64) - self._first
            self._counts += np.bincount(places, minlength=len(self._counts))

    def range(self, method: str, bits: int) -> tuple[float, float]:
        """Choose the range (low, high) by `method` for a quantisation to `bits` bits; it holds zero.

        - min_max: everything seen.
        - percentile: all but (1 - SHARE) / 2 of the values other than zero at either end.
        - l2: the candidate of least expected squared error, see `_squared_errors`.
        - kl: the candidate whose quantised distribution diverges least, see `divergence`.

        Raises ValueError for an unknown method and where no value was seen.
        """
        if method not in METHODS:
            raise ValueError(f"{method!r} is no way of choosing a range: choose one of {', '.join(METHODS)}")
        if not self.total:
            raise ValueError("no value was seen, so there is no range: give the layer at least one row")
        if method == "min_max" or self.total == self.zeros:
            return self.low, self.high
        if method == "percentile":
            return self._percentile()
        return self._best(method, bits)

    def bins(self) -> tuple[Floats, Counts]:
        """Lower edges of the bins, and how many values other than zero fell into [edge, edge + width)."""
        places = np.arange(self._first, self._first + len(self._counts))
        return np.ldexp(places.astype(np.float64), self._exponent), self._counts

    @property
    def width(self) -> float:
        """Of every bin."""
        return math.ldexp(1.0, self._exponent)

    def candidates(self, method: str, bits: int) -> list[tuple[float, float]]:
        """Ranges among which l2 and kl choose: each side shrinks by itself, the whole range comes first.

        For kl a candidate spans at least 2**bits bins: below that each bin has a level of its own, and
        nothing but the clipping would count.
        """
        shrunk = [SHRINK**i for i in range(SHRINKS + 1)]
        lows = [self.low * part for part in shrunk] if self.low < 0 else [0.0]
        highs = [self.high * part for part in shrunk] if self.high > 0 else [0.0]
        pairs = [(low, high) for low in lows for high in highs]
        if method == "kl":
            pairs = pairs[:1] + [p for p in pairs[1:] if (p[1] - p[0]) / self.width >= 2**bits]
        return pairs

    def _widen(self) -> None:
        """Merge bins until those from low to high are at most BINS."""
        old = self._exponent
        while self._place(self.high) - self._place(self.low) >= BINS:
            self._exponent += 1
        first = self._place(self.low)
        counts = np.zeros(self._place(self.high) - first + 1, dtype=np.int64)
        held = np.flatnonzero(self._counts)
        np.add.at(counts, ((held + self._first) >> (self._exponent - old)) - first, self._counts[held])
        self._first, self._counts = first, counts

    def _place(self, value: float) -> int:
        return math.floor(math.ldexp(value, -self._exponent))

    def _percentile(self) -> tuple[float, float]:
        edges, counts = self.bins()
        spare = math.floor((self.total - self.zeros) * (1 - SHARE) / 2)
        below = np.cumsum(counts)
        first = int(np.searchsorted(below, spare, side="right"))
        last = len(counts) - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), spare, side="right"))
        low, high = max(edges[first], self.low), min(edges[last] + self.width, self.high)
        return min(float(low), 0.0), max(float(high), 0.0)

    def _best(self, method: str, bits: int) -> tuple[float, float]:
        edges, counts = self.bins()
        held = np.flatnonzero(counts)
        centres, held_counts = edges[held] + self.width / 2, counts[held]
        pairs = self.candidates(method, bits)
        if method == "l2":
            costs = _squared_errors(centres, held_counts, pairs, bits)
        else:
            costs = np.array([divergence(centres, held_counts, *pair, bits) for pair in pairs])
        return pairs[int(np.argmin(costs))]


def _squared_errors(centres: Floats, counts: Counts, pairs: list[tuple[float, float]], bits: int) -> Floats:
    """Sums of expected squared errors of values at `centres` quantised in each [low, high] of `pairs`.

    A value inside is off by a uniform error of half a step at most: step**2 / 12. One outside is clipped.
    By running sums of the moments: thousands of pairs cost milliseconds.
    """
    weights = counts.astype(np.float64)
    moments = [np.concatenate(([0.0], np.cumsum(weights * centres**power))) for power in range(3)]
    low, high = np.array(pairs).T
    below, above = np.searchsorted(centres, low, side="left"), np.searchsorted(centres, high, side="right")
    step = (high - low) / (2**bits - 1)
    cost = (moments[0][above] - moments[0][below]) * step**2 / 12
    for bound, part in ((low, [m[below] for m in moments]), (high, [m[-1] - m[above] for m in moments])):
        cost += np.maximum(part[2] - 2 * bound * part[1] + bound**2 * part[0], 0.0)
    return cost


def divergence(centres: Floats, counts: Counts, low: float, high: float, bits: int) -> float:
    """Kullback-Leibler divergence of the clipped histogram from its quantised form, in nats.

    After Migacz, "8-bit inference with TensorRT" (2017), for ranges that need not be symmetric: what lies
    outside joins the outermost bins inside; the quantised form knows the values inside alone, and spreads
    each level evenly over the bins that it stands for and that are not empty.
    """
    inside = np.flatnonzero((centres >= low) & (centres <= high))
    if not len(inside):
        return math.inf
    first, last = inside[0], inside[-1]
    kept = counts[first : last + 1].astype(np.float64)
    scale, zero_point = affine(low, high, bits)
    levels = np.clip(np.rint(centres[first : last + 1] / scale) + zero_point, 0, 2**bits - 1).astype(np.int64)
    spread = (np.bincount(levels, kept) / np.maximum(np.bincount(levels), 1))[levels] / kept.sum()
    kept[0] += counts[:first].sum()
    kept[-1] += counts[last + 1 :].sum()
    kept /= kept.sum()
    return float((kept * np.log(kept / spread)).sum())
