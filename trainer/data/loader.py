"""Batches of one rank: read, shuffled and made in the background, from any position in an epoch."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice

from tightrec.formats.columns import Source
from tightrec.trainer.data.background import from_thread, from_workers
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

    Args:
        dedup: batches hold each feature's distinct bags only, padding batches too. It is done where batches
            are made, in the worker processes or the thread; positions do not depend on it.
    """

    def __init__(
        self,
        source: Source,
        config: LoaderConfig,
        rank: int,
        world: int,
        pin_memory: bool = False,
        *,
        dedup: bool = False,
    ) -> None:
        assert 0 <= rank < world, f"rank {rank} of {world}"
        self._source = source
        self._config = config
        self._rank = rank
        self._pin_memory = pin_memory
        self._dedup = dedup
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

    def iterate(self, position: Position, steps: int | None = None) -> Generator[Batch]:
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

    def _batches(self, streams: list[Stream], real: int, padding: int) -> Generator[Batch]:
        if real:
            prefetch, pin_memory = self._config.prefetch, self._pin_memory
            if self._config.workers:
                made = from_workers(streams, prefetch, pin_memory)
            else:
                made = from_thread(streams[0], prefetch, pin_memory)
            with closing(made):
                yield from islice(made, real)
        for _ in range(padding):
            batch = padding_batch(self._source.schema, self._config.batch_size, dedup=self._dedup)
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
                dedup=self._dedup,
            )
            for turn in range(workers)
        ]
