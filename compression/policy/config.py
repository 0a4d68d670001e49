"""Bounds as a user writes them, and how they change over tables and steps."""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from tightrec.compression.bounds import Bound, Kind
from tightrec.kernels.format import MAX_BOUND, MIN_BOUND

Direction = Literal["forward", "backward"]
LevelName = Literal["fixed", "rows", "homogenisation", "sensitivity"]
ScheduleName = Literal["constant", "step", "linear", "log", "sc24", "feedback"]

LOSSLESS = "lossless"
MAX_RANGE_SHARE = 0.5
"""At half the range every value of a block that spans zero may become zero: more says nothing further."""


@dataclass(frozen=True, kw_only=True)
class TableBound:
    """Bounds of the tables that a pattern matches."""

    forward: str | None = None
    """Of the pooled embeddings, in the words of ``codec.bound.forward``; None: as for all tables."""

    backward: str | None = None
    """Of their gradients; None: as for all tables."""


@dataclass(frozen=True, kw_only=True)
class BoundConfig:
    """The error bound of every table, direction and step.

    A bound is ``range:SHARE`` or ``rms:SHARE`` of the block it is used on, ``absolute:ERROR``, or
    ``lossless``. Table level, iteration level and their constants: SC'24 (arXiv 2407.04272); the sensitivity
    level, the feedback and the budget are this project's.
    """

    forward: str = "range:0.03"
    """Of the pooled embeddings; holds for each value on the wire."""

    backward: str = "range:0.01"
    """Of their gradients; with dedup it holds on the sum over equal bags."""

    tables: dict[str, TableBound] = field(default_factory=dict)
    """Bounds by table name or shell pattern (``t_C*``), before the two above; the last match that names a
    direction counts for it."""

    level: LevelName = "fixed"
    """How tables differ: ``fixed``: only by ``tables``. ``rows``: three classes by row count.
    ``homogenisation``: three classes by how many distinct rows quantisation makes equal.
    ``sensitivity``: by what each table's error costs in NE, measured in probes."""

    schedule: ScheduleName = "constant"
    """Multiplier of all bounds by step: 1 (``constant``); falling from ``factor`` to 1 over ``steps``
    (``step``, ``linear``, ``log``); ``sc24``: ``step`` with the published 2 and 65,536 whatever those two
    say; ``feedback``: what keeps the probed NE difference within codec.budget_ne."""

    factor: float = 2.0
    """The multiplier at step 0 (``step``, ``linear``, ``log``)."""

    steps: int = 65_536
    """Steps until the multiplier is 1 (``step``, ``linear``, ``log``)."""

    loose_rows: int = 1_000
    """Tables of at most so many rows are loose (``rows``); lies in the gap of the released classes, 970 to
    1,442."""

    tight_rows: int = 400_000
    """Tables of at least so many rows are tight (``rows``); lies in the gap 313,829 to 415,421."""

    loose_index: float = 0.01
    """Tables of at most this homogenisation index are loose."""

    tight_index: float = 0.1
    """Tables of at least this homogenisation index are tight."""

    sample_after: int = 200
    """Step at which sampling rows begins (``homogenisation``): untrained rows do not tell."""

    sample_batches: int = 8
    """Batches that are sampled, once."""

    probe_every: int = 200
    """Steps between probes (``sensitivity``, ``feedback``, or with codec.budget_ne)."""

    probe_tables: int = 8
    """Measurements of single tables in one probe; each costs two forward passes of the dense layers."""

    probe_needed: int = 3
    """Measurements that each table, and the total, must have before a bound follows from them."""

    probe_memory: int = 16
    """Last measurements of each table, and of the total, that count."""

    ladder: tuple[float, ...] = (0.5, 1.0, 2.0)
    """A table is measured at these multiples of its bound of now, in turn."""

    tightest: float = 0.001
    """Smallest share of the range that a measured table is given."""

    loosest: float = 0.1
    """Largest share of the range that a measured table is given."""

    rate: float = 1.25
    """Largest factor by which one probe raises the multiplier, and loosens what it allocates to a table; down
    they go by at most its square."""

    least_multiplier: float = 0.125
    """The feedback's multiplier stays at or above this."""

    most_multiplier: float = 4.0
    """The feedback's multiplier stays at or below this."""

    backward_cap: float = 1.0
    """How far the budget may loosen a backward bound, as a multiple of the configured one: the probes look at
    the forward loss and do not see what an error in gradients costs."""

    def __post_init__(self) -> None:
        parse_bound(self.forward, "codec.bound.forward")
        parse_bound(self.backward, "codec.bound.backward")
        for pattern, bound in self.tables.items():
            for direction in get_args(Direction):
                word = getattr(bound, direction)
                if word is not None:
                    parse_bound(word, f"codec.bound.tables.{pattern}.{direction}")
        for name, names in {"level": LevelName, "schedule": ScheduleName}.items():
            if getattr(self, name) not in get_args(names):
                raise ValueError(
                    f"codec.bound.{name}={getattr(self, name)} is unknown; choose one of "
                    f"{', '.join(get_args(names))}."
                )
        for name in ("steps", "sample_batches", "probe_every", "probe_tables", "probe_needed"):
            if getattr(self, name) < 1:
                raise ValueError(f"codec.bound.{name}={getattr(self, name)} must be at least 1.")
        if self.sample_after < 0:
            raise ValueError(f"codec.bound.sample_after={self.sample_after} must be 0 or more.")
        for name in ("factor", "most_multiplier"):
            if not 1 <= getattr(self, name) < math.inf:
                raise ValueError(f"codec.bound.{name}={getattr(self, name)} must be finite and at least 1.")
        if not 1 < self.rate < math.inf:
            raise ValueError(
                f"codec.bound.rate={self.rate} must be finite and above 1, else no bound can move."
            )
        for name in ("least_multiplier", "backward_cap"):
            if not 0 < getattr(self, name) <= (1 if name == "least_multiplier" else math.inf):
                limit = " and at most 1" if name == "least_multiplier" else ""
                raise ValueError(f"codec.bound.{name}={getattr(self, name)} must be above 0{limit}.")
        if self.probe_memory < self.probe_needed:
            raise ValueError(
                f"codec.bound.probe_memory={self.probe_memory} forgets measurements before "
                f"codec.bound.probe_needed={self.probe_needed} have come together. Raise it."
            )
        if not self.ladder or any(not 0.1 <= rung <= 10 for rung in self.ladder):
            raise ValueError(
                f"codec.bound.ladder={list(self.ladder)} must hold multiples of a bound, from 0.1 to 10."
            )
        self._check_order("loose_rows", "tight_rows", 0, math.inf)
        self._check_order("loose_index", "tight_index", 0.0, 1.0)
        self._check_order("tightest", "loosest", 0.0, MAX_RANGE_SHARE)
        if not self.tightest > 0:
            raise ValueError(f"codec.bound.tightest={self.tightest} must be above 0.")

    def _check_order(self, low: str, high: str, least: float, most: float) -> None:
        if not least <= getattr(self, low) < getattr(self, high) <= most:
            raise ValueError(
                f"codec.bound.{low}={getattr(self, low)} must be below codec.bound.{high}="
                f"{getattr(self, high)}, and both from {least} to {most}."
            )


def check_budget(config: BoundConfig, budget_ne: float | None) -> None:
    """Refuse a budget that cannot be kept, or a schedule that needs one or works against it.

    Args:
        config: the bounds.
        budget_ne: ``codec.budget_ne``, the NE difference that all forward errors together may cost.

    Raises:
        ValueError: a budget that is not a finite number above 0; ``feedback`` without a budget; a decaying
            schedule with one.
    """
    if budget_ne is None:
        if config.schedule == "feedback":
            raise ValueError(
                "codec.bound.schedule=feedback keeps the NE difference within codec.budget_ne, which is not "
                "set. Set it, for example codec.budget_ne=0.0002, or choose another schedule."
            )
        return
    if isinstance(budget_ne, bool) or not 0 < budget_ne < math.inf:
        raise ValueError(
            f"codec.budget_ne={budget_ne} must be a finite number above 0. For no loss at all set "
            "codec.bound.forward=lossless and codec.bound.backward=lossless."
        )
    if config.schedule not in ("constant", "feedback"):
        raise ValueError(
            f"codec.bound.schedule={config.schedule} loosens bounds that codec.budget_ne has measured to fit "
            "the budget. Remove one of the two."
        )


def parse_bound(word: str, setting: str = "bound") -> Bound | None:
    """The bound that a word stands for; None for ``lossless``.

    Args:
        word: ``range:0.03``, ``rms:0.5``, ``absolute:1e-3`` or ``lossless``.
        setting: its name, for messages.

    Raises:
        ValueError: not of that form, or a number that is no bound.
    """
    if word == LOSSLESS:
        return None
    kind, colon, number = str(word).partition(":")
    forms = "range:0.03 (share of the block's range), rms:0.5, absolute:1e-3 or lossless"
    if not colon or kind not in get_args(Kind):
        raise ValueError(f"{setting}={word} is no bound. Write {forms}.")
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"{setting}={word}: {number!r} is no number. Write {forms}.") from None
    if not MIN_BOUND <= value <= MAX_BOUND:
        raise ValueError(
            f"{setting}={word}: the number must be from 2^-126 to 2^125 (about 1.2e-38 to 4.3e37). "
            f"Write {forms}."
        )
    if kind == "range" and value > MAX_RANGE_SHARE:
        raise ValueError(
            f"{setting}={word}: a bound is at most {MAX_RANGE_SHARE} of the range. For 3 % write range:0.03."
        )
    return Bound(value=value, of=kind)  # type: ignore[arg-type] # one of Kind, tested above


def format_bound(bound: Bound | None) -> str:
    """The word of a bound, its number rounded to six digits."""
    return LOSSLESS if bound is None else f"{bound.of}:{bound.value:.6g}"


def overrides(config: BoundConfig, direction: Direction, tables: Sequence[str]) -> dict[str, str]:
    """The words of those ``tables`` that ``codec.bound.tables`` gives a bound for ``direction``."""
    found: dict[str, str] = {}
    for pattern, bound in config.tables.items():
        word: str | None = getattr(bound, direction)
        if word is not None:
            found |= {table: word for table in tables if fnmatch.fnmatchcase(table, pattern)}
    return found


def configured(config: BoundConfig, direction: Direction, tables: Sequence[str]) -> dict[str, Bound | None]:
    """The bound of each of ``tables`` before any level or schedule; None: lossless."""
    named = overrides(config, direction, tables)
    default: str = getattr(config, direction)
    return {
        table: parse_bound(named.get(table, default), f"codec.bound.{direction} of {table}")
        for table in tables
    }


def check_patterns(config: BoundConfig, tables: Sequence[str], others: Sequence[str]) -> list[str]:
    """What to tell of ``codec.bound.tables`` that name only ``others``, which are not exchanged.

    Raises:
        ValueError: a pattern matches no table at all.
    """
    told = []
    for pattern in config.tables:
        if not fnmatch.filter(tables, pattern):
            if not fnmatch.filter(others, pattern):
                raise ValueError(
                    f"codec.bound.tables.{pattern} matches no table. The tables are: "
                    f"{', '.join(sorted((*tables, *others)))}."
                )
            told.append(f"codec.bound.tables.{pattern} only matches tables that are not exchanged: not used")
    return told
