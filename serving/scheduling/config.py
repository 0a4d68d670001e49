"""Settings of the scheduler."""

import math
from dataclasses import dataclass, fields
from typing import Any

from tightrec.serving.paths import QUALITIES, Quality

POLICIES = ("multi", "greedy", "fastest", "random", "oracle", "fixed:NAME")
"""The words that ``policy`` takes."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How queries are given to paths."""

    policy: str = "multi"
    """``multi``: the most accurate path that idle compute can pay. ``greedy``: the most accurate path in time
    (MP-Rec). ``fastest``: the path that finishes first. ``random``. ``oracle``: multi that knows the true
    durations, in the simulator only. ``fixed:NAME``: one path."""

    batch_rows: int = 4096
    """Rows in a batch at most; a larger query goes alone."""

    queue_rows: int = 65_536
    """Rows that may wait; more are shed as ``full``."""

    rank: Quality = "accuracy"
    """By what paths are better: accuracy, auc or ne."""

    headroom: float = 0.9
    """Share of the compute that ``multi`` may use up with paths dearer than the cheapest."""

    shed: bool = True
    """Refuse at once what cannot meet its target; false: serve it late."""

    batching: bool = True
    """Score queries that wait together."""

    seed: int = 0
    """Of the policy ``random``."""

    def __post_init__(self) -> None:
        if self.policy.partition(":")[0] not in {word.partition(":")[0] for word in POLICIES}:
            raise ValueError(f"there is no policy {self.policy!r}. Choose {', '.join(POLICIES)}.")
        named = self.policy.startswith("fixed:") and len(self.policy) > len("fixed:")
        if not named and self.policy not in POLICIES[:-1]:
            raise ValueError(f"policy {self.policy!r}: only fixed takes a name of a path, as fixed:NAME.")
        if self.rank not in QUALITIES:
            raise ValueError(f"rank={self.rank!r} is none of {', '.join(QUALITIES)}.")
        for name in ("batch_rows", "queue_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not math.isfinite(self.headroom) or not 0 <= self.headroom <= 1:
            raise ValueError(f"headroom={self.headroom} must be between 0 and 1.")


def scheduler_config(settings: Any, **others: Any) -> SchedulerConfig:
    """The scheduler's part of the ``settings`` of a command, which have the same names, but for ``others``.

    Raises:
        ValueError: a value that the scheduler does not take.
    """
    names = {field.name for field in fields(SchedulerConfig)} - others.keys()
    return SchedulerConfig(**{name: getattr(settings, name) for name in names}, **others)
