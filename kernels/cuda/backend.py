"""The CUDA backend as ``kernels.backends`` takes it.

Nothing is compiled and CUDA is not touched before the first call; ``build`` says how the kernels are compiled
and where they are kept.
"""

from tightrec.kernels.cuda import decode as _decode
from tightrec.kernels.cuda import encode as _encode
from tightrec.kernels.cuda.cupy_executor import CupyExecutor
from tightrec.kernels.cuda.decode import decode_scratch_bytes
from tightrec.kernels.cuda.encode import encode_scratch_bytes
from tightrec.kernels.job import DecodeJob, EncodeJob

__all__ = ["decode", "decode_scratch_bytes", "encode", "encode_scratch_bytes"]


def encode(job: EncodeJob) -> None:
    """Queue a job's kernels on the current stream of its device.

    Raises:
        BuildError: the kernels could not be compiled or loaded; says what to do.
    """
    _encode.encode(job, CupyExecutor(job.values.device))


def decode(job: DecodeJob) -> None:
    """Queue a job's kernels on the current stream of its device.

    Raises:
        BuildError: the kernels could not be compiled or loaded; says what to do.
    """
    _decode.decode(job, CupyExecutor(job.out.device))
