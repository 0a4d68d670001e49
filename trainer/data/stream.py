"""One stream of batches: the segments dealt to one worker, read chunk by chunk."""

from collections.abc import Iterator
from dataclasses import dataclass

from tightrec.formats.columns import Columns, Source
from tightrec.trainer.data.batch import Batch, to_batch
from tightrec.trainer.data.shards import Order, Segment


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Reads ``segments`` of an epoch one after the other; picklable, iterates from the start each time."""

    source: Source
    """Where rows come from."""

    order: Order
    """Order of the epoch's rows."""

    epoch: int
    """Which epoch."""

    segments: list[Segment]
    """What to read."""

    batch_size: int
    """Rows per batch; only the last batch may be short, and is padded."""

    dedup: bool = False
    """Whether batches hold each feature's distinct bags only."""

    def __iter__(self) -> Iterator[Batch]:
        parts: list[Columns] = []
        missing = self.batch_size
        for part in self._parts():
            parts.append(part)
            missing -= len(part)
            if not missing:
                yield self._batch(parts)
                parts, missing = [], self.batch_size
        if parts:
            yield self._batch(parts)

    def _batch(self, parts: list[Columns]) -> Batch:
        return to_batch(Columns.concat(parts), self.source.schema, self.batch_size, dedup=self.dedup)

    def _parts(self) -> Iterator[Columns]:
        """All rows, cut where a batch is full and where a chunk ends."""
        chunks = self.order.chunks(self.source.row_counts, self.epoch)
        missing = self.batch_size
        for segment in self.segments:
            chunk = self._read(chunks[segment.chunk])
            rows = self.order.rows(len(chunk), self.epoch, segment)
            while len(rows):
                part, rows = rows[:missing], rows[missing:]
                missing = missing - len(part) or self.batch_size
                yield chunk.take(part)
            # Two chunks in memory at a time are one too many.
            del chunk

    def _read(self, groups: list[int]) -> Columns:
        chunk = Columns.concat([self.source.read(group) for group in groups])
        expected = sum(self.source.row_counts[group] for group in groups)
        assert len(chunk) == expected, f"row groups {groups} have {len(chunk)} rows, not {expected}"
        return chunk
