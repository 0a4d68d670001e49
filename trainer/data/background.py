"""Making batches beside the training step: on a thread, or in worker processes."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver, resource_tracker

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tightrec.trainer.data.batch import Batch
from tightrec.trainer.data.stream import Stream


def from_thread(stream: Stream, prefetch: int, pin_memory: bool) -> Generator[Batch]:
    """The stream's batches, ``prefetch`` of them made ahead on a thread that ends with the generator."""
    batches = iter(stream)

    def make() -> Batch | None:
        batch = next(batches, None)
        return batch.pin_memory() if batch is not None and pin_memory else batch

    # Pinning on a thread that has not chosen its GPU would open a context on the first one.
    device = torch.cuda.current_device() if pin_memory else None
    choose = partial(torch.cuda.set_device, device) if pin_memory else None
    with ThreadPoolExecutor(1, "tightrec-data", initializer=choose) as thread:
        ahead = deque(thread.submit(make) for _ in range(prefetch))
        try:
            while (batch := ahead.popleft().result()) is not None:
                ahead.append(thread.submit(make))
                yield batch
        finally:
            thread.shutdown(cancel_futures=True)


def from_workers(streams: list[Stream], prefetch: int, pin_memory: bool) -> Generator[Batch]:
    """The streams' batches in turns, each stream read by a process of its own.

    Workers end with the generator, and within a second of this process however it dies; signals meant for
    the whole job do not end them.

    Args:
        prefetch: batches made ahead by all workers together, at least one by each.

    Raises:
        ValueError: what a worker's source said about bad data, in the same words.
    """
    # Not fork: the training process has threads (torch, gloo, CUDA) that a forked copy would lack.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    _start_forkserver()
    batches = DataLoader(
        _Streams(streams),
        batch_size=None,
        num_workers=len(streams),
        prefetch_factor=-(-prefetch // len(streams)),
        multiprocessing_context=context,
        worker_init_fn=_live_and_die_with_the_rank,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the global one advances
    )
    for batch in batches:
        if isinstance(batch, _BadData):
            raise ValueError(batch.words)
        yield batch


@dataclass(frozen=True)
class _BadData:
    """Crosses from a worker in place of a batch, because the DataLoader would wrap the error's words."""

    words: str


_OF_THE_JOB = {signal.SIGTERM, signal.SIGINT}
"""Signals that torchrun, clusters and a terminal's Ctrl-C send to every process of a job."""


class _Streams(IterableDataset):
    """In worker i, the i-th stream."""

    def __init__(self, streams: list[Stream]) -> None:
        self._streams = streams

    def __iter__(self) -> Iterator[Batch | _BadData]:
        worker = get_worker_info()
        try:
            yield from self._streams[worker.id]
        except ValueError as error:
            yield _BadData(str(error))


def _start_forkserver() -> None:
    """Start it with the whole job's signals blocked: the rank needs its workers, which are the server's
    children, until it has saved its state."""
    resource_tracker.ensure_running()  # this alone would unblock them again
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_JOB)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _live_and_die_with_the_rank(_worker: int) -> None:
    # Blocked before any thread starts, so that all of the worker's threads have it blocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_JOB)
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    """End this worker when its rank is gone, or sends it SIGTERM itself; nobody else's counts.

    The DataLoader's own watchdog looks at the parent process, which is the fork server.
    """
    rank = multiprocessing.parent_process()
    assert rank is not None
    while rank.is_alive():
        told = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if told and told.si_pid == rank.pid:
            break
    os._exit(0)
