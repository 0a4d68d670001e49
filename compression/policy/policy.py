"""The bound of every table, direction and step.

``BoundPolicy`` puts together what the other files of this folder hold one by one. It is the same on all ranks
as long as what it is told is: it computes in plain Python numbers and talks to nobody.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tightrec.compression.bounds import Bound, Bounds
from tightrec.compression.policy.classes import MULTIPLES, Sampling, TableClass, class_by_rows
from tightrec.compression.policy.config import (
    MAX_RANGE_SHARE,
    BoundConfig,
    Direction,
    check_budget,
    check_patterns,
    configured,
    format_bound,
    overrides,
)
from tightrec.compression.policy.feedback import Feedback
from tightrec.compression.policy.probes import Probes
from tightrec.compression.policy.schedules import schedule_multiplier
from tightrec.kernels.format import MAX_BOUND

STATE_FORMAT = 1
_SENT_RAW = Bound(value=2.0**-100)
"""Stands in ``bounds`` for a lossless table, which the caller sends raw."""
_NUDGE = 1.01
_LEAST_NE = 1e-15
"""A prediction of 0 has no size to compare the total with."""

Current = dict[Direction, dict[str, Bound | None]]


@dataclass(frozen=True, kw_only=True)
class TableFacts:
    """What is known of a table before training."""

    name: str
    """As in the model."""

    rows: int
    """Of the whole table, not of one rank's part."""

    dim: int
    """Values of a row, likewise."""


class BoundPolicy:
    """The bounds of a job's exchanged tables.

    Each step ``set_step`` is called, then ``bounds`` for each exchange. Where ``probe_due``, the caller
    measures ``probe_plan`` and calls ``observe_probe``. Where ``sample_due``, it calls ``observe_rows``, and
    where ``homogenisation_due``, it adds up ``homogenisation_counts`` over ranks for ``set_homogenisation``.

    Args:
        config: levels, schedule and their constants.
        tables: those that are exchanged.
        budget_ne: ``codec.budget_ne``; None: bounds do not follow from a budget.
        not_exchanged: names of other tables, which ``codec.bound.tables`` may match in vain.

    Raises:
        ValueError: a table named twice, a pattern that matches no table, or a budget that ``check_budget``
            refuses.
    """

    def __init__(
        self,
        config: BoundConfig,
        tables: Sequence[TableFacts],
        budget_ne: float | None = None,
        not_exchanged: Sequence[str] = (),
    ) -> None:
        check_budget(config, budget_ne)
        names = [table.name for table in tables]
        if len(set(names)) < len(names):
            raise ValueError(f"each table has one bound, but a name comes twice in {names}")
        self.version = 0
        """Another number whenever a bound of any table changed."""
        self._config = config
        self._budget = budget_ne
        self._messages = check_patterns(config, names, not_exchanged)
        self._step = 0
        self._configured: Current = {
            "forward": configured(config, "forward", names),
            "backward": configured(config, "backward", names),
        }
        forward = self._configured["forward"]
        self._by_rows: dict[str, TableClass] = {}
        if config.level == "rows":
            self._by_rows = {table.name: class_by_rows(table.rows, config) for table in tables}
        self._sampling = Sampling(config, forward) if config.level == "homogenisation" else None
        self._feedback = None if budget_ne is None else Feedback(config, budget_ne)
        # The dial alone is enough: it stands for the sensitivity level and the feedback.
        measures = config.level == "sensitivity" or (config.level == "fixed" and budget_ne is not None)
        shares = {name: b.value for name, b in forward.items() if measures and b and b.of == "range"}
        self._probes = Probes(config, shares, overrides(config, "forward", names))
        self._probing = any(forward.values()) and (measures or self._feedback is not None)
        if measures and not self._probes.chooses:
            self._messages.append(
                "no table's forward bound follows from what it costs in NE: each is lossless, named in "
                "codec.bound.tables, or not relative to the range"
            )
        self._total: float | None = None
        self._cache: dict[tuple[Any, ...], tuple[int, Bounds]] = {}
        self._schedule = self._scheduled(0)
        self._current = self._compute()

    def set_step(self, step: int) -> None:
        """Say which training step, counted from 0, the bounds are asked for."""
        self._step = step
        schedule = self._scheduled(step)
        if schedule != self._schedule:
            self._schedule = schedule
            self._refresh()
        if self._sampling is not None:
            self._sampling.set_step(step)

    @property
    def multiplier(self) -> float:
        """Of the schedule or of the feedback, now."""
        return self._schedule * (self._feedback.multiplier if self._feedback else 1.0)

    def bound(self, direction: Direction, table: str) -> Bound | None:
        """The bound now; None: lossless."""
        if table not in self._current[direction]:
            raise ValueError(
                f"there is no bound for table {table!r}; known: {sorted(self._current[direction])}"
            )
        return self._current[direction][table]

    def word(self, direction: Direction, table: str) -> str:
        """The bound now, as a user would write it."""
        return format_bound(self.bound(direction, table))

    def lossless(self, direction: Direction, tables: Sequence[str]) -> list[bool]:
        """Which of ``tables`` are to be sent raw; does not change over training."""
        return [self.bound(direction, table) is None for table in tables]

    def bounds(
        self, direction: Direction, tables: Sequence[str], slots: Sequence[str], share: float = 1.0
    ) -> Bounds:
        """The bounds now for one exchange; the same object until one of them changes.

        Args:
            direction: of the exchange.
            tables: [S] the table of each slot; may repeat.
            slots: [S] unique names.
            share: each bound times this: 1/world where that many errors are added up.

        Raises:
            ValueError: an unknown table, or a bound times ``share`` that no frame can hold.
        """
        key = (direction, tuple(tables), tuple(slots), share)
        kept = self._cache.get(key)
        if kept is not None and kept[0] == self.version:
            return kept[1]
        found = [self.bound(direction, table) or _SENT_RAW for table in tables]
        scaled = tuple(Bound(value=bound.value * share, of=bound.of) for bound in found)
        same = kept is not None and kept[1].bounds == scaled
        made = kept[1] if kept is not None and same else Bounds(scaled, tuple(slots))
        self._cache[key] = (self.version, made)
        return made

    def sample_due(self, step: int) -> bool:
        """Whether the rows of this step's forward exchange are to be given to ``observe_rows``."""
        return self._sampling is not None and self._sampling.due(step)

    def observe_rows(self, table: str, rows: Tensor) -> None:
        """Sample rows [N, D] of one table on this rank; the host waits for the two counts.

        They are quantised at the configured forward bound, whatever the schedule says.
        """
        self.bound("forward", table)
        if self._sampling is not None:
            self._sampling.observe(table, rows)

    def homogenisation_due(self, step: int) -> bool:
        """Whether sampling is over and ``set_homogenisation`` is due; on all ranks at the same step."""
        return self._sampling is not None and self._sampling.over(step)

    def homogenisation_counts(self) -> list[int]:
        """[2T] this rank's distinct rows before and after quantisation of each table, to be added up."""
        return [] if self._sampling is None else self._sampling.counts()

    def set_homogenisation(self, counts: Sequence[float]) -> None:
        """Class the tables by the sum over ranks of ``homogenisation_counts``.

        Raises:
            ValueError: not two numbers for each table.
        """
        if self._sampling is not None:
            self._messages += self._sampling.classify(counts)
            self._refresh()

    def probe_due(self, step: int) -> bool:
        """Whether the NE differences of ``probe_plan`` are to be measured at this step."""
        return self._probing and step > 0 and step % self._config.probe_every == 0

    def probe_plan(self) -> list[tuple[str, float]]:
        """What to measure beside the total: tables, each alone at a bound relative to its range.

        The total is the NE difference between all tables at their bounds of now and all tables exact.
        """
        return self._probes.plan(self._shares())

    def observe_probe(
        self,
        step: int,
        measured: Iterable[tuple[str, float, float]],
        total_dne: float,
        values: Mapping[str, float],
    ) -> None:
        """Take in a probe and move the bounds.

        Args:
            step: of the probe.
            measured: (table, bound relative to the range, NE difference), averaged over ranks; differences
                are those of ``symmetric_dne``.
            total_dne: NE difference of all tables at their bounds of now, likewise.
            values: that each table sends forward in a step, all ranks together.

        Raises:
            ValueError: a measurement of a table that ``probe_plan`` does not name.
        """
        self._step = step
        told = self._probes.observe(measured, values)
        self._total = total_dne if math.isfinite(total_dne) else None
        if self._feedback is not None and (self._probes.bounds or not self._probes.chooses):
            told.append(self._observe_total(self._feedback, total_dne))
        told += self._probes.allocate(self._budget)
        self._messages += [f"step {step}: {line}" for line in told]
        self._refresh()

    def messages(self) -> list[str]:
        """Decisions since the last call, for the log."""
        told, self._messages = self._messages, []
        return told

    def report(self) -> dict[str, Any]:
        """The record of the last probe: the total as measured, multiplier and bounds as they follow from it.

        A table's ``dne`` is predicted for its bound of now; None: it is not measured.
        """
        tables: dict[str, dict[str, Any]] = {}
        for name, bound in self._current["forward"].items():
            dne = self._probes.dne(name, bound.value) if bound is not None and bound.of == "range" else None
            tables[name] = {"dne": dne, "bound": format_bound(bound)}
        return {
            "kind": "probe",
            "step": self._step,
            "total_dne": self._total,
            "budget": self._budget,
            "multiplier": self.multiplier,
            "tables": tables,
        }

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, as plain numbers by table name: it does not depend on ranks or sharding."""
        classes = self._sampling.classes if self._sampling is not None else {}
        return {
            "format": STATE_FORMAT,
            "step": self._step,
            "budget_ne": self._budget,
            "total_dne": self._total,
            "feedback": self._feedback.state_dict() if self._feedback else None,
            "chooses": self._probes.chooses,
            "tables": {
                t: self._probes.state_of(t) | {"class": classes.get(t)} for t in self._current["forward"]
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict`` of a job on any number of ranks; the settings are this job's.

        Tables that only one of the two has are told in ``messages``. Another budget is followed from the next
        probe on.

        Raises:
            ValueError: the state is of another version of this program.
        """
        if state.get("format") != STATE_FORMAT:
            raise ValueError(
                f"the checkpoint's error bounds are of format {state.get('format')!r}, but this version "
                f"reads {STATE_FORMAT}; resume with the version that wrote it"
            )
        saved: Mapping[str, Mapping[str, Any]] = state["tables"]
        names = self._current["forward"]
        for name in sorted(saved.keys() ^ names.keys()):
            self._messages.append(
                f"table {name} is not in the checkpoint: its bounds start as configured"
                if name in names
                else f"table {name} of the checkpoint is not exchanged here: what was learnt of it is dropped"
            )
        for name in [name for name in names if name in saved]:
            self._probes.restore(name, saved[name])
        if self._sampling is not None:
            classes = {name: saved[name].get("class") for name in names if name in saved}
            self._sampling.restore({name: c for name, c in classes.items() if c is not None})
        self._total = state["total_dne"]
        if self._feedback is not None and state["feedback"] is not None:
            # Totals are kept beside what they were compared with, which may be another thing now.
            comparable = state["chooses"] == self._probes.chooses
            self._feedback.load_state_dict(state["feedback"] | ({} if comparable else {"totals": []}))
        if state["budget_ne"] != self._budget:
            told = f"codec.budget_ne was {state['budget_ne']}, is {self._budget}"
            self._messages.append(told)
        self._step = int(state["step"])
        self._schedule = self._scheduled(self._step)
        self._refresh()

    def _shares(self) -> dict[str, float]:
        forward = self._current["forward"]
        return {table: bound.value for table, bound in forward.items() if bound and bound.of == "range"}

    def _observe_total(self, feedback: Feedback, total_dne: float) -> str:
        strength = feedback.multiplier
        if self._probes.bounds:
            # What the model predicts moves with every allocation; how far it is off moves slowly.
            strength = math.sqrt(max(self._probes.predicted(self._shares()), _LEAST_NE))
        now = self._current["forward"]
        looser, tighter = (self._compute(nudge)["forward"] for nudge in (_NUDGE, 1 / _NUDGE))
        can_loosen = looser != now and not self._probes.rising
        return feedback.observe(total_dne, strength, can_loosen=can_loosen, can_tighten=tighter != now)

    def _scheduled(self, step: int) -> float:
        config = self._config
        return schedule_multiplier(config.schedule, step, config.factor, config.steps)

    def _refresh(self) -> None:
        current = self._compute()
        if current != self._current:
            self._current = current
            self.version += 1

    def _compute(self, nudge: float = 1.0) -> Current:
        """All bounds, with the feedback's multiplier times ``nudge``."""
        feedback = self._feedback.multiplier * nudge if self._feedback else 1.0
        classes = self._by_rows if self._sampling is None else self._sampling.classes
        forward: dict[str, Bound | None] = {}
        moves: list[tuple[float, float]] = []
        for name, bound in self._configured["forward"].items():
            forward[name] = None
            if bound is None:
                continue
            base = MULTIPLES[classes.get(name, "base")]
            if name in self._probes.bounds:
                value = self._probes.clamped(self._probes.bounds[name] * feedback * self._schedule)
                now = Bound(value=value, of="range")
            else:
                now = _times(bound, base * feedback * self._schedule)
            forward[name] = now
            moves.append((now.value / (bound.value * base), self._probes.values.get(name, 1.0)))
        follow = self._schedule
        if self._feedback is not None:
            follow *= min(_geometric_mean(moves), self._config.backward_cap)
        backward = {
            name: None if bound is None else _times(bound, follow)
            for name, bound in self._configured["backward"].items()
        }
        return {"forward": forward, "backward": backward}


def _times(bound: Bound, factor: float) -> Bound:
    most = MAX_RANGE_SHARE if bound.of == "range" else MAX_BOUND
    return Bound(value=min(bound.value * factor, most), of=bound.of)


def _geometric_mean(moves: Sequence[tuple[float, float]]) -> float:
    """Of (number, weight) pairs; 1 where there are none."""
    weights = sum(weight for _, weight in moves)
    return math.exp(sum(math.log(move) * w for move, w in moves) / weights) if weights else 1.0
