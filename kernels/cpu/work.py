"""What the compiled encoding loops share: the job as arrays, and where everything lies in scratch."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tightrec.kernels.format import (
    DTYPES,
    GROUP_VALUES,
    MAX_KIND_PLANES,
    STRIP_CHUNKS,
    SYMBOLS,
    TILE_GROUPS,
)
from tightrec.kernels.job import EncodeJob, Stages, Totals

ALIGNMENT = 64

STATE_COLUMNS = 8
MODE = 0
"""Columns of ``EncodeWork.state``: the block's mode, as far as it is chosen."""
SIZE = 1
"""Bytes of its payload, its codebook included."""
PLACE = 2
"""Where its payload starts in ``out``, in bytes."""
DISTINCT = 3
"""Rows that are sent; rows is the block's own number where all are."""
CODED = 4
"""Bytes of the coded payload over the chosen rows; 0 where it was not measured."""
BOOK = 5
"""1 where its codebook is included."""
FIRST_UNIT = 6
"""The block's first unit."""

MISSES_FLOAT16 = 1
MISSES_BFLOAT16 = 2


class EncodeWork(NamedTuple):
    """One encode call. B blocks, T tables, U units: segments of 32 tiles, no more than there are tiles."""

    values32: NDArray[np.uint32]
    values16: NDArray[np.uint16]
    dtype: int
    tables: int
    blocks: NDArray[np.int64]
    bound: NDArray[np.float32]
    bound_kind: NDArray[np.uint8]
    request: NDArray[np.uint8]
    book_lengths: NDArray[np.uint8]
    book_ids: NDArray[np.int32]
    book_sent: NDArray[np.int32]
    histogram: NDArray[np.int64]
    """[T, 256], or [0, 256] where none is asked for."""
    out8: NDArray[np.uint8]
    out32: NDArray[np.uint32]
    out16: NDArray[np.uint16]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    tile_words: int
    """Words kept for a tile in ``slots``; the tiles of a unit follow each other without gaps."""
    state: NDArray[np.int64]
    """[B, STATE_COLUMNS]."""
    bounds: NDArray[np.float32]
    """[B], resolved."""
    units: NDArray[np.int32]
    """[U, 2]: block, segment."""
    unit_words: NDArray[np.int64]
    """[U, 2]: words of the segment's tile data, and of the segments' of the block before it."""
    unit_misses: NDArray[np.uint8]
    """[U]: MISSES_FLOAT16 and MISSES_BFLOAT16."""
    entries: NDArray[np.uint32]
    """[tiles]: tile entries."""
    slots: NDArray[np.uint32]
    """[tiles * tile_words]: tile data."""
    row_index: NDArray[np.int32]
    """[rows]: which distinct row a row is received as."""
    first: NDArray[np.int32]
    """[rows]: from a block's first row on, the rows of the block that are sent."""
    hashes: NDArray[np.uint32]
    """[rows]."""
    table: NDArray[np.int32]
    """[4 * rows]: open addressing tables of the blocks; rows, or -1."""
    chunk_bytes: NDArray[np.uint16]
    """[strips * 32]: sizes of coded chunks."""
    counts: NDArray[np.int64]
    """[B, 256]: each block's share of the histogram."""


def tile_words(value_bytes: int) -> int:
    """Most words that a tile's data takes."""
    return MAX_KIND_PLANES + TILE_GROUPS * GROUP_VALUES * value_bytes // 4


def _arrays(totals: Totals, stages: Stages, value_bytes: int) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Type and shape of each array in scratch, empty where no stage needs it."""
    blocks = totals.peers * totals.tables
    slots = totals.tiles if stages.packed or stages.dedup else 0
    rows = totals.rows if stages.dedup else 0
    return {
        "state": (np.int64, (blocks, STATE_COLUMNS)),
        "bounds": (np.float32, (blocks,)),
        "units": (np.int32, (totals.tiles, 2)),
        "unit_words": (np.int64, (totals.tiles, 2)),
        "unit_misses": (np.uint8, (totals.tiles,)),
        "entries": (np.uint32, (slots,)),
        "slots": (np.uint32, (slots * tile_words(value_bytes),)),
        "row_index": (np.int32, (rows,)),
        "first": (np.int32, (rows,)),
        "hashes": (np.uint32, (rows,)),
        "table": (np.int32, (4 * rows,)),
        "chunk_bytes": (np.uint16, (totals.strips * STRIP_CHUNKS if stages.entropy else 0,)),
        "counts": (np.int64, (blocks if stages.entropy else 0, SYMBOLS)),
    }


def _bytes(kind: type, shape: tuple[int, ...]) -> int:
    """Bytes of an array, rounded up to the alignment."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
    return -(-size // ALIGNMENT) * ALIGNMENT


def arrays_bytes(arrays: dict[str, tuple[type, tuple[int, ...]]]) -> int:
    """Bytes that arrays of these types and shapes take in scratch."""
    return sum(_bytes(kind, shape) for kind, shape in arrays.values())


def carve(scratch: Tensor, arrays: dict[str, tuple[type, tuple[int, ...]]]) -> dict[str, NDArray[np.generic]]:
    """Cuts arrays of these types and shapes out of a uint8 tensor.

    Raises:
        ValueError: the tensor is too small.
    """
    memory = scratch.numpy()
    if memory.size < arrays_bytes(arrays):
        raise ValueError(f"scratch has {memory.size} bytes; this job needs {arrays_bytes(arrays)}")
    cut: dict[str, NDArray[np.generic]] = {}
    at = 0
    for name, (kind, shape) in arrays.items():
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
        cut[name] = memory[at : at + size].view(kind).reshape(shape)
        at += _bytes(kind, shape)
    return cut


def encode_scratch_bytes(totals: Totals, stages: Stages, value_bytes: int) -> int:
    """Bytes of scratch that ``encode`` needs."""
    return arrays_bytes(_arrays(totals, stages, value_bytes))


def value_views(values: Tensor) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """A float tensor's memory as words (empty for 16-bit types) and as halves."""
    flat = values.detach().view(-1)
    if values.element_size() == 4:
        words = flat.view(torch.int32).numpy().view(np.uint32)
        return words, words.view(np.uint16)
    return np.empty(0, np.uint32), flat.view(torch.int16).numpy().view(np.uint16)


def encode_work(job: EncodeJob) -> EncodeWork:
    """The arrays of an encode job; nothing is copied."""
    values32, values16 = value_views(job.values)
    value_bytes = job.values.element_size()
    out8 = job.out.numpy()
    out32 = out8[: out8.size // 4 * 4].view(np.uint32)
    histogram = np.empty((0, SYMBOLS), np.int64) if job.histogram is None else job.histogram.numpy()
    cut = carve(job.scratch, _arrays(job.totals, job.stages, value_bytes))
    return EncodeWork(
        values32=values32,
        values16=values16,
        dtype=DTYPES.index(job.values.dtype),
        tables=job.totals.tables,
        blocks=job.blocks.numpy(),
        bound=job.bound.numpy(),
        bound_kind=job.bound_kind.numpy(),
        request=job.request.numpy(),
        book_lengths=job.book_lengths.numpy(),
        book_ids=job.book_ids.numpy(),
        book_sent=job.book_sent.numpy(),
        histogram=histogram,
        out8=out8,
        out32=out32,
        out16=out32.view(np.uint16),
        offsets=job.offsets.numpy(),
        sizes=job.sizes.numpy(),
        tile_words=tile_words(value_bytes),
        **cut,  # type: ignore[arg-type]
    )
