"""Which path a query takes: the rules, one class each, behind one word of the settings."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tightrec.serving.paths import PathSet
from tightrec.serving.scheduling.config import SchedulerConfig
from tightrec.serving.scheduling.estimates import PathEstimate
from tightrec.serving.scheduling.queues import DeviceQueue, Waiting


@dataclass(slots=True, eq=False)
class Option:
    """One path that a query could take now."""

    estimate: PathEstimate
    """Of the path."""

    queue: DeviceQueue
    """Of its device."""

    start: float
    """When it could start, in seconds."""

    finish: float
    """When it would have ended, planned with the margin for the tail."""

    cost_s: float
    """Slot-seconds that it costs at the batch sizes that the target allows."""


class Policy:
    """What all rules share; a query without a say of its own goes anywhere."""

    spends = False
    """Whether batches are formed on the cheapest path and moved to a more accurate one that the device's
    budget can pay; otherwise each query has a path, and batches follow."""

    def only(self) -> str | None:
        """Name of the path that the next query must take; None: any."""
        return None

    def choose(self, options: Sequence[Option]) -> Option:
        """The best of ``options``, at least one, all of which end in time."""
        raise NotImplementedError

    def counted(self, options: Sequence[Option]) -> Sequence[Option]:
        """Those of ``options`` for a newcomer that it may count on."""
        return options

    def joins(self, item: Waiting, estimate: PathEstimate) -> bool:
        """Whether ``item`` may be scored in a batch on this path instead of its own."""
        return True

    def moves(self, item: Waiting, estimate: PathEstimate) -> bool:
        """Whether ``item`` may leave its device for this path of an idle one."""
        return True


class Greedy(Policy):
    """The most accurate path that ends in time, cheaper first among equals (MP-Rec, arXiv 2302.10872)."""

    def choose(self, options: Sequence[Option]) -> Option:
        """See the class."""
        return max(options, key=lambda option: (option.estimate.quality, -option.cost_s))

    def joins(self, item: Waiting, estimate: PathEstimate) -> bool:
        """Only a path that is no worse than its own."""
        return estimate.quality >= item.estimate.quality

    def moves(self, item: Waiting, estimate: PathEstimate) -> bool:
        """The same."""
        return self.joins(item, estimate)


class Multi(Policy):
    """The cheapest path for everything; accuracy where compute is idle.

    Cheapest: the most rows predicted right per slot-second. A query goes to the device that could give it the
    best quality out of its budget, then to the one that ends first. Which path a batch takes in the end is
    decided when it starts: see :meth:`tightrec.serving.scheduling.scheduler.Scheduler.start`.
    """

    spends = True

    def choose(self, options: Sequence[Option]) -> Option:
        """The cheapest path of the device that is best for the query."""
        best: tuple[float, float] | None = None
        chosen = options[0]
        for group in _by_device(options):
            base = cheapest(group)
            affords = group[0].queue.budget.affords
            quality = max(o.estimate.quality for o in group if o is base or affords(o.cost_s))
            if best is None or (quality, -base.finish) > best:
                best, chosen = (quality, -base.finish), base
        return chosen

    def counted(self, options: Sequence[Option]) -> Sequence[Option]:
        """Where others wait, only the cheapest path of the device: the batches there run on it.

        The best of several promises is too good: the one whose estimate errs most is taken.
        """
        return [
            option
            for group in _by_device(options)
            for option in ([cheapest(group)] if group[0].queue.waiting else group)
        ]

    def moves(self, item: Waiting, estimate: PathEstimate) -> bool:
        """Only to a path that is no worse."""
        return estimate.quality >= item.estimate.quality


def _by_device(options: Sequence[Option]) -> Iterable[list[Option]]:
    groups: dict[int, list[Option]] = {}
    for option in options:
        groups.setdefault(id(option.queue), []).append(option)
    return groups.values()


def cheapest(options: Sequence[Option]) -> Option:
    """The option with the most right predictions per slot-second; the earlier one among equals."""
    return max(options, key=lambda option: (option.estimate.path.accuracy / option.cost_s, -option.finish))


def gain(better: PathEstimate, base: PathEstimate) -> float:
    """By how much ``better`` is better, as a share of what ``base`` has."""
    return (better.quality - base.quality) / max(abs(base.quality), 1e-9)


class Fastest(Policy):
    """The path that ends first; cheaper ones first among equals."""

    def choose(self, options: Sequence[Option]) -> Option:
        """See the class."""
        return min(options, key=lambda option: (option.finish, option.cost_s))


class Only(Fastest):
    """Every query on one path, a fixed one or one drawn for each."""

    def __init__(self, names: Sequence[str], seed: int) -> None:
        self._names = list(names)
        self._draw = random.Random(seed)

    def only(self) -> str | None:
        """The next query's path."""
        return self._names[0] if len(self._names) == 1 else self._draw.choice(self._names)


def make_policy(paths: PathSet, config: SchedulerConfig) -> Policy:
    """The rule that ``config.policy`` names.

    Raises:
        ValueError: ``fixed:NAME`` names no path; names those there are.
    """
    word, _, name = config.policy.partition(":")
    if word == "fixed":
        return Only([paths.path(name).name], config.seed)
    if word == "random":
        return Only([path.name for path in paths.paths], config.seed)
    return {"multi": Multi, "oracle": Multi, "greedy": Greedy, "fastest": Fastest}[word]()
