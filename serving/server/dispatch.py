"""Between requests and workers: queries go to the scheduler, its batches to the pool, scores back.

All of it runs in the server's event loop.
"""

import asyncio
import itertools
import logging
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tightrec.serving.paths import ServingPath
from tightrec.serving.scheduling.scheduler import Batch, Query, Scheduler
from tightrec.serving.server.metrics import Metrics
from tightrec.serving.workers.pool import NoWorker, Scored, WorkerFailed, WorkerPool
from tightrec.snapshot.inputs import Batch as Rows

logger = logging.getLogger(__name__)

LEAST_PATIENCE_S = 0.05
"""How long a started batch waits at least for a worker, which a busy event loop may free a little late."""


class Refused(Exception):
    """A query is not scored; the text is the reason in a word, such as ``late``."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a query got."""

    scores: NDArray[np.float32]
    """[B], NaN where a row's score is not finite."""

    path: str
    """Which scored it."""

    step: int
    """Training step of its snapshot."""

    version: str
    """Of the model when its batch was started."""

    queue_ms: float
    """From arrival to the start of its batch."""

    compute_ms: float
    """Of its batch, in the worker."""


class Generation:
    """A pool of workers in service, and how many batches it has."""

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool
        self.version = str(max(pool.steps.values()))
        """The newest training step among its snapshots."""
        self._workers = len(pool.pids())
        self._batches = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> "Generation":
        self._batches += 1
        self._idle.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._batches -= 1
        if not self._batches:
            self._idle.set()

    @property
    def whole(self) -> bool:
        """Whether no worker is being replaced: each batch that the scheduler starts then has one at once."""
        return len(self.pool.pids()) >= self._workers

    async def idle(self) -> None:
        """Wait until it has no batch."""
        await self._idle.wait()


@dataclass(kw_only=True)
class _Waiting:
    query: Query
    rows: Rows
    answer: "asyncio.Future[Answer]"


class Dispatcher:
    """Scores queries.

    Args:
        scheduler: decides where and when.
        pool: where.
        metrics: counts.
    """

    def __init__(self, scheduler: Scheduler, pool: WorkerPool, metrics: Metrics) -> None:
        self.scheduler, self.metrics = scheduler, metrics
        self.current = Generation(pool)
        self._numbers = itertools.count()
        self._waiting: dict[int, _Waiting] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def score(self, rows: Rows, target_s: float, path: str | None, arrived: float) -> Answer:
        """Scores of checked rows, at least one.

        Args:
            target_s: latency target, from ``arrived`` on.
            path: that must be taken; None: the scheduler's choice.
            arrived: by time.monotonic().

        Raises:
            Refused: with the reason.
            WorkerFailed: the worker died or could not; the text says which.
        """
        query = Query(
            number=next(self._numbers), rows=len(rows), arrived=arrived, target_s=target_s, path=path
        )
        shed = self.scheduler.submit(query, time.monotonic())
        if shed is not None:
            raise Refused(shed.reason)
        answer = asyncio.get_running_loop().create_future()
        self._waiting[query.number] = _Waiting(query=query, rows=rows, answer=answer)
        try:
            self._advance()
            return await answer
        finally:
            # A client that has gone: its query goes too, if it still waits.
            if self._waiting.pop(query.number, None) is not None:
                self.scheduler.cancel(query.number)
                self._advance()

    def swap(self, pool: WorkerPool) -> Generation:
        """Batches from now on go to ``pool``; returns what was in service, which may still have batches."""
        before, self.current = self.current, Generation(pool)
        return before

    @property
    def busy(self) -> bool:
        """Whether queries wait or run."""
        return bool(self._waiting or self._tasks)

    async def close(self) -> None:
        """Refuse what waits, and end the pool."""
        if self._timer is not None:
            self._timer.cancel()
        for waiting in list(self._waiting.values()):
            if not waiting.answer.done():
                waiting.answer.set_exception(Refused("draining"))
        await self.current.pool.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _advance(self) -> None:
        """Start what can start, and look again when the scheduler says so."""
        now = time.monotonic()
        try:
            batches, shed = self.scheduler.start(now)
        except Exception as error:  # a mistake of this program: nobody waits for ever
            logger.exception("the scheduler")
            batches, shed = [], []
            for one in list(self._waiting.values()):
                if self.scheduler.cancel(one.query.number):
                    self._refuse([one], WorkerFailed(f"the scheduler failed ({type(error).__name__})."))
        for refused in shed:
            waiting = self._waiting.get(refused.query.number)
            if waiting is not None:
                _fail(waiting, Refused(refused.reason))
        for batch in batches:
            task = asyncio.create_task(self._run(batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wake = self.scheduler.wake_at(now)
        if wake is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(wake - time.monotonic(), 0.0), self._advance)

    async def _run(self, batch: Batch) -> None:
        # Whoever has gone between the start of the batch and now is left out.
        waiting = [self._waiting[query.number] for query in batch.queries if query.number in self._waiting]
        try:
            if waiting:
                await self._score(batch, waiting)
        except Exception as error:  # a mistake of this program: nobody waits for ever, no slot is lost
            logger.exception("batch %d", batch.number)
            self.scheduler.fail(batch, time.monotonic())
            self._refuse(waiting, WorkerFailed(f"the batch failed ({type(error).__name__})."))
        finally:
            # After a batch that was finished or has failed this does nothing.
            self.scheduler.drop(batch)
            self._advance()

    async def _score(self, batch: Batch, waiting: list[_Waiting]) -> None:
        deadline = min(one.query.deadline for one in waiting)
        patience_s = max(deadline - time.monotonic(), LEAST_PATIENCE_S)
        with self.current as generation:
            pool, whole = generation.pool, generation.whole
            path = batch.path if pool.can_run(batch.path) else self._stand_in(batch, pool)
            try:
                scored = await pool.score(path, [one.rows for one in waiting], patience_s)
            except (WorkerFailed, NoWorker) as error:
                if path is batch.path and (isinstance(error, WorkerFailed) or not pool.can_run(path)):
                    self.scheduler.fail(batch, time.monotonic())
                self._refuse(waiting, error)
                return
            now = time.monotonic()
            if path is batch.path:
                # While a worker is being replaced, batches may wait for another one of their path.
                self.scheduler.finish(batch, now, usual=whole)
            self._answer(batch, path.name, waiting, scored, now, generation)

    def _stand_in(self, batch: Batch, pool: WorkerPool) -> ServingPath:
        """A path that takes no more slots, while all workers of the batch's own are being replaced."""
        policy = self.scheduler.config.policy
        if policy.startswith("fixed:") or any(query.path is not None for query in batch.queries):
            return batch.path
        found = [
            path
            for path in self.scheduler.paths.paths
            if path.device == batch.path.device and path.threads <= batch.path.threads and pool.can_run(path)
        ]
        return min(found, key=lambda path: path.profile.expected_ms(batch.rows), default=batch.path)

    def _answer(
        self,
        batch: Batch,
        path: str,
        waiting: list[_Waiting],
        scored: Scored,
        now: float,
        generation: Generation,
    ) -> None:
        self.metrics.batch(path, scored.caches)
        for one, scores in zip(waiting, scored.scores, strict=True):
            query = one.query
            queue_s = batch.started - query.arrived
            if one.answer.done():
                continue
            self.metrics.served(path, query.rows, now - query.arrived, queue_s, query.target_s)
            one.answer.set_result(
                Answer(
                    scores=scores,
                    path=path,
                    step=generation.pool.steps[path],
                    version=generation.version,
                    queue_ms=queue_s * 1e3,
                    compute_ms=scored.compute_ms,
                )
            )

    def _refuse(self, waiting: list[_Waiting], error: Exception) -> None:
        for one in waiting:
            if isinstance(error, NoWorker):
                _fail(one, Refused("unavailable"))
            else:
                self.metrics.failed()
                _fail(one, WorkerFailed(str(error)))


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
