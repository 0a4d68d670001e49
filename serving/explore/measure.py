"""How long batches take on a path, measured through the worker processes that serve it.

One path at a time, in one worker, with nothing else under way; every batch holds other rows, so that caches
see what they will see in service.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tightrec.formats.columns import Columns
from tightrec.serving.loops import new_event_loop
from tightrec.serving.paths import Device, PathSet, Profile, ServingPath
from tightrec.snapshot.inputs import Batch
from tightrec.snapshot.rows import feature_major

WARM_UP = 3
"""Batches of each size that are not timed."""

Score = Callable[[Batch], Awaitable[object]]
"""Scores one batch."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured."""

    rows: Sequence[int]
    """Batch sizes."""

    repeats: int
    """Batches of each size, at most."""

    least_repeats: int
    """At least."""

    seconds: float
    """Of each size; no batch is begun after them, once there are ``least_repeats``."""


class RowStream:
    """Batches of held-out rows, in a random order that starts anew when all rows have been taken.

    Args:
        columns: [n] rows, n at least 1.
        seed: of the order.
    """

    def __init__(self, columns: Columns, seed: int) -> None:
        self._columns = columns
        self._generator = np.random.default_rng(seed)
        self._order = np.empty(0, np.int64)

    def next(self, rows: int) -> Batch:
        """The next ``rows`` rows; none comes twice before all have come, or ``rows`` exceed them."""
        while len(self._order) < rows:
            more = self._generator.permutation(len(self._columns))
            self._order = np.concatenate((self._order, more))
        chosen, self._order = self._order[:rows], self._order[rows:]
        taken = feature_major(self._columns.take(chosen))
        return Batch(dense=taken.dense, ids=taken.ids, offsets=taken.offsets, of_torch=False)


async def time_batches(
    score: Score, rows: RowStream, effort: Effort, clock: Callable[[], float] = time.perf_counter
) -> tuple[Profile, dict[int, int]]:
    """The profile, and how many batches of each size it comes from.

    Sizes take turns, so that a slow minute of the machine falls on all of them.
    """
    sizes = sorted(effort.rows)
    for size in sizes:
        for _ in range(WARM_UP):
            await score(rows.next(size))
    taken: dict[int, list[float]] = {size: [] for size in sizes}
    waiting = list(sizes)
    while waiting:
        for size in list(waiting):
            batch = rows.next(size)
            began = clock()
            await score(batch)
            times = taken[size]
            times.append(clock() - began)
            enough = len(times) >= effort.least_repeats and math.fsum(times) >= effort.seconds
            if enough or len(times) >= effort.repeats:
                waiting.remove(size)
    profile = Profile(
        rows=tuple(sizes),
        latency_ms=tuple(1e3 * float(np.median(taken[size])) for size in sizes),
        tail_ms=tuple(1e3 * float(np.quantile(taken[size], 0.99)) for size in sizes),
    )
    return profile, {size: len(times) for size, times in taken.items()}


def measure(
    path: ServingPath, rows: RowStream, effort: Effort, *, warm_rows: int, timeout_s: float
) -> tuple[Profile, dict[int, int]]:
    """The profile of ``path``, from one new worker process, and the batches of each size.

    Args:
        path: its own profile is not looked at; ``snapshot`` and ``cache_file`` must be absolute.
        rows: what the batches hold.
        effort: how many.
        warm_rows: to be scored before, in the largest batches, so that caches are filled; 0: none.
        timeout_s: for all of it.

    Raises:
        ValueError: the worker cannot load the path.
        ChildProcessError: it died or could not score a batch.
        TimeoutError: it took longer than ``timeout_s``.
    """
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_measure(path, rows, effort, warm_rows, timeout_s))


async def _measure(
    path: ServingPath, rows: RowStream, effort: Effort, warm_rows: int, timeout_s: float
) -> tuple[Profile, dict[int, int]]:
    from tightrec.serving.workers.pool import WorkerFailed, WorkerPool

    pool = WorkerPool(
        cache_folder=Path(path.cache_file).parent if path.cache_file else None, start_timeout_s=timeout_s
    )

    async def score(batch: Batch) -> None:
        await pool.run(path, [batch])

    try:
        async with asyncio.timeout(timeout_s):
            alone = Device(name=path.device, slots=path.threads)
            await pool.start(PathSet(devices=(alone,), paths=(path,)))
            largest = max(effort.rows)
            for _ in range(0, warm_rows, largest):
                await score(rows.next(largest))
            return await time_batches(score, rows, effort)
    except TimeoutError:
        raise TimeoutError(f"measuring path {path.name} took over {timeout_s:g} s.") from None
    except WorkerFailed as error:
        raise ChildProcessError(f"path {path.name}: {error}") from None
    finally:
        await pool.close()
