"""Batches of one rank: read, shuffled and made in the background, from any position in an epoch."""

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tightrec.trainer.data.batch import Batch, padding_batch, to_batch
from tightrec.trainer.data.shards import (
    Order,
    Position,
    Segment,
    Topology,
    fingerprint,
    left_of_stream,
    remaining,
    whole_epoch,
)
from tightrec.trainer.data.source import Columns, Source, read_groups


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
        self._topology = Topology(
            world=world, workers=max(1, config.workers), batch_size=config.batch_size
        )
        self._order = Order(
            seed=config.seed,
            shuffle=config.shuffle,
            shuffle_groups=config.shuffle_groups if config.shuffle else 1,
            data=fingerprint(source),
        )

    def start(self, epoch: int) -> Position:
        """The position before the first batch of an epoch."""
        return Position(
            epoch=epoch,
            segments=None,
            topology=self._topology,
            consumed=(0,) * self._topology.world,
            order=self._order,
        )

    def batches(self, position: Position) -> int:
        """Number of batches that this rank has from ``position`` to the end of the epoch.

        Raises:
            ValueError: the position belongs to other data or another order.
        """
        position = self._taken_up(position)
        return self._total(position, self._rank) - position.consumed[self._rank]

    def advance(self, position: Position, batches_per_rank: Sequence[int]) -> Position:
        """The position after every rank has taken so many more batches; padding batches count for nothing."""
        position = self._taken_up(position)
        consumed = tuple(
            min(self._total(position, rank), before + more)
            for rank, (before, more) in enumerate(
                zip(position.consumed, batches_per_rank, strict=True)
            )
        )
        return replace(position, consumed=consumed)

    def iterate(self, position: Position, steps: int | None = None) -> Iterator[Batch]:
        """This rank's batches from ``position`` on.

        Threads and processes end with the iterator, also when it is closed early.

        Args:
            position: where to begin.
            steps: yield exactly so many batches, padding batches after the last real one; None: real ones
                only, to the end of the epoch.

        Raises:
            ValueError: as :meth:`batches`, or the source's own words about bad data.
        """
        position = self._taken_up(position)
        real = self.batches(position)
        wanted = real if steps is None else steps
        if min(real, wanted):
            made = self._from_workers(position) if self._config.workers else self._from_thread(position)
            for _ in range(min(real, wanted)):
                yield next(made)
            made.close()
        for _ in range(wanted - real):
            padding = padding_batch(self._source.schema, self._config.batch_size)
            yield padding.pin_memory() if self._pin_memory else padding
