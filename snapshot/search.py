"""Search for the smallest mixture of types within a budget of NE.

1. Every table and layer is measured alone at every type (:class:`Cost`).
2. The costs are added up to propose the smallest mixture within a limit (a knapsack with one choice a part,
   exact on a grid), for limits from far above the budget to far below. The proposals are measured as a
   whole, the smallest first, up to the first one that stays within the budget.
3. From there every single step to a smaller type is tried, largest saving first, the whole mixture measured
   again after each; a step that breaks the budget is undone.

Within the budget means :attr:`Loss.bound`, which leaves room for rows that were not searched on.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tightrec.formats.columns import Columns
from tightrec.snapshot.calibrate import chosen_ranges
from tightrec.snapshot.config import PrecisionConfig
from tightrec.snapshot.parts import Parts
from tightrec.snapshot.precision import Plan
from tightrec.snapshot.ranges import Histogram
from tightrec.snapshot.sensitivity import (
    CERTAIN_ERRORS,
    EXACT,
    Bench,
    Cost,
    Loss,
    Types,
    types_of,
)

GRID = 10_000
"""Units into which a limit is divided for a proposal; costs are rounded to them, the measurement is not."""

LIMITS = tuple(2 ** (power / 3) for power in range(12, -16, -1))
"""Limits of the proposals, in budgets: 16 to 1/32. Far above 1, since coarser types may even gain NE."""

COST_ROWS = 20_000
"""Rows, evenly spread over those given, on which parts are measured alone; mixtures are measured on all."""


@dataclass(frozen=True, kw_only=True)
class Step(Loss):
    """A mixture that was measured as a whole."""

    what: str
    """How it came about."""

    bytes: int
    """Its size."""

    kept: bool
    """Whether it stays within the budget, and the search went on from it."""


@dataclass(frozen=True, kw_only=True)
class Found(Loss):
    """The plan that was found, and what it was found from."""

    plan: Plan
    """The smallest mixture measured within the budget."""

    costs: list[Cost]
    """Of every part alone at every type that it can have, in the order of the model."""

    steps: list[Step]
    """Mixtures in the order in which they were measured."""

    bytes: int
    """Size of the plan's weights, whole tables counted."""

    float32_bytes: int
    """The same in float32."""

    budget_ne: float
    """What it was searched for."""

    rows: int
    """Rows that it was measured on."""


def search(
    parts: Parts,
    columns: Columns,
    histograms: dict[str, Histogram],
    config: PrecisionConfig,
    say: Callable[[str], None],
) -> Found:
    """Find the smallest plan within ``config.budget_ne``; the same inputs give the same plan.

    Args:
        parts: the float32 model.
        columns: rows to measure on, with ids that count within ``parts.tables``.
        histograms: of every layer's input; unused where ``config.ranges`` is ``dynamic``.
        config: budget, row search, ranges and batch size.
        say: takes a line on what was done.

    Raises:
        ValueError: the rows cannot tell, see :class:`Bench`.
    """
    ranges = chosen_ranges(histograms, config.ranges, list(parts.layers))
    bench = Bench(parts, columns, ranges, config.row_search, config.batch_size)
    few = bench
    if len(columns) > COST_ROWS:
        spread = np.linspace(0, len(columns) - 1, COST_ROWS).astype(np.int64)
        few = Bench(parts, columns.take(spread), ranges, config.row_search, config.batch_size, like=bench)
    costs = _costs(few, say)
    climb = _Climb(bench, costs, config.budget_ne)
    climb.propose()
    climb.descend()
    types, loss, size = climb.best, climb.loss, climb.bytes
    found = Found(
        plan=bench.plan(types, config.ranges),
        ne_loss=loss.ne_loss,
        ne_loss_error=loss.ne_loss_error,
        expected_loss=loss.expected_loss,
        costs=costs,
        steps=climb.steps,
        bytes=size,
        float32_bytes=parts.bytes(bench.exact),
        budget_ne=config.budget_ne,
        rows=len(bench),
    )
    say(_sentence(found))
    noisy = sum(step.bytes < found.bytes and step.ne_loss <= config.budget_ne for step in found.steps)
    if noisy:
        say(
            f"{noisy} smaller mixtures stayed within the budget, but not clear of the noise of "
            f"{found.rows:,} rows: more search_rows may allow one of them"
        )
    return found


def smallest(options: Sequence[Sequence[tuple[int, float]]], limit: float) -> list[int]:
    """Place of the option chosen for each part: least total size with a total cost within ``limit``.

    Exact but for rounding the costs to ``limit / GRID``. Of mixtures of equal size that with the lowest cost
    is taken, then the one whose options come first.

    Args:
        options: of each part, (size, cost); at least one costs 0.
        limit: on the sum of costs.
    """
    best = np.full(GRID + 1, np.inf)
    best[0] = 0
    chosen = np.zeros((len(options), GRID + 1), np.int8)
    units: list[list[int]] = []
    for number, one in enumerate(options):
        grown = np.full(GRID + 1, np.inf)
        units.append([_units(cost, limit) for _, cost in one])
        for place, (size, _) in enumerate(one):
            if (used := units[-1][place]) > GRID:
                continue
            with_it = best[: GRID + 1 - used] + size
            smaller = with_it < grown[used:]
            grown[used:][smaller] = with_it[smaller]
            chosen[number, used:][smaller] = place
        best = grown
    at = int(best.argmin())
    places = []
    for number in reversed(range(len(options))):
        places.append(int(chosen[number, at]))
        at -= units[number][places[-1]]
    return places[::-1]


def _units(cost: float, limit: float) -> int:
    if cost <= 0:
        return 0
    # A cost that is not a number, or infinite, is one that nobody can pay.
    return round(cost / limit * GRID) if cost <= limit else GRID + 1


class _Climb:
    """From float32 everywhere to the smallest mixture within the budget."""

    def __init__(self, bench: Bench, costs: Sequence[Cost], budget: float) -> None:
        self._bench, self._budget, self._costs = bench, budget, costs
        self.steps: list[Step] = []
        self.best = bench.exact
        self.loss = Loss(ne_loss=0.0, ne_loss_error=0.0, expected_loss=0.0)
        self.bytes = bench.parts.bytes(bench.exact)
        self._seen: dict[tuple[str, ...], bool] = {}
        # Of every part: size and charge by type, float32 first.
        self._options = {part: {EXACT: (bench.parts.part_bytes(part, EXACT), 0.0)} for part in bench.exact}
        for cost in costs:
            self._options[cost.part][cost.kind] = (cost.bytes, cost.charge)

    def propose(self) -> None:
        """Measure proposals, the smallest first, up to the first one within the budget."""
        least = {part: min(kinds, key=kinds.__getitem__) for part, kinds in self._options.items()}
        proposals = [("the smallest types everywhere", least)]
        for times in LIMITS:
            limit = times * self._budget
            what = f"the smallest mixture whose costs add up to {limit:.3g}"
            proposals.append((what, self._proposal(limit)))
        # Sorting is stable: of equal sizes the one that may cost more comes first.
        proposals.sort(key=lambda proposal: self._bench.parts.bytes(proposal[1]))
        for what, types in proposals:
            if self._try(what, types):
                return

    def descend(self) -> None:
        """Try every single smaller type, largest saving first."""
        for cost in sorted(
            self._costs, key=lambda cost: (cost.bytes - self._size_now(cost.part), cost.charge)
        ):
            saved = self._size_now(cost.part) - cost.bytes
            # The second is not measured, for the part breaks the budget alone.
            if saved <= 0 or cost.ne_loss - CERTAIN_ERRORS * cost.ne_loss_error > self._budget:
                continue
            what = f"{cost.part} {self.best[cost.part]} -> {cost.kind}, {saved:,} B less"
            self._try(what, {**self.best, cost.part: cost.kind})

    def _size_now(self, part: str) -> int:
        return self._options[part][self.best[part]][0]

    def _proposal(self, limit: float) -> Types:
        places = smallest([list(kinds.values()) for kinds in self._options.values()], limit)
        return {
            part: list(kinds)[place]
            for (part, kinds), place in zip(self._options.items(), places, strict=True)
        }

    def _try(self, what: str, types: Types) -> bool:
        """Measure ``types``, and go on from them if they are smaller and within the budget."""
        key = tuple(types.values())
        if key not in self._seen:
            loss = self._bench.loss(types)
            size = self._bench.parts.bytes(types)
            # Not `bound > budget`: a loss that is not a number is within nothing.
            within = self._seen[key] = loss.bound <= self._budget
            kept = within and size < self.bytes
            if kept:
                self.best, self.loss, self.bytes = types, loss, size
            self.steps.append(Step(what=what, bytes=size, kept=kept, **dataclasses.asdict(loss)))
        return self._seen[key]


def _costs(bench: Bench, say: Callable[[str], None]) -> list[Cost]:
    tables, layers = len(bench.parts.tables), len(bench.parts.layers)
    say(f"measuring {tables} tables and {layers} layers alone at every type, on {len(bench):,} rows")
    costs = []
    for part in bench.exact:
        for kind in types_of(part):
            try:
                cost = bench.cost(part, kind)
            except ValueError as error:
                say(f"{part} cannot be {kind}: {error}")
                continue
            if math.isfinite(cost.bound):
                costs.append(cost)
            else:
                say(f"{part} cannot be {kind}: some scores would be no finite numbers")
    return costs


def _sentence(found: Found) -> str:
    return (
        f"found {found.bytes / found.float32_bytes:.1%} of float32's size, NE loss {found.ne_loss:+.4%} +- "
        f"{found.ne_loss_error:.4%}, expected {found.expected_loss:.4%} (budget {found.budget_ne:.4%}), "
        f"{len(found.steps)} mixtures measured; {found.plan.counts}"
    )


def ranked(found: Found) -> list[str]:
    """The parts, the most sensitive first: by their charge at the type that costs them most."""
    worst: dict[str, float] = {}
    for cost in found.costs:
        worst[cost.part] = max(worst.get(cost.part, 0.0), cost.charge)
    return sorted(worst, key=lambda part: -worst[part])


def sensitivity_json(found: Found) -> dict[str, Any]:
    """Everything of ``found`` as JSON values; costs in the model's order, sizes in bytes."""
    return {
        "budget_ne": found.budget_ne,
        "rows": found.rows,
        "found": {
            "plan": dataclasses.asdict(found.plan),
            "ne_loss": found.ne_loss,
            "ne_loss_error": found.ne_loss_error,
            "expected_loss": found.expected_loss,
            "bytes": found.bytes,
            "float32_bytes": found.float32_bytes,
        },
        "ranking": ranked(found),
        "costs": [{**dataclasses.asdict(cost), "charge": cost.charge} for cost in found.costs],
        "steps": [dataclasses.asdict(step) for step in found.steps],
    }
