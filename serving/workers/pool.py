"""The processes that score: floor(slots / threads) of them for each thread count that paths of a device use.

Processes, since a thread count holds for a whole process, and since a crash in one leaves the others alone.
Every process holds all snapshots of the paths it may run. One that dies fails its batch by name and is
replaced.
"""

import asyncio
import dataclasses
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tightrec.serving.paths import PathSet, ServingPath
from tightrec.serving.workers.wire import Scores
from tightrec.serving.workers.worker import Scored, Worker, WorkerFailed, WorkerNotStarted
from tightrec.snapshot.inputs import Batch

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
"""Between attempts to replace a worker: doubled from the first to the longest."""


class NoWorker(Exception):
    """No worker of a path became free in time; the text is a sentence."""


@dataclass(kw_only=True)
class _Group:
    """Workers of one device and thread count, all with the same paths."""

    device: str
    threads: int
    paths: tuple[ServingPath, ...]
    size: int
    workers: list[Worker | None] = field(default_factory=list)
    idle: "asyncio.Queue[Worker | None]" = field(default_factory=asyncio.Queue)

    def alive(self) -> int:
        return sum(worker is not None and worker.alive for worker in self.workers)


class WorkerPool:
    """Worker processes for a set of paths.

    Args:
        cache_folder: where the files of caches stand whose names are relative; None: here.
        background: load at the lowest priority and one worker after the other, so that workers of another
            pool go on undisturbed.
        start_timeout_s: for a worker to load.
        batch_timeout_s: for a batch; a worker that takes longer is replaced.
    """

    def __init__(
        self,
        *,
        cache_folder: Path | None = None,
        background: bool = False,
        start_timeout_s: float = 600.0,
        batch_timeout_s: float = 60.0,
    ) -> None:
        self._cache_folder, self._background = cache_folder, background
        self._start_timeout_s, self._batch_timeout_s = start_timeout_s, batch_timeout_s
        self._groups: dict[tuple[str, int], _Group] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._running: set[asyncio.Task[Scored]] = set()
        self._places: dict[str, tuple[_Group, int]] = {}
        self._closing = False
        self.steps: dict[str, int] = {}
        """Training step of every path's snapshot, as loaded."""
        self.restarts = 0
        """Workers that were replaced, or for which that was tried."""

    async def start(self, paths: PathSet, *, cores: int | None = None) -> None:
        """Start the workers; returns when all can score.

        Args:
            paths: to be run; snapshots as absolute folders or links.
            cores: slots of the device ``cpu`` in place of those that ``paths`` says.

        Raises:
            ValueError: a recorded device, or a worker that cannot load its paths; says why. No process is
                left.
        """
        self._groups = groups_of(paths, cores)
        for group in self._groups.values():
            group.workers = [None] * group.size
            for place, path in enumerate(group.paths):
                self._places[path.name] = (group, place)
        places = [(group, index) for group in self._groups.values() for index in range(group.size)]
        try:
            if self._background:
                for group, index in places:
                    await self._launch(group, index)
            else:
                async with asyncio.TaskGroup() as tasks:
                    for group, index in places:
                        tasks.create_task(self._launch(group, index))
        except BaseExceptionGroup as errors:
            await self.close()
            raise errors.exceptions[0] from None
        except BaseException:
            await self.close()
            raise
        self._background = True
        self._keepers = [asyncio.create_task(self._keep(group, index)) for group, index in places]

    async def run(self, path: ServingPath, queries: Sequence[Batch]) -> list[Scores]:
        """Scores float32 [B] of each query, computed as one batch on ``path``.

        Raises:
            WorkerFailed: the worker died, hung or could not; the text says which.
        """
        return (await self.score(path, queries)).scores

    async def score(
        self, path: ServingPath, queries: Sequence[Batch], patience_s: float | None = None
    ) -> Scored:
        """The same, with what else is known.

        Args:
            path: by its name.
            queries: what :meth:`tightrec.snapshot.inputs.Inputs.convert` gave, on the host.
            patience_s: for a worker to become free; None: as long as it takes.

        Raises:
            NoWorker: none became free in time, or the pool is being closed.
            WorkerFailed: see :meth:`run`.
        """
        group, place = self._places[path.name]
        worker = await self._idle(group, path, patience_s)
        # The exchange goes on if the caller is cancelled: a worker's answer must be taken from its socket.
        task = asyncio.create_task(self._exchange(group, worker, place, queries))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    def can_run(self, path: ServingPath) -> bool:
        """Whether a worker of ``path`` is alive."""
        return self._places[path.name][0].alive() > 0

    @property
    def ready(self) -> bool:
        """Whether any worker is alive."""
        return any(group.alive() for group in self._groups.values())

    def pids(self) -> list[int]:
        """Process ids of the workers that are alive."""
        return [worker.pid for worker in self._workers() if worker.alive]

    def busy(self) -> dict[str, int]:
        """Slots of each device that are computing now."""
        found = dict.fromkeys((group.device for group in self._groups.values()), 0)
        for group in self._groups.values():
            computing = max(group.alive() - group.idle.qsize(), 0)
            found[group.device] += computing * group.threads
        return found

    async def close(self) -> None:
        """End all workers; batches that they have fail."""
        self._closing = True
        for group in self._groups.values():
            group.idle.put_nowait(None)
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(worker.end() for worker in self._workers()))
        await asyncio.gather(*self._running, return_exceptions=True)

    def _workers(self) -> Iterable[Worker]:
        return [worker for group in self._groups.values() for worker in group.workers if worker is not None]

    async def _idle(self, group: _Group, path: ServingPath, patience_s: float | None) -> Worker:
        try:
            async with asyncio.timeout(patience_s):
                while not self._closing:
                    worker = await group.idle.get()
                    if worker is None:
                        group.idle.put_nowait(None)  # for the next one who waits
                        break
                    if worker.alive:
                        return worker
        except TimeoutError:
            pass
        raise NoWorker(f"no worker of path {path.name} became free in time.")

    async def _exchange(self, group: _Group, worker: Worker, place: int, queries: Sequence[Batch]) -> Scored:
        try:
            return await worker.score(place, queries, self._batch_timeout_s)
        finally:
            if worker.alive:
                group.idle.put_nowait(worker)

    async def _launch(self, group: _Group, index: int) -> None:
        name = f"{group.device}-{group.threads}-{index}"
        values = {
            "paths": [_start_values(path, self._cache_folder) for path in group.paths],
            "device": group.device,
            "threads": group.threads,
            "background": self._background,
            # A worker that is replaced may hold an older snapshot than another pool, whose caches are newer.
            "keep_caches": not self._keepers,
        }
        worker = await Worker.start(name, values, self._start_timeout_s)
        group.workers[index] = worker
        self.steps.update(worker.steps)
        group.idle.put_nowait(worker)

    async def _keep(self, group: _Group, index: int) -> None:
        """Replace a worker whenever it ends."""
        pause = FIRST_PAUSE_S
        while True:
            worker = group.workers[index]
            if worker is not None:
                status = await worker.process.wait()
                await worker.end()
                logger.warning("worker %s ended (exit status %s) and is replaced.", worker.name, status)
                group.workers[index] = None
            await asyncio.sleep(pause)
            self.restarts += 1
            try:
                await self._launch(group, index)
                pause = FIRST_PAUSE_S
            except Exception as error:  # whatever it is: nobody else would try again
                pause = min(2 * pause, LONGEST_PAUSE_S)
                told = error if isinstance(error, WorkerNotStarted | OSError) else repr(error)
                logger.warning("%s The next attempt is in %g s.", told, pause)


def groups_of(paths: PathSet, cores: int | None = None) -> dict[tuple[str, int], _Group]:
    """The workers that a set of paths needs, by device and threads.

    Raises:
        ValueError: a device is recorded, or has fewer slots than a path takes.
    """
    groups: dict[tuple[str, int], _Group] = {}
    for path in paths.paths:
        device = paths.device(path.device)
        if device.recorded:
            raise ValueError(
                f"path {path.name} is on {device.name}, whose profiles were recorded elsewhere: it can be "
                "simulated, not run. Give paths that were measured on this machine."
            )
        slots = cores if cores is not None and device.name == "cpu" else device.slots
        size = slots // path.threads
        if not size:
            raise ValueError(f"path {path.name} takes {path.threads} threads, but there are {slots} cores.")
        key = (device.name, path.threads)
        before = groups[key].paths if key in groups else ()
        groups[key] = _Group(device=device.name, threads=path.threads, paths=(*before, path), size=size)
    return groups


def _start_values(path: ServingPath, cache_folder: Path | None) -> dict[str, Any]:
    return {
        "name": path.name,
        "snapshot": path.snapshot,
        "cache": dataclasses.asdict(path.cache),
        "cache_file": str((cache_folder or Path()) / path.cache_file) if path.cache_file else None,
    }


__all__ = ["NoWorker", "Scored", "WorkerFailed", "WorkerNotStarted", "WorkerPool", "groups_of"]
