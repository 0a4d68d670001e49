"""What the compiled decoding loops share: the job as arrays, and where everything lies in scratch."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tightrec.kernels.cpu.work import arrays_bytes, carve, value_views
from tightrec.kernels.format import DTYPES
from tightrec.kernels.job import DecodeJob, Totals

STATE_COLUMNS = 9
MODE = 0
"""Columns of ``DecodeWork.state``: the block's mode."""
FLAGS = 1
"""Its header's flags."""
AT = 2
"""Byte of ``buffer`` where what is not read yet of its payload starts."""
END = 3
"""Byte of ``buffer`` where its payload ends."""
BOUND = 4
"""Bits of its bound."""
BOOK = 5
"""Id of its codebook."""
DISTINCT = 6
"""Rows that were sent."""
FAULT = 7
"""0, the fault of its payload, or POISONED."""
FIRST_UNIT = 8
"""The block's first unit."""

POISONED = -1
"""Another block's header, or the frame's, is at fault."""


class DecodeWork(NamedTuple):
    """One decode call. P peers, T tables, B blocks, U units: segments of 32 tiles, or of 4 strips."""

    buffer: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    values32: NDArray[np.uint32]
    values16: NDArray[np.uint16]
    dtype: int
    tables: int
    blocks: NDArray[np.int64]
    book_lengths: NDArray[np.uint8]
    book_ids: NDArray[np.int32]
    status: NDArray[np.int64]
    state: NDArray[np.int64]
    """[B, STATE_COLUMNS]."""
    peer_faults: NDArray[np.int64]
    """[P]: 0, or table << 8 | fault of the frame's headers."""
    units: NDArray[np.int32]
    """[U, 2]: block, segment."""
    unit_faults: NDArray[np.int32]
    """[U]."""
    row_index: NDArray[np.int32]
    """[rows]: which distinct row a row is received as."""
    first: NDArray[np.int32]
    """[rows]: from a block's first row on, the lowest row that is received as each distinct row."""


def _arrays(totals: Totals) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Type and shape of each array in scratch."""
    return {
        "state": (np.int64, (totals.peers * totals.tables, STATE_COLUMNS)),
        "peer_faults": (np.int64, (totals.peers,)),
        "units": (np.int32, (totals.tiles, 2)),
        "unit_faults": (np.int32, (totals.tiles,)),
        "row_index": (np.int32, (totals.rows,)),
        "first": (np.int32, (totals.rows,)),
    }


def decode_scratch_bytes(totals: Totals, value_bytes: int) -> int:
    """Bytes of scratch that ``decode`` needs."""
    return arrays_bytes(_arrays(totals))


def decode_work(job: DecodeJob) -> DecodeWork:
    """The arrays of a decode job; nothing is copied.

    Raises:
        ValueError: ``scratch`` is too small.
    """
    values32, values16 = value_views(job.out)
    return DecodeWork(
        buffer=job.buffer.numpy(),
        offsets=job.offsets.numpy(),
        sizes=job.sizes.numpy(),
        values32=values32,
        values16=values16,
        dtype=DTYPES.index(job.out.dtype),
        tables=job.totals.tables,
        blocks=job.blocks.numpy(),
        book_lengths=job.book_lengths.numpy(),
        book_ids=job.book_ids.numpy(),
        status=job.status.numpy(),
        **carve(job.scratch, _arrays(job.totals)),  # type: ignore[arg-type]
    )
