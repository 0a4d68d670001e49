"""The forward bounds that follow from probes: what to measure, what was measured, what bounds it gives."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from tightrec.compression.policy.budget import Candidate, allocate, predicted_dne
from tightrec.compression.policy.config import MAX_RANGE_SHARE, BoundConfig
from tightrec.compression.policy.feedback import limited
from tightrec.compression.policy.sensitivity import Fit, Sensitivity

_GIVE_UP = 4
"""A table whose measurements are not numbers this many times ``probe_needed`` is left as configured, so that
the others need not wait for it for ever."""


class Probes:
    """The measured tables of a job, and the bound of each once all are measured.

    Args:
        config: ladder, limits and memory.
        shares: configured bound of each table that is to be measured, relative to the range.
        pinned: those of them that keep it.
    """

    def __init__(self, config: BoundConfig, shares: Mapping[str, float], pinned: Collection[str]) -> None:
        self.bounds: dict[str, float] = {}
        """Bound by table, relative to the range; empty until all are measured."""
        self.values: dict[str, float] = {}
        """Values that a table sends in a step, smoothed."""
        self.rising = False
        """Whether ``rate`` keeps some bound below what it is allocated."""
        self._config = config
        self._shares = dict(shares)
        self._pinned = {table for table in shares if table in pinned}
        self._tables = {table: Sensitivity(config.probe_memory) for table in shares}

    @property
    def chooses(self) -> bool:
        """Whether there is a table whose bound can follow from measurements."""
        return len(self._pinned) < len(self._tables)

    def plan(self, shares: Mapping[str, float]) -> list[tuple[str, float]]:
        """Tables to measure now, each at a bound relative to its range; the least measured come first.

        Args:
            shares: bound of now of each measured table, relative to its range.
        """
        ladder = self._config.ladder
        asked = {table: sensitivity.taken for table, sensitivity in self._tables.items()}
        places = {table: place for place, table in enumerate(asked)}
        times = dict.fromkeys(asked, 0)
        plan: list[tuple[str, float]] = []
        while len(plan) < self._config.probe_tables:
            open_ = [table for table in asked if times[table] < len(ladder)]
            if not open_:
                break
            table = min(open_, key=lambda name: (asked[name], places[name]))
            # Tables start at different rungs, so that a probe holds tight and loose ones.
            rung = ladder[(asked[table] + places[table]) % len(ladder)]
            plan.append((table, min(rung * shares[table], MAX_RANGE_SHARE)))
            asked[table] += 1
            times[table] += 1
        return plan

    def observe(self, measured: Iterable[tuple[str, float, float]], values: Mapping[str, float]) -> list[str]:
        """Take in (table, bound, NE difference) and the values that tables send; what to tell about it.

        Raises:
            ValueError: a table that is not measured.
        """
        told = []
        for table, share, dne in measured:
            if table not in self._tables:
                raise ValueError(f"table {table!r} was measured, but its bound does not follow from probes")
            if not self._tables[table].add(share, dne):
                told.append(f"table {table}: the NE difference at range:{share:g} is {dne}, passed over")
        for table, count in values.items():
            if 0 < count < math.inf:
                self.values[table] = (self.values.get(table, count) + count) / 2
        return told

    def allocate(self, budget: float | None) -> list[str]:
        """Bounds within ``budget`` of NE, once all tables are measured; what to tell about it.

        Args:
            budget: None: what the configured bounds are predicted to cost.
        """
        config = self._config
        if not self.chooses:
            return []
        fits = {table: sensitivity.fit() for table, sensitivity in self._tables.items()}
        ready = {table: fit for table, fit in fits.items() if fit and fit.count >= config.probe_needed}
        lost = {table for table, s in self._tables.items() if s.taken >= _GIVE_UP * config.probe_needed}
        lost -= ready.keys()
        if not ready or self._tables.keys() - ready.keys() - lost:
            return [f"{len(ready)} of {len(fits)} tables are measured: bounds stay until all are"]
        candidates = [self._candidate(table, fit) for table, fit in ready.items()]
        # Where no table costs anything, any budget is enough.
        budget = budget or predicted_dne(candidates, self._shares) or 1.0
        found = allocate(candidates, budget)
        least = predicted_dne(candidates, found)
        # The first time too: sensitivities far from where they were measured are a guess.
        before = self._shares | self.bounds
        wanted = found
        found = {table: limited(before[table], share, config.rate) for table, share in wanted.items()}
        self.rising = any(found[table] < wanted[table] for table in found)
        chosen = {table: share for table, share in found.items() if table not in self._pinned}
        self.bounds |= chosen
        told = []
        if chosen:
            low, high = min(chosen, key=chosen.__getitem__), max(chosen, key=chosen.__getitem__)
            told.append(
                f"forward bounds from range:{chosen[low]:.3g} ({low}) to range:{chosen[high]:.3g} ({high}), "
                f"predicted to cost at most {predicted_dne(candidates, found):.2e} NE of {budget:.2e}"
            )
        if least > budget * 1.001:
            told.append(f"the tightest bounds that may be given are predicted to cost {least:.2e} NE")
        if lost:
            told.append(f"no NE difference of {sorted(lost)} is a number: bounds stay as they are")
        return told

    def predicted(self, shares: Mapping[str, float]) -> float:
        """NE difference that all measured tables together are expected to make at ``shares``."""
        costs = (self.dne(table, shares[table]) for table in self._tables)
        return sum(cost for cost in costs if cost is not None)

    def dne(self, table: str, share: float) -> float | None:
        """Predicted NE difference of a table at a bound relative to its range; None: not measured yet."""
        found = self._tables[table].fit() if table in self._tables else None
        return None if found is None else found.slope * share**2

    def state_of(self, table: str) -> dict[str, Any]:
        """What is known of a table, as plain numbers."""
        state: dict[str, Any] = {"values": self.values.get(table), "bound": self.bounds.get(table)}
        if table in self._tables:
            state["taken"] = self._tables[table].taken
            state["measured"] = [list(pair) for pair in self._tables[table].measurements]
        return state

    def restore(self, table: str, state: Mapping[str, Any]) -> None:
        """Go on from ``state_of``, as far as this configuration measures the table."""
        if state.get("values") is not None:
            self.values[table] = float(state["values"])
        if table in self._tables and "taken" in state:
            self._tables[table].restore(state["taken"], state["measured"])
            if state.get("bound") is not None and table not in self._pinned:
                self.bounds[table] = self.clamped(float(state["bound"]))

    def clamped(self, share: float) -> float:
        """``share`` within ``tightest`` and ``loosest``."""
        return min(max(share, self._config.tightest), self._config.loosest)

    def _candidate(self, table: str, fit: Fit) -> Candidate:
        pin = self._shares[table] if table in self._pinned else None
        return Candidate(
            table=table,
            sensitivity=fit.cautious,
            values=max(self.values.get(table, 1.0), 1.0),
            low=pin or self._config.tightest,
            high=pin or self._config.loosest,
        )
