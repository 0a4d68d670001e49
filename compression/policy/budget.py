"""The cheapest bounds of all tables together whose errors cost no more than a budget of NE.

A value quantised at bound b, relative to its block's range, takes about log2(1/(2b)) bits and a constant;
the table's errors cost s * b^2 (sensitivity.py), and those of several tables add up. Minimising the bits
under the budget by Lagrange gives s * b^2 in proportion to the values sent: at the optimum each table's share
of the budget is its share of the values, however sensitive it is. A table whose bound would leave its limits
stays at the limit, and the others share what it leaves.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A table whose bound is looked for."""

    table: str
    """Its name."""

    sensitivity: float
    """dNE / b^2; 0 or more."""

    values: float
    """Values that it sends in a step; above 0."""

    low: float
    """Tightest bound, relative to the range."""

    high: float
    """Loosest bound; equal to ``low`` for a table whose bound is given."""

    def __post_init__(self) -> None:
        sound = 0 <= self.sensitivity < math.inf and 0 < self.values < math.inf
        if not sound or not 0 < self.low <= self.high < math.inf:
            raise ValueError(f"table {self.table!r} cannot be given a bound: {self}")


def allocate(candidates: Sequence[Candidate], budget: float) -> dict[str, float]:
    """The bound of each table: the exact optimum of the model above.

    Args:
        candidates: the tables.
        budget: what their dNE may sum to. Where even the tightest bounds cost more, all are tightest.

    Raises:
        ValueError: the budget is not a finite number above 0.
    """
    if not 0 < budget < math.inf:
        raise ValueError(f"a budget of {budget} NE cannot be allocated; give a finite number above 0")

    def spent(price: float) -> float:
        return sum(_cost(candidate, price) for candidate in candidates)

    # What all spend rises with the price, on a line between two neighbouring limits.
    limits = sorted({limit for candidate in candidates for limit in _limits(candidate)})
    over = bisect_right(limits, budget, key=spent)
    price = limits[over - 1] if over else 0.0
    if over < len(limits):
        free = [c for c in candidates if _limits(c)[0] <= price and limits[over] <= _limits(c)[1]]
        if free:
            price += (budget - spent(price)) / sum(candidate.values for candidate in free)
    return {candidate.table: _bound(candidate, price) for candidate in candidates}


def predicted_dne(candidates: Sequence[Candidate], bounds: Mapping[str, float]) -> float:
    """What errors of ``bounds`` cost all tables together."""
    return sum(c.sensitivity * bounds[c.table] ** 2 for c in candidates)


def model_bits(candidates: Sequence[Candidate], bounds: Mapping[str, float]) -> float:
    """Bits that all tables send in a step at ``bounds``, without the constant for each value."""
    return sum(c.values * math.log2(1 / (2 * bounds[c.table])) for c in candidates)


def _limits(candidate: Candidate) -> tuple[float, float]:
    """The prices (dNE for each value) at which a table reaches its tightest and its loosest bound."""
    unit = candidate.sensitivity / candidate.values
    return unit * candidate.low**2, unit * candidate.high**2


def _cost(candidate: Candidate, price: float) -> float:
    low, high = _limits(candidate)
    return candidate.values * min(max(price, low), high)


def _bound(candidate: Candidate, price: float) -> float:
    low, high = _limits(candidate)
    # At the limits exactly the limit, not its square's root; the upper one first, as it is free of cost where
    # the sensitivity is 0.
    if price >= high:
        return candidate.high
    return candidate.low if price <= low else math.sqrt(candidate.values * price / candidate.sensitivity)
