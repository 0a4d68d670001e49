"""Encoding on the CPU: the loops of a job in order, each over all threads."""

from tightrec.kernels.cpu.bounds import plan_units, resolve_bounds
from tightrec.kernels.cpu.coded import measure_blocks
from tightrec.kernels.cpu.layout import lay_out
from tightrec.kernels.cpu.pack import pack_units
from tightrec.kernels.cpu.pool import run
from tightrec.kernels.cpu.rows import dedup_blocks
from tightrec.kernels.cpu.work import encode_scratch_bytes, encode_work
from tightrec.kernels.cpu.write import write_units
from tightrec.kernels.job import EncodeJob


def encode(job: EncodeJob) -> None:
    """Writes the frames of a job into its ``out``; bytes do not depend on the number of threads.

    Raises:
        ValueError: ``scratch`` is smaller than ``encode_scratch_bytes`` says.
    """
    work = encode_work(job)
    blocks = job.totals.peers * job.totals.tables
    stages = job.stages
    units = plan_units(work)
    run(resolve_bounds, blocks, work)
    if stages.packed or stages.half:
        run(pack_units, units, work)
    if stages.dedup:
        run(dedup_blocks, blocks, work)
    if stages.entropy:
        run(measure_blocks, blocks, work)
    lay_out(work)
    run(write_units, units, work)


__all__ = ["encode", "encode_scratch_bytes"]
