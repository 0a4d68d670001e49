"""Runs that differ only in their seed, together: means, spreads, and differences to the first group."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tightrec.trainer.compare.runs import Run, differing
from tightrec.trainer.report.figures import mean

_MOST_IN_LABEL = 2


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ only in their seed."""

    label: str
    """Short, and of no other group."""

    runs: Sequence[Run]
    """At least one."""

    @property
    def settings(self) -> Mapping[str, str]:
        """Those of each of its runs."""
        return self.runs[0].settings

    def scores(self, split: str, name: str) -> list[float]:
        """A score of every run that has it."""
        return [score for run in self.runs if (score := run.score(split, name)) is not None]

    def fact(self, *names: str) -> float:
        """Mean over the runs of a number in ``run.json``; NaN where none has it."""
        found: list[float | None] = []
        for run in self.runs:
            value: Any = run.facts
            for name in names:
                value = (value or {}).get(name)
            found.append(value if isinstance(value, int | float) else None)
        return mean(found)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """By how much a group's score is above the first group's."""

    mean: float
    """Over the seeds that both have, or of the two means where they share none."""

    error: float
    """Standard error of ``mean``; NaN with fewer than two seeds."""

    spread: float
    """Standard deviation over the seeds of the first group, the noise to compare with; NaN with one seed."""

    @property
    def share(self) -> float:
        """The difference in spreads."""
        return self.mean / self.spread if self.spread else math.nan

    @property
    def within(self) -> bool | None:
        """Whether the difference is at most a third of the spread; None where that is not known."""
        return None if math.isnan(self.mean + self.spread) else self.mean <= self.spread / 3


def grouped(runs: Iterable[Run]) -> list[Group]:
    """Groups in the order of their first runs."""
    together: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        together.setdefault(tuple(sorted(run.settings.items())), []).append(run)
    members = list(together.values())
    return [Group(label=label, runs=runs) for label, runs in zip(_labels(members), members, strict=True)]


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; NaN of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def difference(group: Group, base: Group, split: str, name: str) -> Difference:
    """Compare a score, seed by seed where both groups have run the same seeds."""
    ours, theirs = _by_seed(group, split, name), _by_seed(base, split, name)
    noise = spread(base.scores(split, name))
    shared = [seed for seed in ours if seed in theirs]
    if shared:
        # The same seed starts from the same weights and reads the same order: pairs cancel part of the noise.
        pairs = [ours[seed] - theirs[seed] for seed in shared]
        return Difference(mean=mean(pairs), error=spread(pairs) / math.sqrt(len(pairs)), spread=noise)
    own, other = group.scores(split, name), base.scores(split, name)
    error = math.nan
    if len(own) > 1 and len(other) > 1:
        error = math.hypot(spread(own) / math.sqrt(len(own)), noise / math.sqrt(len(other)))
    return Difference(mean=mean(own) - mean(other), error=error, spread=noise)


def _by_seed(group: Group, split: str, name: str) -> dict[int, float]:
    """Scores by seed; empty where a seed was run twice, so that nothing can be paired."""
    seeds = [run.seed for run in group.runs]
    if len(set(seeds)) < len(seeds):
        return {}
    found = {run.seed: run.score(split, name) for run in group.runs}
    return {seed: score for seed, score in found.items() if seed is not None and score is not None}


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Names of folders without their seeds (``lossy`` of ``lossy_3``), else the settings that differ."""
    stems = [{_stem(run) for run in runs} for runs in groups]
    names = [next(iter(found)) for found in stems if len(found) == 1]
    if len(set(names)) == len(groups) and all(names):
        return names
    firsts = [runs[0].settings for runs in groups]
    changing = dict.fromkeys(name for one in firsts for name in differing(firsts[0], one))
    labels = [_told(settings, list(changing)) for settings in firsts]
    repeated = Counter(labels)
    return [
        label if repeated[label] == 1 else f"{number}: {label}"
        for number, label in enumerate(labels, start=1)
    ]


def _stem(run: Run) -> str:
    stem = run.name.removesuffix(f"_{run.seed}")
    # A run folder's usual name is a date and time, which says nothing about the run.
    return "" if stem == run.name or re.match(r"\d{4}-\d\d-\d\d", stem) else stem


def _told(settings: Mapping[str, str], changing: Sequence[str]) -> str:
    directions = ("codec.forward", "codec.backward")
    words = []
    if any(name in changing for name in directions):
        forward, backward = (settings.get(name, "") for name in directions)
        words.append(forward if forward == backward else f"{forward}/{backward}")
    rest = [name for name in changing if name not in directions]
    words += [f"{name.rpartition('.')[2]}={settings.get(name)}" for name in rest[:_MOST_IN_LABEL]]
    if len(rest) > _MOST_IN_LABEL:
        words.append("...")
    return " ".join(words) or "all runs"
