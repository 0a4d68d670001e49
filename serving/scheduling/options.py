"""What the paths of a device promise to a query: when it could start, when it would end, what it costs."""

import math
from collections.abc import Iterable

from tightrec.serving.scheduling.config import SchedulerConfig
from tightrec.serving.scheduling.estimates import PathEstimate
from tightrec.serving.scheduling.policies import Option, Policy
from tightrec.serving.scheduling.queues import DeviceQueue, Query, Waiting, available

BATCH_SHARE = 0.5
"""A batch is planned to last at most this share of the target: what arrives meanwhile then has as much left,
and batches do not shrink however much waits (as Nexus sizes them, SOSP 2019)."""


class Promises:
    """Estimates of the scheduler, from the state of its queues; changes nothing."""

    def __init__(self, config: SchedulerConfig, policy: Policy) -> None:
        self._config = config
        self._policy = policy

    def behind(
        self, queues: Iterable[DeviceQueue], query: Query, only: str | None, now: float
    ) -> list[Option]:
        """What each path promises to ``query`` behind what waits, merged with the end of it; see at_head."""
        return [option for queue in queues for option in self._behind(queue, query, only, now)]

    def at_head(self, queue: DeviceQueue, item: Waiting, now: float, resting: bool = False) -> list[Option]:
        """What each path of ``queue`` promises to ``item``, if it is the next to start.

        None does that rests, unless ``item`` must take it, or ``resting``.
        """
        times = queue.free_times(now)
        rows, target_s = item.query.rows, item.query.target_s
        options = []
        for estimate in queue.estimates:
            if resting or _may_take(estimate, item.only):
                start = times[estimate.threads - 1]
                # Where nobody else waits for the slots, a query that is late half the time loses nothing.
                alone = start <= now and len(queue.waiting) <= 1
                finish = start + (estimate.expected_s(rows) if alone else estimate.planned_s(rows))
                usual = self._usual_rows(estimate, rows, target_s)
                cost_s = estimate.threads * estimate.expected_s(usual) * rows / usual
                options.append(Option(estimate, queue, start, finish, cost_s))
        return options

    def most_rows(self, queue: DeviceQueue, head: Waiting, estimate: PathEstimate, now: float) -> int:
        """Rows of a batch that starts now with ``head``, so that ``head`` ends in time."""
        within_s = BATCH_SHARE * head.query.target_s
        left_s = head.deadline - now
        if left_s >= estimate.planned_s(head.query.rows):
            within_s = min(within_s, left_s)
        most = min(self._config.batch_rows, estimate.rows_within(within_s))
        # Free slots share what waits: two batches side by side end sooner than one.
        groups = max(1, queue.free // estimate.threads)
        return min(most, max(head.query.rows, math.ceil(queue.rows / groups)))

    def _usual_rows(self, estimate: PathEstimate, rows: int, target_s: float) -> int:
        """Rows of a full batch on this path, or ``rows`` of a query that fills more than one."""
        if not self._config.batching:
            return rows
        full = estimate.rows_within(BATCH_SHARE * target_s)
        return max(rows, min(self._config.batch_rows, full))

    def _behind(self, queue: DeviceQueue, query: Query, only: str | None, now: float) -> list[Option]:
        times = queue.free_times(now)
        backlog_s = queue.backlog_s
        for item in reversed(queue.waiting):
            if item.deadline <= query.deadline:
                break
            backlog_s -= item.cost_s
        merges = self._config.batching and bool(queue.waiting)
        options = []
        for estimate in queue.estimates:
            name = estimate.path.name
            if not _may_take(estimate, only):
                continue
            usual = self._usual_rows(estimate, query.rows, query.target_s)
            row_s = estimate.threads * estimate.expected_s(usual) / usual
            rows, ahead_s, crowded = query.rows, backlog_s, False
            if merges:
                same = queue.rows if self._policy.spends else queue.rows_by_path.get(name, 0)
                last = same % usual
                if last + rows <= usual:
                    rows += last
                    ahead_s -= last * row_s
                    crowded = same > last
                else:
                    crowded = same > 0
            start = available(times, ahead_s, estimate.threads)
            alone = start <= now and not queue.waiting
            lasts_s = estimate.expected_s(rows) if alone else estimate.planned_s(rows)
            if crowded:
                # As long as a full batch may be: to count on less would let the queue grow until nothing but
                # small batches, which waste compute, could still end in time.
                lasts_s = max(estimate.planned_s(usual), BATCH_SHARE * query.target_s)
            finish = start + lasts_s
            options.append(Option(estimate, queue, start, finish, row_s * query.rows))
        return options


def _may_take(estimate: PathEstimate, only: str | None) -> bool:
    return not estimate.resting if only is None else estimate.path.name == only
