"""How the rows of an epoch are shared, and where everybody stands in them.

An epoch shuffles on two levels: the list of row groups is permuted and cut into *chunks* of a few groups,
and the rows of a chunk are permuted together. Chunks depend on seed and epoch alone, never on the number of
ranks: a *segment*, rows start to stop of a chunk in shuffled order, means the same rows to everybody.

A *phase* deals segments to streams, one per (rank, worker). It begins with an epoch, and again wherever a
checkpoint is taken up by another number of ranks, workers or rows per batch, with exactly the rows that were
left. Rank r's batch k comes from its worker k modulo the number of workers.
"""

import dataclasses
import hashlib
import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tightrec.formats.columns import Ids, Source
from tightrec.formats.settings import from_mapping

_GROUPS, _ROWS = 0, 1  # purposes of generators


class Segment(NamedTuple):
    """Rows ``start`` to ``stop`` of a chunk, in its shuffled order."""

    chunk: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Who reads."""

    world: int
    """Ranks."""

    workers: int
    """Streams of each rank, at least 1."""

    batch_size: int
    """Rows per batch and rank."""

    def rank_rows(self, rows: int, rank: int) -> int:
        """Rank ``rank``'s share of ``rows``; shares differ by at most one row."""
        return rows // self.world + (rank < rows % self.world)

    def rank_batches(self, rows: int, rank: int) -> int:
        """Batches in that share, the last one perhaps short."""
        return -(-self.rank_rows(rows, rank) // self.batch_size)

    def stream_rows(self, rows: int, rank: int, worker: int) -> int:
        """Rows of one worker's batches: every ``workers``-th batch of its rank."""
        batches = self.rank_batches(rows, rank)
        mine = len(range(worker, batches, self.workers))
        last_is_mine = batches > 0 and (batches - 1) % self.workers == worker
        padding = batches * self.batch_size - self.rank_rows(rows, rank)
        return mine * self.batch_size - (padding if last_is_mine else 0)

    def streams(self) -> list[tuple[int, int]]:
        """All (rank, worker), ranks varying fastest."""
        return [(rank, worker) for worker in range(self.workers) for rank in range(self.world)]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What decides the order of rows; a position means nothing in another order."""

    seed: int
    """Seed of both levels of shuffling."""

    shuffle: bool
    """False: row groups and rows in the order of the data."""

    shuffle_groups: int
    """Row groups per chunk; 1 where nothing is shuffled."""

    data: str
    """Fingerprint of the source, see :func:`fingerprint`."""

    def chunks(self, row_counts: Sequence[int], epoch: int) -> list[list[int]]:
        """Row groups of each chunk of the epoch."""
        groups = np.arange(len(row_counts))
        if self.shuffle:
            np.random.default_rng([self.seed, _GROUPS, epoch]).shuffle(groups)
        listed: list[int] = groups.tolist()
        return [listed[i : i + self.shuffle_groups] for i in range(0, len(listed), self.shuffle_groups)]

    def rows(self, chunk_rows: int, epoch: int, segment: Segment) -> Ids:
        """Places, within its chunk of ``chunk_rows`` rows, of a segment's rows in shuffled order."""
        places: Ids = np.arange(chunk_rows)
        if self.shuffle:
            np.random.default_rng([self.seed, _ROWS, epoch, segment.chunk]).shuffle(places)
        return places[segment.start : segment.stop]

    def require_same(self, here: "Order") -> None:
        """Refuse to go on from a position in this order where the order is ``here`` by the settings.

        Raises:
            ValueError: naming what differs.
        """
        for name in ("shuffle", "seed", "shuffle_groups"):
            then, now = getattr(self, name), getattr(here, name)
            if then != now:
                raise ValueError(
                    f"the checkpoint stands in an epoch read with data.loader.{name}={then}, but it is "
                    f"{now} here: which rows are left cannot be told. Set it back, or start a new run."
                )
        if self.data != here.data:
            raise ValueError(
                "the checkpoint stands in an epoch of other data (row counts, columns or their preparation "
                "differ): which rows are left cannot be told. Point data at the former, or start a new run."
            )


def fingerprint(source: Source) -> str:
    """Hexadecimal digest of what rows and columns a source has, cheap to compute."""
    schema = source.schema
    parts = [
        source.row_counts,
        schema.label,
        schema.dense,
        [dataclasses.astuple(column) for column in schema.sparse],
        schema.preparation,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where all ranks stand in an epoch; small, goes into checkpoints."""

    epoch: int
    """Number of the epoch, from 0."""

    segments: tuple[Segment, ...] | None
    """What this phase deals out; None: the whole epoch."""

    topology: Topology
    """Who reads in this phase."""

    consumed: tuple[int, ...]
    """Batches that each rank has taken in this phase."""

    order: Order
    """The order that ``segments`` refers to."""

    def __post_init__(self) -> None:
        if self.epoch < 0 or len(self.consumed) != self.topology.world or min(self.consumed) < 0:
            raise ValueError("the position in the data is damaged; resume from an earlier checkpoint.")

    def to_dict(self) -> dict[str, Any]:
        """The position as JSON-able values."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Position":
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: ``values`` is not a position.
        """
        return from_mapping(Position, values, "position in the data")


def deal(segments: Sequence[Segment], topology: Topology) -> dict[tuple[int, int], list[Segment]]:
    """Share segments among the streams of ``topology``: every row once, every stream its exact number.

    Segments go in order to the stream that has the fewest rows so far, which is round-robin for equal ones;
    what does not fit a stream any more is cut off and dealt on, at most once per stream. A chunk that is cut
    is read by more than one stream.
    """
    rows = sum(segment.rows for segment in segments)
    room = {stream: topology.stream_rows(rows, *stream) for stream in topology.streams()}
    dealt: dict[tuple[int, int], list[Segment]] = {stream: [] for stream in room}
    emptiest = [(0, turn, stream) for turn, stream in enumerate(room) if room[stream]]
    for segment in segments:
        rest = segment
        while rest.rows:
            load, turn, stream = emptiest[0]
            part = rest._replace(stop=min(rest.stop, rest.start + room[stream]))
            dealt[stream].append(part)
            room[stream] -= part.rows
            if room[stream]:
                heapq.heapreplace(emptiest, (load + part.rows, turn, stream))
            else:
                heapq.heappop(emptiest)
            rest = rest._replace(start=part.stop)
    return dealt


def skip(segments: Sequence[Segment], rows: int) -> list[Segment]:
    """What is left of ``segments`` after their first ``rows`` rows."""
    left = []
    for segment in segments:
        passed = min(rows, segment.rows)
        rows -= passed
        if passed < segment.rows:
            left.append(segment._replace(start=segment.start + passed))
    return left


def left(
    segments: Sequence[Segment], topology: Topology, consumed: Sequence[int]
) -> dict[tuple[int, int], list[Segment]]:
    """What every (rank, worker) still has to read once each rank has ``consumed`` so many batches."""
    return {
        (rank, worker): skip(own, len(range(worker, consumed[rank], topology.workers)) * topology.batch_size)
        for (rank, worker), own in deal(segments, topology).items()
    }


def joined(segments: Iterable[Segment]) -> list[Segment]:
    """The same rows in as few segments as possible, in the epoch's order."""
    result: list[Segment] = []
    for segment in sorted(segments):
        if result and (result[-1].chunk, result[-1].stop) == (segment.chunk, segment.start):
            result[-1] = result[-1]._replace(stop=segment.stop)
        else:
            result.append(segment)
    return result
