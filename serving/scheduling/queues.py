"""Queries, batches, and what waits and runs on one device. The clock is the caller's: seconds, monotonic."""

import bisect
import heapq
import itertools
from dataclasses import dataclass, field

from tightrec.serving.paths import Device, ServingPath
from tightrec.serving.scheduling.budget import Budget, Reach
from tightrec.serving.scheduling.estimates import PathEstimate

_FEW = 64
"""Entries that are not worth a clearing."""

MOVES = 3
"""How often a query may go to another device."""

OVERDUE = 0.05
"""A batch past its expected end is expected to take this share of its duration longer."""


@dataclass(slots=True, eq=False)
class Query:
    """Rows that arrive together, with a latency target."""

    number: int
    """The caller's, unique among those that wait."""

    rows: int
    """At least 1."""

    arrived: float
    """Seconds."""

    target_s: float
    """Seconds from arrival to scores."""

    path: str | None = None
    """Name of the path that must be taken; None: the scheduler's choice."""

    @property
    def deadline(self) -> float:
        """When the scores are due, in seconds."""
        return self.arrived + self.target_s


@dataclass(slots=True, eq=False)
class Batch:
    """Queries that one path scores together."""

    number: int
    """Counts up from 0 in the order of starting."""

    path: ServingPath
    """Where."""

    queries: tuple[Query, ...]
    """In the order of their deadlines."""

    started: float
    """Seconds."""

    expected_s: float
    """How long it should take."""

    @property
    def rows(self) -> int:
        """Of all its queries."""
        return sum(query.rows for query in self.queries)


@dataclass(slots=True, eq=False)
class Shed:
    """A query that will not be scored."""

    query: Query
    """Which."""

    reason: str
    """``late``: it can no longer meet its target. ``full``: too many rows wait."""


@dataclass(slots=True, eq=False)
class Waiting:
    """A query in the queue of a device."""

    query: Query
    """It."""

    deadline: float
    """Seconds."""

    estimate: PathEstimate
    """Of the path it was admitted for; another may score it in the end."""

    cost_s: float
    """Slot-seconds by which it lengthens the queue."""

    only: str | None
    """Name of the path that it must take; None: any."""

    latest: float
    """Seconds: past it no path can meet the deadline."""

    moves: int = 0
    """How often it went to another device."""


class Losses:
    """Which of the waiting queries is lost first, past its ``latest``: a heap.

    What no longer waits is dropped when it comes up, or when it is most of the heap.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Waiting]] = []
        self._items: dict[int, Waiting] = {}
        self._count = itertools.count()

    def add(self, item: Waiting) -> None:
        """``item`` waits."""
        self._items[item.query.number] = item
        heapq.heappush(self._heap, (item.latest, next(self._count), item))

    def remove(self, item: Waiting) -> None:
        """``item`` waits no more."""
        del self._items[item.query.number]
        if len(self._heap) > 2 * len(self._items) + _FEW:
            self._heap = [entry for entry in self._heap if self._waits(entry[2])]
            heapq.heapify(self._heap)

    def first(self) -> Waiting | None:
        """The one that is lost first; None: nothing waits."""
        while self._heap:
            item = self._heap[0][2]
            if self._waits(item):
                return item
            heapq.heappop(self._heap)
        return None

    def _waits(self, item: Waiting) -> bool:
        return self._items.get(item.query.number) is item


def order(waiting: Waiting) -> tuple[float, int]:
    """Earliest deadline first, equal ones by number."""
    return waiting.deadline, waiting.query.number


@dataclass(slots=True, eq=False)
class DeviceQueue:
    """What waits for, and runs on, one device."""

    device: Device
    """It."""

    estimates: list[PathEstimate]
    """Of its paths."""

    budget: Budget
    """Slot-seconds that may be spent on accuracy."""

    reach: Reach
    """How long a batch may last for it."""

    waiting: list[Waiting] = field(default_factory=list)
    """In the order of deadlines."""

    rows: int = 0
    """That wait."""

    backlog_s: float = 0.0
    """Slot-seconds that wait."""

    free: int = 0
    """Slots that no batch occupies."""

    running: dict[int, Batch] = field(default_factory=dict)
    """By number."""

    gains: dict[int, float] = field(default_factory=dict)
    """Of running batches on a dearer path than the cheapest: share of right predictions gained, by number."""

    rows_by_path: dict[str, int] = field(default_factory=dict)
    """That wait, by the path they were admitted for."""

    def __post_init__(self) -> None:
        self.free = self.device.slots

    def add(self, item: Waiting) -> None:
        """Queue ``item`` by its deadline."""
        bisect.insort(self.waiting, item, key=order)
        self.rows += item.query.rows
        self.backlog_s += item.cost_s
        name = item.estimate.path.name
        self.rows_by_path[name] = self.rows_by_path.get(name, 0) + item.query.rows

    def remove(self, items: list[Waiting]) -> None:
        """Take ``items``, which wait here, out of the queue."""
        gone = set(map(id, items))
        self.waiting = [item for item in self.waiting if id(item) not in gone]
        for item in items:
            self.rows -= item.query.rows
            self.backlog_s -= item.cost_s
            self.rows_by_path[item.estimate.path.name] -= item.query.rows
        if not self.waiting:
            # Sums of floats drift; an empty queue is exactly empty.
            self.backlog_s = 0.0

    def occupy(self, batch: Batch) -> None:
        """``batch`` starts: its slots are taken."""
        self.free -= batch.path.threads
        assert self.free >= 0
        self.running[batch.number] = batch

    def release(self, batch: Batch) -> bool:
        """``batch`` ended: its slots are free; False if it does not run here."""
        if self.running.pop(batch.number, None) is None:
            return False
        self.free += batch.path.threads
        return True

    def free_times(self, now: float) -> list[float]:
        """When each slot should become free, ascending: ``slots`` times in seconds."""
        times = [now] * self.free
        for batch in self.running.values():
            end = max(batch.started + batch.expected_s, now + OVERDUE * batch.expected_s)
            times.extend([end] * batch.path.threads)
        times.sort()
        return times


def available(times: list[float], work_s: float, threads: int) -> float:
    """When ``threads`` slots are free behind ``work_s`` slot-seconds that fill up the earliest ones.

    ``times`` are :meth:`DeviceQueue.free_times`. The work is spread like water over the slots, as batches do
    roughly, whatever their number.
    """
    if work_s > 0:
        total, level = 0.0, times[0]
        for count, time in enumerate(times, start=1):
            total += time
            level = (total + work_s) / count
            if count == len(times) or level <= times[count]:
                break
        return max(level, times[threads - 1])
    return times[threads - 1]
