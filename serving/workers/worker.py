"""One worker process as its parent sees it."""

import asyncio
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tightrec.serving.workers.wire import LENGTH, Buffer, Scores, batch_message, json_message, read_scores
from tightrec.snapshot.inputs import Batch

MOST_FAULTS = 3
"""Batches in a row that a worker fails, not for what they hold, until it is replaced: the errors of a broken
CUDA context, for one, never end."""

_BUFFER_BYTES = 1 << 20


class WorkerFailed(Exception):
    """A batch has no scores: its worker died, hung or could not compute it; the text is a sentence."""


class WorkerNotStarted(ValueError):
    """A worker could not load its paths; the text says why.

    Args:
        text: a sentence.
        lasting: whether its paths are to blame, so that another attempt would fail too.
    """

    def __init__(self, text: str, lasting: bool = False) -> None:
        super().__init__(text)
        self.lasting = lasting


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A batch's scores."""

    scores: list[Scores]
    """A query: float32 [B], NaN where a row's score is not finite."""

    compute_ms: float
    """In the worker."""

    caches: dict[str, Any] = field(default_factory=dict)
    """What the path's caches counted: ``{level: [hits, misses]}``."""


class Worker:
    """A running process; made by :meth:`start`. One batch at a time.

    Args:
        name: for messages.
        process: started by :meth:`start`.
        reader: of its socket.
        writer: of its socket.
    """

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.name, self.process = name, process
        self._reader, self._writer = reader, writer
        self._killed = False
        self._faults = 0
        self.steps: dict[str, int] = {}

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether it can be given a batch."""
        return not self._killed and self.process.returncode is None

    @classmethod
    async def start(cls, name: str, values: Mapping[str, Any], timeout_s: float) -> "Worker":
        """Start a process and wait until it can score.

        Args:
            name: for messages.
            values: ``paths``, ``device``, ``threads``, ``background``, ``keep_caches``; see
                :mod:`tightrec.serving.workers.process`.
            timeout_s: after which it is killed.

        Raises:
            WorkerNotStarted: says why.
            OSError: the system has no process or file left for it.
        """
        ours, theirs = socket.socketpair()
        process: asyncio.subprocess.Process | None = None
        worker: Worker | None = None
        try:
            with theirs:
                starting = asyncio.ensure_future(_process(theirs.fileno(), values["threads"]))
                # A start that is broken off would leave a process that nobody waits for.
                cancelled = await _done(starting)
                if cancelled is None or not (starting.cancelled() or starting.exception()):
                    process = starting.result()
            if cancelled is not None:
                raise cancelled
            assert process is not None
            reader, writer = await asyncio.open_connection(sock=ours, limit=_BUFFER_BYTES)
            worker = cls(name, process, reader, writer)
            await worker._load(values, timeout_s)
        except BaseException:
            if worker is not None:
                await worker.end()
            else:
                ours.close()
                if process is not None:
                    await _end(process)
            raise
        return worker

    async def score(self, path: int, queries: Sequence[Batch], timeout_s: float) -> Scored:
        """Scores of one batch on path number ``path``.

        Raises:
            WorkerFailed: it died, took longer than ``timeout_s`` (and is killed), or says why it cannot.
        """
        try:
            async with asyncio.timeout(timeout_s):
                pieces = batch_message(path, queries)
                self._writer.writelines(pieces)
                await self._writer.drain()
                scores, compute_ns, said = read_scores(await self._message())
        except TimeoutError:
            self.kill()
            raise WorkerFailed(
                f"worker {self.name} took more than {timeout_s:g} s over a batch and is replaced."
            ) from None
        except (OSError, EOFError):
            self.kill()
            raise WorkerFailed(f"worker {self.name} died while it scored a batch and is replaced.") from None
        except BaseException:
            # Part of a message may be on its way: nothing else could be told from it.
            self.kill()
            raise
        if "error" in said:
            self._faults += said["fault"]
            replaced = self._faults >= MOST_FAULTS
            if replaced:
                self.kill()
            raise WorkerFailed(
                f"worker {self.name} could not score a batch ({said['error']})"
                f"{' and is replaced' if replaced else ''}."
            )
        self._faults = 0
        return Scored(scores=_split(scores, queries), compute_ms=compute_ns / 1e6, caches=said)

    def kill(self) -> None:
        """End it at once."""
        self._killed = True
        if self.process.returncode is None:
            self.process.kill()

    async def end(self) -> None:
        """End it and wait until it is gone."""
        self._killed = True
        self._writer.close()
        await _end(self.process)

    async def _load(self, values: Mapping[str, Any], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(json_message(values))
                said = json.loads(bytes(await self._message()))
        except TimeoutError:
            raise WorkerNotStarted(f"worker {self.name} did not load within {timeout_s:g} s.") from None
        except (OSError, EOFError):
            status = await self.process.wait()
            how = f"by signal {-status}; is memory short?" if status < 0 else f"with exit status {status}"
            raise WorkerNotStarted(f"worker {self.name} ended while it loaded, {how}.") from None
        if "error" in said:
            raise WorkerNotStarted(
                f"worker {self.name} cannot load its paths: {said['error']}", lasting=not said["fault"]
            )
        self.steps = said["steps"]

    async def _message(self) -> Buffer:
        (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
        return await self._reader.readexactly(size)


def _split(scores: Scores, queries: Sequence[Batch]) -> list[Scores]:
    found, place = [], 0
    for query in queries:
        found.append(scores[place : place + len(query)])
        place += len(query)
    return found


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill ``process`` and wait for it, even if the caller is cancelled meanwhile: it takes no time."""
    if process.returncode is None:
        process.kill()
    cancelled = await _done(asyncio.ensure_future(process.wait()))
    if cancelled is not None:
        raise cancelled


async def _done(task: "asyncio.Future[Any]") -> asyncio.CancelledError | None:
    """Wait until ``task`` has ended, even if the caller is cancelled meanwhile, which is returned."""
    cancelled = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


async def _process(file: int, threads: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tightrec.serving.workers.process",
        str(file),
        pass_fds=[file],
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        env=_environment(threads),
        # Ctrl-C in the terminal is for the parent, which answers what is in flight first.
        start_new_session=True,
    )


def _environment(threads: int) -> dict[str, str]:
    # Idle threads of one worker must leave their cores to other workers instead of spinning.
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
