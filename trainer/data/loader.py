"""Batches of one rank: read, shuffled and made in the background, from any position in an epoch."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tightrec.trainer.data.batch import Batch, padding_batch
from tightrec.trainer.data.shards import (
    Order,
    Position,
    Segment,
    Topology,
    fingerprint,
    joined,
    left,
)
from tightrec.trainer.data.source import Source
from tightrec.trainer.data.stream import Stream


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How rows become batches."""

    batch_size: int = 2048
    """Rows per batch on each rank."""

    workers: int = 0
    """Processes per rank that read and make batches; 0: one thread of the training process."""

    prefetch: int = 4
    """Batches per rank that are made ahead of the training step (with workers: at least one each)."""

    shuffle: bool = True
    """Shuffle row groups, and rows within ``shuffle_groups`` of them, anew in every epoch."""

    shuffle_groups: int = 8
    """Row groups whose rows are shuffled together; each thread or worker holds so many in memory."""

    seed: int = 0
    """Seed of the shuffling."""

    def __post_init__(self) -> None:
        minimum = {"batch_size": 1, "workers": 0, "prefetch": 1, "shuffle_groups": 1, "seed": 0}
        for name, least in minimum.items():
            if getattr(self, name) < least:
                raise ValueError(f"loader.{name}={getattr(self, name)} must be at least {least}.")


class Loader:
    """One rank's view of a source; the same arguments but ``rank`` on every rank.

        loader = Loader(source, config, rank, world)
        position = loader.start(epoch=0)
        for batch in loader.iterate(position, steps): ...
        position = loader.advance(position, [steps] * world)

    A position that was saved with another number of ranks, workers or rows per batch is good too: the rows
    that were left then are dealt out anew, none twice and none lost. With the same numbers the very same
    batches follow.
    """

    def __init__(
        self, source: Source, config: LoaderConfig, rank: int, world: int, pin_memory: bool = False
    ) -> None:
        assert 0 <= rank < world, f"rank {rank} of {world}"
        self._source = source
        self._config = config
        self._rank = rank
        self._pin_memory = pin_memory
        self._topology = Topology(world=world, workers=max(1, config.workers), batch_size=config.batch_size)
        self._order = Order(
            seed=config.seed if config.shuffle else 0,
            shuffle=config.shuffle,
            shuffle_groups=config.shuffle_groups if config.shuffle else 1,
            data=fingerprint(source),
        )

    def start(self, epoch: int) -> Position:
        """The position before the first batch of an epoch."""
        return self._position(epoch, None)

    def batches(self, position: Position) -> int:
        """Number of batches that this rank has from ``position`` to the end of the epoch.

        Raises:
            ValueError: the position belongs to other data or another order.
        """
        position = self._taken_up(position)
        return self._phase_batches(position)[self._rank] - position.consumed[self._rank]

    def advance(self, position: Position, batches_per_rank: Sequence[int]) -> Position:
        """The position once every rank has taken so many more batches; padding batches count for nothing.

        Raises:
            ValueError: as :meth:`batches`.
        """
        position = self._taken_up(position)
        taken = zip(position.consumed, batches_per_rank, self._phase_batches(position), strict=True)
        return replace(position, consumed=tuple(min(before + more, most) for before, more, most in taken))

    def iterate(self, position: Position, steps: int | None = None) -> Iterator[Batch]:
        """This rank's batches from ``position`` on; threads and processes end with the iterator.

        Args:
            position: where to begin.
            steps: yield exactly so many batches, padding batches after the last real one; None: the real
                ones to the end of the epoch.

        Raises:
            ValueError: as :meth:`batches`, or the source's own words about bad data.
        """
        position = self._taken_up(position)
        real = self.batches(position)
        wanted = real if steps is None else steps
        return self._batches(self._streams(position), min(real, wanted), max(0, wanted - real))

    def _batches(self, streams: list[Stream], real: int, padding: int) -> Iterator[Batch]:
        if real:
            made = self._from_workers(streams) if self._config.workers else self._from_thread(streams[0])
            with closing(made):
                yield from islice(made, real)
        for _ in range(padding):
            batch = padding_batch(self._source.schema, self._config.batch_size)
            yield batch.pin_memory() if self._pin_memory else batch

    def _position(self, epoch: int, segments: tuple[Segment, ...] | None) -> Position:
        return Position(
            epoch=epoch,
            segments=segments,
            topology=self._topology,
            consumed=(0,) * self._topology.world,
            order=self._order,
        )

    def _taken_up(self, position: Position) -> Position:
        """The same place as a position of this loader's topology."""
        position.order.require_same(self._order)
        if position.topology == self._topology:
            return position
        rest = left(self._phase(position), position.topology, position.consumed)
        return self._position(position.epoch, tuple(joined(chain.from_iterable(rest.values()))))

    def _phase(self, position: Position) -> list[Segment]:
        if position.segments is not None:
            return list(position.segments)
        counts = self._source.row_counts
        chunks = self._order.chunks(counts, position.epoch)
        return [Segment(i, 0, sum(counts[group] for group in chunk)) for i, chunk in enumerate(chunks)]

    def _phase_batches(self, position: Position) -> list[int]:
        rows = sum(segment.rows for segment in self._phase(position))
        return [self._topology.rank_batches(rows, rank) for rank in range(self._topology.world)]

    def _streams(self, position: Position) -> list[Stream]:
        """This rank's streams, the one whose turn it is first."""
        rest = left(self._phase(position), position.topology, position.consumed)
        workers = self._topology.workers
        first = position.consumed[self._rank] % workers
        return [
            Stream(
                source=self._source,
                order=self._order,
                epoch=position.epoch,
                segments=rest[self._rank, (first + turn) % workers],
                batch_size=self._config.batch_size,
            )
            for turn in range(workers)
        ]

    def _from_thread(self, stream: Stream) -> Generator[Batch]:
        batches = iter(stream)

        def make() -> Batch | None:
            batch = next(batches, None)
            return batch.pin_memory() if batch is not None and self._pin_memory else batch

        # Pinning on a thread that has not chosen its GPU would open a context on the first one.
        device = torch.cuda.current_device() if self._pin_memory else None
        choose = partial(torch.cuda.set_device, device) if self._pin_memory else None
        with ThreadPoolExecutor(1, "tightrec-data", initializer=choose) as thread:
            ahead = deque(thread.submit(make) for _ in range(self._config.prefetch))
            try:
                while (batch := ahead.popleft().result()) is not None:
                    ahead.append(thread.submit(make))
                    yield batch
            finally:
                thread.shutdown(cancel_futures=True)

    def _from_workers(self, streams: list[Stream]) -> Generator[Batch]:
        # Not fork: the training process has threads (torch, gloo, CUDA) that a forked copy would lack.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        workers = len(streams)
        batches = DataLoader(
            _Streams(streams),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=-(-self._config.prefetch // workers),
            multiprocessing_context=context,
            worker_init_fn=_outlive_sigterm,
            pin_memory=self._pin_memory,
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


def _outlive_sigterm(_worker: int) -> None:
    # A cluster that ends a job signals all its processes; the rank still saves and needs its workers so
    # long. Workers end by themselves when the rank is gone.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
