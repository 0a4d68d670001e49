"""The codec on the CPU, compiled by Numba: the bytes of the reference at the speed of memory.

The first call compiles the loops; ``jit`` says where they are kept.
"""

from tightrec.kernels.cpu.decode import decode, decode_scratch_bytes
from tightrec.kernels.cpu.encode import encode, encode_scratch_bytes

__all__ = ["decode", "decode_scratch_bytes", "encode", "encode_scratch_bytes"]
