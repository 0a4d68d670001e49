"""What the errors of a table cost in NE, from noisy measurements at a few bounds.

Quantisation adds to each value an error of nearly zero mean, nearly uniform within the bound b. Expanded in
this error e, the loss changes by a first-order term (gradient times error), which averages out over values
and rows, and a second-order term (curvature times squared error), which does not: its mean grows with b^2. So

    dNE(b) = s * b^2,

where s is the sensitivity of the table. In a single batch, what is left of the first-order term is far larger
than the second-order term at useful bounds. It has the sign of the error: ``mirrored`` rows, whose error is
-e, have it the other way round. A measurement is therefore half the sum of two differences,

    dNE = (NE(x + e) + NE(x - e)) / 2 - NE(x),

in which it cancels, and so do all odd terms. What noise is left grows with b^2 as the measurement does, so
that each measurement of s = dNE / b^2 counts alike, but for outliers (a batch with a few odd rows), which
count less: Huber's estimate of the mean. Where b is not small against the values, dNE grows faster than b^2:
s is the one at the bounds that were measured, and these are chosen around the bound in use.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from torch import Tensor

Measurement = tuple[float, float]
"""A bound, relative to the range, and the NE difference that was measured there."""

_HUBER = 1.345
"""In standard deviations: 95 % as precise as the mean where the noise is normal."""
_ROUNDS = 20
_MAD_TO_DEVIATION = 1.4826

Number = TypeVar("Number", float, Tensor)


def mirrored(exact: Tensor, quantised: Tensor) -> Tensor:
    """Values of ``exact``'s shape with the opposite error of ``quantised``, within the same bound."""
    return 2 * exact - quantised


def symmetric_dne(exact_ne: Number, quantised_ne: Number, mirrored_ne: Number) -> Number:
    """A measurement, from the NE (or sums of losses) of one batch at exact, quantised and mirrored rows."""
    return (quantised_ne + mirrored_ne) / 2 - exact_ne


@dataclass(frozen=True, kw_only=True)
class Fit:
    """dNE = slope * b^2, and how well it is known."""

    slope: float
    """The sensitivity s; noise can make it negative."""

    error: float
    """Its standard error; as large as the slope where there is a single measurement."""

    count: int
    """Measurements behind it."""

    @property
    def cautious(self) -> float:
        """A sensitivity that is not below the true one in about five of six cases; never negative."""
        return max(self.slope, 0.0) + self.error


def fit(measurements: Sequence[Measurement]) -> Fit:
    """The sensitivity behind at least one measurement.

    Raises:
        ValueError: no measurement.
    """
    if not measurements:
        raise ValueError("a sensitivity needs at least one measurement")
    slopes = [dne / bound**2 for bound, dne in measurements]
    if len(slopes) == 1:
        return Fit(slope=slopes[0], error=abs(slopes[0]), count=1)
    slope, weights = median(slopes), [1.0] * len(slopes)
    for _ in range(_ROUNDS):
        limit = _HUBER * _MAD_TO_DEVIATION * median(abs(each - slope) for each in slopes)
        if limit == 0:
            break
        weights = [min(1.0, limit / abs(each - slope)) if each != slope else 1.0 for each in slopes]
        before, slope = slope, sum(w * s for w, s in zip(weights, slopes, strict=True)) / sum(weights)
        if math.isclose(before, slope, rel_tol=1e-9):
            break
    squares = sum(w * (each - slope) ** 2 for w, each in zip(weights, slopes, strict=True))
    freedom = max(sum(weights) - 1, 0.5)
    return Fit(slope=slope, error=math.sqrt(squares / freedom / sum(weights)), count=len(slopes))


class Sensitivity:
    """The last measurements of one table.

    Args:
        memory: measurements that are kept.
    """

    def __init__(self, memory: int) -> None:
        self.taken = 0
        """Measurements asked for so far, unusable ones too."""
        self._last: deque[Measurement] = deque(maxlen=memory)
        self._fit: Fit | None = None

    def add(self, bound: float, dne: float) -> bool:
        """Take one measurement in; whether it was a finite number.

        Raises:
            ValueError: the bound is not a finite number above 0.
        """
        if not 0 < bound < math.inf:
            raise ValueError(
                f"a measurement at a bound of {bound} of the range says nothing; give one above 0"
            )
        self.taken += 1
        if not math.isfinite(dne):
            return False
        self._last.append((float(bound), float(dne)))
        self._fit = None
        return True

    def fit(self) -> Fit | None:
        """The sensitivity so far; None before the first measurement."""
        if self._fit is None and self._last:
            self._fit = fit(self._last)
        return self._fit

    @property
    def measurements(self) -> list[Measurement]:
        """Those that are kept, oldest first."""
        return list(self._last)

    def restore(self, taken: int, measurements: Iterable[Sequence[float]]) -> None:
        """Go on from what ``taken`` and ``measurements`` once were."""
        self.taken = int(taken)
        self._fit = None
        self._last.clear()
        self._last.extend((float(bound), float(dne)) for bound, dne in measurements)
