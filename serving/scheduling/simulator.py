"""A discrete-event simulation of the server: the real scheduler, with durations drawn from profiles."""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from tightrec.serving.outcomes import Outcome, Summary, summarise
from tightrec.serving.paths import Device, PathSet, Profile, ServingPath
from tightrec.serving.scheduling.estimates import NORMAL_P99
from tightrec.serving.scheduling.scheduler import Batch, Query, Scheduler, SchedulerConfig

Busy = float
"""Share of the device's other slots that are busy when a batch starts: 0 to 1."""

DurationModel = Callable[[ServingPath, int, int, Busy], float]
"""Seconds of a batch: (path, rows, number of the batch, busy)."""

_NORMAL = NormalDist()


@dataclass(frozen=True, kw_only=True)
class ProfileDurations:
    """Durations drawn from the paths' profiles: lognormal through the median and the 99th percentile.

    A pure function of its arguments: the same batch number gives the same luck on every path.
    """

    seed: int = 0
    """Of the luck."""

    noise: bool = True
    """False: always the median."""

    contention: float = 0.0
    """How much longer a batch takes, as a share, if all other slots of its device are busy."""

    def __call__(self, path: ServingPath, rows: int, number: int, busy: Busy) -> float:
        """See :data:`DurationModel`."""
        median = path.profile.expected_ms(rows) / 1e3 * (1.0 + self.contention * busy)
        if not self.noise:
            return median
        tail = max(1.0, path.profile.expected_tail_ms(rows) / path.profile.expected_ms(rows))
        return median * math.exp(_deviate(self.seed, number) * math.log(tail) / NORMAL_P99)


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What a simulation gives."""

    outcomes: tuple[Outcome, ...]
    """Of every query, in the order given."""

    batches: int
    """That were started."""

    busy_s: dict[str, float]
    """Slot-seconds of work by device."""

    finished_s: float
    """When the last query had its answer."""

    def summary(self, paths: PathSet, duration_s: float) -> Summary:
        """The figures over ``duration_s`` seconds of load."""
        return summarise(self.outcomes, {path.name: path.accuracy for path in paths.paths}, duration_s)


def simulate(
    paths: PathSet,
    config: SchedulerConfig,
    queries: Iterable[Query],
    durations: DurationModel | None = None,
    *,
    overhead_s: float = 0.0,
) -> Simulated:
    """Run the scheduler on ``queries``, in the order of their arrival.

    Args:
        paths: which may be on recorded devices.
        config: of the scheduler.
        queries: numbers differ, ``arrived`` ascends.
        durations: true durations of batches; None: :class:`ProfileDurations` as they are.
        overhead_s: added to the latency of every query, such as for its way to the server and back; it
            occupies no slot, and the scheduler sees the query half of it after its arrival.

    Raises:
        ValueError: as :class:`Scheduler` does, or queries that are out of order.
    """
    model = durations or ProfileDurations()
    work = _Simulation(paths, config, model, list(queries), overhead_s)
    work.run()
    return Simulated(
        outcomes=tuple(work.outcome(query) for query in work.queries),
        batches=work.batches,
        busy_s=work.busy_s,
        finished_s=work.now,
    )


class _Simulation:
    def __init__(
        self,
        paths: PathSet,
        config: SchedulerConfig,
        model: DurationModel,
        queries: Sequence[Query],
        overhead_s: float,
    ) -> None:
        if any(a.arrived > b.arrived for a, b in itertools.pairwise(queries)):
            raise ValueError("queries must be given in the order of their arrival.")
        self.queries = queries
        self.now = 0.0
        self.batches = 0
        self.busy_s = {device.name: 0.0 for device in paths.devices}
        self._model = model
        self._slots = {device.name: device.slots for device in paths.devices}
        self._taken = dict.fromkeys(self._slots, 0)
        self._scheduler = Scheduler(paths, config, self._truth)
        self._half_s = overhead_s / 2
        self._ends: list[tuple[float, int]] = []
        self._running: dict[int, Batch] = {}
        self._finished: dict[int, tuple[float, str]] = {}
        self._shed: dict[int, str] = {}

    def run(self) -> None:
        """Until every query has its answer."""
        place, wake = 0, math.inf
        queries, scheduler = self.queries, self._scheduler
        while True:
            arrival = queries[place].arrived + self._half_s if place < len(queries) else math.inf
            end = self._ends[0][0] if self._ends else math.inf
            event = min(arrival, end, wake)
            if event == math.inf:
                break
            self.now = max(self.now, event)
            if end == event:
                self._finish(heapq.heappop(self._ends)[1])
            elif arrival == event:
                shed = scheduler.submit(queries[place], self.now)
                if shed is not None:
                    self._shed[shed.query.number] = shed.reason
                place += 1
            self._start()
            again = scheduler.wake_at(self.now)
            wake = math.inf if again is None else again
        assert not scheduler.waiting_queries

    def outcome(self, query: Query) -> Outcome:
        """What became of ``query``."""
        finished, path = self._finished.get(query.number, (None, None))
        shed = self._shed.get(query.number)
        return Outcome(query.rows, query.arrived, query.target_s, finished, path, shed)

    def _start(self) -> None:
        batches, sheds = self._scheduler.start(self.now)
        for batch in batches:
            path = batch.path
            took_s = self._model(path, batch.rows, batch.number, self._busy(path))
            self._taken[path.device] += path.threads
            self.busy_s[path.device] += took_s * path.threads
            self.batches += 1
            self._running[batch.number] = batch
            heapq.heappush(self._ends, (self.now + took_s, batch.number))
        for shed in sheds:
            self._shed[shed.query.number] = shed.reason

    def _finish(self, number: int) -> None:
        batch = self._running.pop(number)
        self._taken[batch.path.device] -= batch.path.threads
        for query in batch.queries:
            self._finished[query.number] = self.now + self._half_s, batch.path.name
        self._scheduler.finish(batch, self.now)

    def _truth(self, path: ServingPath, rows: int, number: int) -> float:
        return self._model(path, rows, number, self._busy(path))

    def _busy(self, path: ServingPath) -> Busy:
        others = self._slots[path.device] - path.threads
        return min(1.0, self._taken[path.device] / others) if others else 0.0


def scaled(
    paths: PathSet, device: str, *, speed: float, overhead_ms: float, source: str = "cpu", slots: int = 1
) -> PathSet:
    """A device that is assumed, not measured: the paths of ``source`` at ``speed`` times their pace.

    Of each snapshot the path with the fewest threads is taken. A batch takes ``overhead_ms`` plus the
    source's time without its own fixed part, divided by ``speed``: the fixed part is that of the smallest
    batch. The notes say so; qualities are the source's.

    Args:
        paths: must have paths on ``source``.
        device: name of the new device.
        speed: above 0.
        overhead_ms: of each batch, above 0.
        source: name of the device that was measured.
        slots: of the new device; its paths take one each.

    Returns:
        The new device alone; :func:`merged` puts it beside others.

    Raises:
        ValueError: nothing on ``source``, or numbers not above 0.
    """
    if not (speed > 0 and overhead_ms > 0 and math.isfinite(speed) and math.isfinite(overhead_ms)):
        raise ValueError(f"{device}: speed={speed} and overhead_ms={overhead_ms} must be above 0.")
    chosen: dict[tuple[str, object], ServingPath] = {}
    for path in paths.paths:
        key = path.snapshot, path.cache
        if path.device == source and (key not in chosen or path.threads < chosen[key].threads):
            chosen[key] = path
    if not chosen:
        raise ValueError(f"there is no path on {source} to derive {device} from.")
    note = f"derived from {source}: speed {speed:g}, overhead {overhead_ms:g} ms a batch"
    derived = [
        dataclasses.replace(
            path,
            name=f"{path.name}@{device}",
            device=device,
            threads=1,
            profile=_scaled_profile(path.profile, speed, overhead_ms),
            notes={"assumed": note},
        )
        for path in chosen.values()
    ]
    return PathSet(
        devices=(Device(name=device, slots=slots, recorded=True),),
        paths=tuple(derived),
        notes={"assumed": {device: note}},
    )


def merged(sets: Sequence[PathSet]) -> PathSet:
    """All devices and paths of ``sets`` together.

    Raises:
        ValueError: two devices, or two paths, have one name.
    """
    devices = [device for part in sets for device in part.devices]
    names = [device.name for device in devices]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two sets of paths have a device {twice[0]}. Give each device once.")
    assumed = {k: v for part in sets for k, v in part.notes.get("assumed", {}).items()}
    return PathSet(
        devices=tuple(devices),
        paths=tuple(path for part in sets for path in part.paths),
        notes={"assumed": assumed} if assumed else {},
    )


def _scaled_profile(profile: Profile, speed: float, overhead_ms: float) -> Profile:
    fixed = profile.latency_ms[0]
    latency = [overhead_ms + max(0.0, ms - fixed) / speed for ms in profile.latency_ms]
    tail = [
        new * max(1.0, tail / ms)
        for new, ms, tail in zip(latency, profile.latency_ms, profile.tail_ms, strict=True)
    ]
    return Profile(rows=profile.rows, latency_ms=tuple(latency), tail_ms=tuple(tail))


def _deviate(seed: int, number: int) -> float:
    """A standard normal number that depends on nothing but its arguments (mixed as SplitMix64 does)."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + (number + 1) * 0xBF58476D1CE4E5B9) & mask
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & mask
    z ^= z >> 31
    # 53 bits, and a half, so that it is never 0 or 1.
    return _NORMAL.inv_cdf(((z >> 11) + 0.5) / 2.0**53)
