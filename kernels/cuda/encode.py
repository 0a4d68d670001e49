"""The host side of encoding: which kernels a job needs, in what order, with how much scratch."""

import torch

from tightrec.kernels.cuda.executor import Argument, Executor
from tightrec.kernels.format import DTYPES, GROUP_VALUES, MAX_KIND_PLANES, TILE_GROUPS
from tightrec.kernels.job import EncodeJob, Stages, Totals

_SUFFIXES = {torch.float32: "_f32", torch.float16: "_f16", torch.bfloat16: "_bf16"}
_THREADS, _RANK_THREADS = 256, 512
_WARPS = _THREADS // 32
# Bytes of scratch for each block, tile, strip and row, as encode_common.cuh places them.
_BLOCK_BYTES, _TILE_BYTES, _STRIP_BYTES, _ROW_BYTES = 32, 28, 92, 40


def encode_scratch_bytes(totals: Totals, stages: Stages, value_bytes: int) -> int:
    """Bytes of scratch that ``encode`` needs.

    Args:
        totals: the sums over the job's blocks.
        stages: what the job's requests need.
        value_bytes: bytes of a value, 4 or 2.
    """
    fixed = 16 + _BLOCK_BYTES * _padded(totals.peers * totals.tables)
    fixed += _TILE_BYTES * _padded(totals.tiles) + _STRIP_BYTES * _padded(totals.strips)
    slots = _slot_bytes(value_bytes) * totals.tiles * (stages.packed + stages.dedup)
    return fixed + slots + (_ROW_BYTES * totals.rows if stages.dedup else 0)


def encode(job: EncodeJob, executor: Executor) -> None:
    """Queue the launches that write a job's frames; nothing is allocated on the device or read back."""
    totals, stages = job.totals, job.stages
    if not totals.peers:
        return
    suffix = _SUFFIXES[job.values.dtype]
    args = _arguments(job)
    strips, eights = totals.strips, -(-totals.peers * totals.tables // _WARPS)

    def launch(name: str, grid: int, threads: int = _THREADS) -> None:
        if grid:
            executor.launch(name, grid, threads, args)

    if stages.relative:
        launch("encode_stats" + suffix, strips)
        launch("encode_bounds", eights)
    if stages.half and job.values.dtype == torch.float32:
        launch("encode_halves", strips)
    launch("encode_pack" + suffix, max(strips, 1))
    if stages.dedup:
        launch("encode_hash" + suffix, -(-totals.rows // _WARPS))
        launch("encode_rank", totals.peers * totals.tables, _RANK_THREADS)
        launch("encode_pack_rows" + suffix, strips)
    if stages.entropy:
        launch("encode_choose", eights)
        launch("encode_chunks" + suffix, strips)
    launch("encode_layout", max(eights, 1))
    launch("encode_write" + suffix, strips)
    if stages.entropy:
        launch("encode_stream" + suffix, strips)


def _arguments(job: EncodeJob) -> list[Argument]:
    """The one parameter list of all encode kernels: ENCODE_PARAMETERS in encode_common.cuh."""
    totals = job.totals
    return [
        job.values,
        job.blocks,
        job.bound,
        job.bound_kind,
        job.request,
        job.book_lengths,
        job.book_ids,
        job.book_sent,
        0 if job.histogram is None else job.histogram,
        job.out,
        job.offsets,
        job.sizes,
        job.scratch,
        totals.peers,
        totals.tables,
        totals.tiles,
        totals.strips,
        totals.rows,
        job.stages.bits,
        DTYPES.index(job.values.dtype),
    ]


def _padded(count: int) -> int:
    return -(-count // 8) * 8


def _slot_bytes(value_bytes: int) -> int:
    """Bytes of a tile's slot: its largest data, to a multiple of 16."""
    largest = 4 * MAX_KIND_PLANES + TILE_GROUPS * GROUP_VALUES * value_bytes
    return -(-largest // 16) * 16
