"""The host side of the CUDA decoder: four launches, whatever the frames hold.

Which modes the blocks have is only known on the device, so that every kernel is launched each time and finds
there what is left to do. B = P*T blocks.
"""

from typing import NamedTuple

import torch

from tightrec.kernels.cuda.executor import Argument, Executor
from tightrec.kernels.format import DTYPES
from tightrec.kernels.job import DecodeJob, Totals

_SUFFIXES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_NAMES = {
    dtype: tuple(f"decode_{kernel}_{suffix}" for kernel in ("tiles", "strips", "finish"))
    for dtype, suffix in _SUFFIXES.items()
}
_CHECK_THREADS = 256
_TILES_THREADS, _TILES_A_BLOCK = 256, 8
_STRIPS_THREADS = 32
_FINISH_THREADS = 256

_PAYLOAD_BYTES = 32
_FAULT_BYTES = 8
_ROW_BYTES = 8
_ROWS_A_SLICE = 1024
_TILES_A_SHARE = 32
_MOST_CHECKS, _MOST_FINISHES = 1024, 4096
"""Thread blocks beyond which shares of a block are not made smaller: the device is full long before."""


class Cut(NamedTuple):
    """In how many parts a block's work is done by thread blocks of their own."""

    slices: int
    """Of its index, in decode_check."""
    shares: int
    """Of its tiles, in decode_finish."""


def cut(totals: Totals) -> Cut:
    """How the average block is cut; an uneven one only takes longer."""
    blocks = max(totals.peers * totals.tables, 1)
    return Cut(
        slices=max(1, min(-(-totals.rows // (blocks * _ROWS_A_SLICE)), _MOST_CHECKS // blocks)),
        shares=max(1, min(-(-totals.tiles // (blocks * _TILES_A_SHARE)), _MOST_FINISHES // blocks)),
    )


def decode_scratch_bytes(totals: Totals, value_bytes: int) -> int:
    """Bytes of scratch that ``decode`` needs; decode_common.cuh lays them out."""
    blocks = totals.peers * totals.tables
    faults = _FAULT_BYTES * (totals.peers + blocks * cut(totals).slices)
    return -(-(_PAYLOAD_BYTES * blocks + faults + _ROW_BYTES * totals.rows) // 16) * 16


def decode(job: DecodeJob, executor: Executor) -> None:
    """Queue the launches that write a job's values and status; nothing is waited for."""
    totals, out, scratch, blocks, buffer = job.totals, job.out, job.scratch, job.blocks, job.buffer
    slices, shares = cut(totals)
    tiles, strips, finish = _NAMES[out.dtype]
    counts = (totals.peers, totals.tables, slices, totals.rows)
    if totals.peers:
        units = totals.peers * max(totals.tables, 1) * slices
        received = (buffer, buffer.numel(), job.offsets, job.sizes, blocks, job.book_lengths, job.book_ids)
        args: tuple[Argument, ...] = (*received, scratch, *counts, DTYPES.index(out.dtype))
        executor.launch("decode_check", units, _CHECK_THREADS, args)
    if totals.tiles:
        args = (buffer, blocks, scratch, out, *counts, totals.tiles)
        executor.launch(tiles, -(-totals.tiles // _TILES_A_BLOCK), _TILES_THREADS, args)
        args = (buffer, blocks, job.book_lengths, scratch, out, *counts)
        executor.launch(strips, totals.strips, _STRIPS_THREADS, args)
    grid = max(1, totals.peers * totals.tables * shares)
    executor.launch(finish, grid, _FINISH_THREADS, (blocks, scratch, out, job.status, *counts, shares))
