"""Which queries run where and when: admission, queues, batches, shedding. No clock and no input or output of
its own, so that the server and the simulator run the same code."""

import logging
import math
from collections.abc import Sequence

from tightrec.serving.paths import PathSet
from tightrec.serving.scheduling.budget import Budget, Reach
from tightrec.serving.scheduling.config import SchedulerConfig
from tightrec.serving.scheduling.estimates import CLIP, STALE_S, Durations, PathEstimate, Weather
from tightrec.serving.scheduling.options import Promises
from tightrec.serving.scheduling.policies import Option, cheapest, gain, make_policy
from tightrec.serving.scheduling.queues import MOVES, Batch, DeviceQueue, Losses, Query, Shed, Waiting

logger = logging.getLogger(__name__)

__all__ = ["Batch", "Query", "Scheduler", "SchedulerConfig", "Shed"]

BUDGET_TARGETS = 1.0
"""The budget holds what this many latency targets earn."""

TARGET_WEIGHT = 0.02
"""Of the newest query in the running mean of targets."""

LOOK = 16
"""Waiting queries that are looked at for an idle device, or to fill a gap before a held one."""


class Scheduler:
    """Gives queries to paths. Times are seconds of any one monotonic clock, and never go back.

    Call :meth:`start` after every :meth:`submit`, and whenever a batch ended, and at :meth:`wake_at`.
    Every query that was submitted comes back once: shed, in a batch, or cancelled.
    """

    def __init__(self, paths: PathSet, config: SchedulerConfig, durations: Durations | None = None) -> None:
        """``durations``: the true ones, for the policy ``oracle``, which needs them.

        Raises:
            ValueError: oracle without durations, or a fixed path that is not there.
        """
        oracle = self._oracle = config.policy == "oracle"
        if oracle and durations is None:
            raise ValueError("policy oracle knows the true durations, which only the simulator has.")
        self.paths = paths
        self.config = config
        self._policy = make_policy(paths, config)
        self._promises = Promises(config, self._policy)
        weather = {device.name: Weather() for device in paths.devices}
        self._estimates = {
            path.name: PathEstimate(
                path, path.quality(config.rank), durations if oracle else None, weather[path.device]
            )
            for path in paths.paths
        }
        self._queues: list[DeviceQueue] = []
        for device in paths.devices:
            on_it = [e for e in self._estimates.values() if e.path.device == device.name]
            if on_it:
                self._queues.append(
                    DeviceQueue(device, on_it, Budget(device.slots, config.headroom), Reach())
                )
        self._queue_of = {e.path.name: queue for queue in self._queues for e in queue.estimates}
        self._where: dict[int, tuple[DeviceQueue, Waiting]] = {}
        self._losses = Losses()
        self._batches = 0
        self._rows = dict.fromkeys(self._estimates, 0)
        self._target_s: float | None = None
        self._now = self._stale_at = -math.inf
        self.waiting_rows = 0
        """Rows that wait."""

    @property
    def waiting_queries(self) -> int:
        """Queries that wait."""
        return len(self._where)

    def shares(self) -> dict[str, int]:
        """Rows started on each path."""
        return dict(self._rows)

    def correction(self, name: str) -> float:
        """Observed over profiled duration of the path ``name``, running mean."""
        return self._estimates[name].expected_factor

    def submit(self, query: Query, now: float) -> Shed | None:
        """``query`` arrived: queue it, or refuse it at once.

        Raises:
            ValueError: no rows, its number waits already, or it asks for a path that is not there.
        """
        if query.rows < 1:
            raise ValueError(f"query {query.number} has {query.rows} rows; give at least 1.")
        if query.number in self._where:
            raise ValueError(f"a query with the number {query.number} waits already; give it another one.")
        only = query.path or self._policy.only()
        if only is not None and only not in self._estimates:
            self.paths.path(only)
        self._advance(now, query.target_s)
        for queue in self._queues:
            queue.reach.see(query.rows, now)
        if self._where and self.waiting_rows + query.rows > self.config.queue_rows:
            return Shed(query, "full")
        queues = [self._queue_of[only]] if only else self._queues
        options = self._promises.behind(queues, query, only, now)
        counted = self._policy.counted(options) if only is None else options
        in_time = [option for option in counted if option.finish <= query.deadline]
        if in_time:
            chosen = self._policy.choose(in_time)
        elif self.config.shed:
            self._blame(queues, query, options)
            return Shed(query, "late")
        else:
            chosen = min(options, key=lambda option: option.finish)
        least = min(option.estimate.planned_s(query.rows) for option in options)
        item = Waiting(
            query, query.deadline, chosen.estimate, chosen.cost_s, only, latest=query.deadline - least
        )
        self._put(chosen.queue, item)
        return None

    def start(self, now: float) -> tuple[list[Batch], list[Shed]]:
        """Start what can start now; also what is shed because it can no longer meet its target.

        What was started comes back even if a mistake of this program ends the rest of it, so that its slots
        are freed some day; a mistake that lasts is raised by the next call, which then starts nothing.
        """
        batches: list[Batch] = []
        sheds: list[Shed] = []
        try:
            self._start(now, batches, sheds)
        except Exception:
            if not (batches or sheds):
                raise
            logger.exception("%d batches were started, then the scheduler failed", len(batches))
        return batches, sheds

    def _start(self, now: float, batches: list[Batch], sheds: list[Shed]) -> None:
        self._advance(now)
        going = bool(self._where)
        while going:
            going = False
            for queue in self._queues:
                if queue.free and queue.waiting:
                    going |= self._serve(queue, now, batches, sheds)
            for queue in self._queues:
                if queue.free and not queue.waiting and self._where:
                    going |= self._attract(queue, now)
        while self.config.shed and (lost := self._losses.first()) is not None and lost.latest <= now:
            sheds.append(self._shed_late(self._where[lost.query.number][0], lost))

    def finish(self, batch: Batch, now: float, usual: bool = True) -> None:
        """``batch`` has its scores: its slots are free, its path's correction learns.

        Args:
            usual: whether it took as long as the path takes; False: it may have waited for something else, so
                the correction does not learn.
        """
        queue = self._queue_of[batch.path.name]
        if queue.release(batch):
            estimate = self._estimates[batch.path.name]
            took_s = max(0.0, now - batch.started)
            queue.budget.pay(batch.path.threads * (took_s - batch.expected_s))
            if usual:
                estimate.observe(batch.rows, took_s, now)
                self._refresh(now)
            estimate.rest.succeeded()
            self._note_rests(now)
            gained = queue.gains.pop(batch.number, None)
            if gained is not None:
                for query in batch.queries:
                    queue.reach.learn(query.rows * (gained if now <= query.deadline else -1.0))

    def fail(self, batch: Batch, now: float) -> None:
        """``batch`` ended without scores by a fault of its path: see :meth:`drop`; the path may have to rest.

        Other paths are taken then, unless a query must take this one, or all rest.
        """
        if self.drop(batch):
            self._estimates[batch.path.name].rest.failed(batch.started, now)
            self._note_rests(now)

    def drop(self, batch: Batch) -> bool:
        """``batch`` ended without scores: its slots are free, nothing is learnt; False: it had ended."""
        queue = self._queue_of[batch.path.name]
        queue.gains.pop(batch.number, None)
        return queue.release(batch)

    def cancel(self, number: int) -> bool:
        """Forget a query that waits; False: it does not wait."""
        found = self._where.get(number)
        if found is None:
            return False
        self._take(found[0], [found[1]])
        return True

    def wake_at(self, now: float) -> float | None:
        """When to call :meth:`start` although nothing happened: the next query has to be shed then."""
        lost = self._losses.first() if self.config.shed else None
        return None if lost is None else max(now, lost.latest)

    def _advance(self, now: float, target_s: float | None = None) -> None:
        if target_s is not None and 0 < target_s < math.inf:
            # Clients set it: one that asks for an hour must not fill the budget with an hour's compute.
            mean = self._target_s or target_s
            self._target_s = mean + TARGET_WEIGHT * (min(target_s, CLIP * mean) - mean)
        if now != self._now:
            self._now = now
            if now >= self._stale_at:
                self._refresh(now)
            self._note_rests(now)
            if self._target_s is not None:
                for queue in self._queues:
                    queue.budget.earn(now, BUDGET_TARGETS * self._target_s)

    def _refresh(self, now: float) -> None:
        for estimate in self._estimates.values():
            estimate.refresh(now, self._batches)
        self._stale_at = now if self._oracle else now + STALE_S

    def _note_rests(self, now: float) -> None:
        """Which paths rest now; none, if all would: rather one that may fail than nothing."""
        resting = [estimate for estimate in self._estimates.values() if estimate.rest.until > now]
        all_rest = len(resting) == len(self._estimates)
        for estimate in self._estimates.values():
            estimate.resting = not all_rest and estimate.rest.until > now

    # Queues

    def _blame(self, queues: Sequence[DeviceQueue], query: Query, options: Sequence[Option]) -> None:
        """``query`` is refused: batches on dearer paths lost its rows, if it could have been served."""
        if min(option.estimate.planned_s(query.rows) for option in options) <= query.target_s:
            for queue in queues:
                if queue.gains:
                    queue.reach.learn(-query.rows)

    def _put(self, queue: DeviceQueue, item: Waiting) -> None:
        queue.add(item)
        self._where[item.query.number] = queue, item
        self._losses.add(item)
        self.waiting_rows += item.query.rows

    def _take(self, queue: DeviceQueue, items: list[Waiting]) -> None:
        queue.remove(items)
        for item in items:
            del self._where[item.query.number]
            self._losses.remove(item)
            self.waiting_rows -= item.query.rows

    def _shed_late(self, queue: DeviceQueue, item: Waiting) -> Shed:
        self._take(queue, [item])
        return Shed(item.query, "late")

    def _move(self, queue: DeviceQueue, item: Waiting, to: Option) -> None:
        self._take(queue, [item])
        item.estimate, item.cost_s = to.estimate, to.cost_s
        item.moves += 1
        self._put(to.queue, item)

    # Starting

    def _serve(self, queue: DeviceQueue, now: float, batches: list[Batch], sheds: list[Shed]) -> bool:
        """Start, move or shed from the head of ``queue`` until its slots are taken; whether anything was."""
        progress = False
        while queue.free and queue.waiting:
            head = queue.waiting[0]
            options = self._promises.at_head(queue, head, now)
            in_time = [option for option in options if option.finish <= head.deadline]
            if not in_time:
                elsewhere = self._elsewhere(queue, head, now)
                if elsewhere is not None:
                    self._move(queue, head, elsewhere)
                    progress = True
                    continue
                if not options:
                    # Every path here rests, and no other device can: as in _note_rests.
                    options = self._promises.at_head(queue, head, now, resting=True)
                    in_time = [option for option in options if option.finish <= head.deadline]
            if not in_time:
                if self.config.shed:
                    sheds.append(self._shed_late(queue, head))
                    progress = True
                    continue
                in_time = [min(options, key=lambda option: option.finish)]
            if self._policy.spends:
                # The base of a batch is what can start now; waiting for slots never pays.
                chosen = cheapest([option for option in in_time if option.start <= now] or in_time)
            else:
                chosen = self._policy.choose(in_time)
            if chosen.start > now:
                return self._fill_gap(queue, chosen.start, now, batches) or progress
            items = self._grow(queue, head, chosen.estimate, now)
            estimate = self._upgrade(queue, items, chosen.estimate, now) if self._policy.spends else None
            batch = self._launch(queue, items, estimate or chosen.estimate, now)
            batches.append(batch)
            if estimate is not None:
                queue.gains[batch.number] = gain(estimate, chosen.estimate)
            progress = True
        return progress

    def _elsewhere(self, queue: DeviceQueue, item: Waiting, now: float) -> Option | None:
        """A path of another device on which ``item`` still ends in time."""
        if item.only is not None or item.moves >= MOVES:
            return None
        others = [other for other in self._queues if other is not queue]
        promised = self._promises.behind(others, item.query, None, now)
        found = [option for option in promised if option.finish <= item.deadline]
        return self._policy.choose(found) if found else None

    def _fill_gap(self, queue: DeviceQueue, until: float, now: float, batches: list[Batch]) -> bool:
        """The head waits for more slots: start others that end before it gets them."""
        progress = False
        for item in queue.waiting[1:LOOK]:
            fitting = [
                option
                for option in self._promises.at_head(queue, item, now)
                if option.start <= now and option.finish <= min(until, item.deadline)
            ]
            if fitting:
                chosen = self._policy.choose(fitting)
                batches.append(self._launch(queue, [item], chosen.estimate, now))
                progress = True
                if not queue.free:
                    break
        return progress

    def _grow(self, queue: DeviceQueue, head: Waiting, estimate: PathEstimate, now: float) -> list[Waiting]:
        """``head`` and what waits behind it, as far as ``head`` still ends in time on this path."""
        if not self.config.batching or len(queue.waiting) == 1:
            return [head]
        most = self._promises.most_rows(queue, head, estimate, now)
        items, rows = [head], head.query.rows
        name = estimate.path.name
        for item in queue.waiting[1:]:
            if rows >= most:
                break
            if rows + item.query.rows > most or item.only not in (None, name):
                continue
            if self._policy.joins(item, estimate):
                items.append(item)
                rows += item.query.rows
        return items

    def _upgrade(
        self, queue: DeviceQueue, items: list[Waiting], base: PathEstimate, now: float
    ) -> PathEstimate | None:
        """A more accurate path for the whole batch, out of the budget; None: there is none."""
        if len(items) < len(queue.waiting) and queue.free - base.threads < base.threads:
            # Others wait for this very slot.
            return None
        if any(item.only is not None for item in items):
            return None
        rows = sum(item.query.rows for item in items)
        head = items[0]
        left_s = min(head.deadline - now, queue.reach.share * head.query.target_s)
        best = None
        for estimate in queue.estimates:
            better = estimate.quality > (best or base).quality
            if not better or estimate.resting or estimate.threads > queue.free:
                continue
            if estimate.surely_s(rows, gain(estimate, base)) > left_s:
                continue
            if queue.budget.affords(estimate.threads * estimate.expected_s(rows)):
                best = estimate
        return best

    def _launch(self, queue: DeviceQueue, items: list[Waiting], estimate: PathEstimate, now: float) -> Batch:
        rows = sum(item.query.rows for item in items)
        batch = Batch(
            self._batches, estimate.path, tuple(i.query for i in items), now, estimate.expected_s(rows)
        )
        self._take(queue, items)
        queue.occupy(batch)
        queue.budget.pay(estimate.threads * batch.expected_s)
        self._rows[estimate.path.name] += rows
        self._batches += 1
        if self._oracle:
            self._refresh(now)
        return batch

    def _attract(self, queue: DeviceQueue, now: float) -> bool:
        """Fetch a waiting query of another device to this idle one; whether there was any."""
        for other in self._queues:
            for item in other.waiting[:LOOK]:
                if other is queue or item.only is not None or item.moves >= MOVES:
                    continue
                found = [
                    option
                    for option in self._promises.at_head(queue, item, now)
                    if option.start <= now
                    and option.finish <= item.deadline
                    and self._policy.moves(item, option.estimate)
                ]
                if found:
                    self._move(other, item, self._policy.choose(found))
                    return True
        return False
