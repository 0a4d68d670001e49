"""Decoding on the CPU: the loops of a job in order, each over all threads."""

import numpy as np

from tightrec.kernels.cpu.codebook import decoding_table
from tightrec.kernels.cpu.decode_rows import finish_blocks, read_indices, report
from tightrec.kernels.cpu.decode_work import FAULT, MODE, DecodeWork, decode_scratch_bytes, decode_work
from tightrec.kernels.cpu.floats import i64
from tightrec.kernels.cpu.headers import check_peers, plan_units
from tightrec.kernels.cpu.jit import loop
from tightrec.kernels.cpu.pool import run
from tightrec.kernels.cpu.uncode import read_coded
from tightrec.kernels.cpu.unpack import read_packed, read_values
from tightrec.kernels.format import GROUP_VALUES, MAX_CODE_LENGTH, TILE_VALUES, Fault, Mode
from tightrec.kernels.job import DecodeJob

_BFLOAT16 = int(Mode.BFLOAT16)
_DEDUP = int(Mode.DEDUP)
_CODEBOOK = int(Fault.CODEBOOK)


@loop
def decode_units(start: int, stop: int, work: DecodeWork) -> None:
    """Decode units start..stop of the blocks whose headers are sound, and note their faults."""
    sizes, codes = np.empty(GROUP_VALUES, np.uint32), np.empty(TILE_VALUES, np.uint32)
    patterns, decoded = np.empty(TILE_VALUES, np.uint32), np.empty(TILE_VALUES, np.uint32)
    table = np.empty(1 << MAX_CODE_LENGTH, np.uint32)
    table_block, complete = -1, False
    for unit in range(start, stop):
        block, segment = i64(work.units[unit, 0]), i64(work.units[unit, 1])
        if work.state[block, FAULT]:
            continue
        mode = work.state[block, MODE]
        if mode <= _BFLOAT16:
            work.unit_faults[unit] = read_values(work, block, segment, patterns)
        elif mode <= _DEDUP:
            work.unit_faults[unit] = read_packed(work, block, segment, sizes, codes, patterns)
        else:
            if table_block != block:
                lengths = work.book_lengths[block // work.tables, block % work.tables]
                complete = decoding_table(lengths, table)
                table_block = block
            if complete:
                fault = read_coded(work, block, segment, table, sizes, codes, patterns, decoded)
                work.unit_faults[unit] = fault
            else:
                work.unit_faults[unit] = _CODEBOOK


def decode(job: DecodeJob) -> None:
    """Writes the values of all blocks of a job, NaN where a frame is faulty, and its status.

    Raises:
        ValueError: ``scratch`` is smaller than ``decode_scratch_bytes`` says.
    """
    work = decode_work(job)
    blocks = job.totals.peers * job.totals.tables
    units = plan_units(work)
    run(check_peers, job.totals.peers, work)
    run(read_indices, blocks, work)
    run(decode_units, units, work)
    run(finish_blocks, blocks, work)
    report(work)


__all__ = ["decode", "decode_scratch_bytes"]
