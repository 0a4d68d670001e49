"""The codec on the CPU, compiled by Numba: the bytes of the reference at the speed of memory.

Numba caches compiled loops beside the sources, by file: after an edit of a file that another one's loops
call, delete the caches (``make clean``).
"""

from tightrec.kernels.cpu.decode import decode, decode_scratch_bytes
from tightrec.kernels.cpu.encode import encode, encode_scratch_bytes

__all__ = ["decode", "decode_scratch_bytes", "encode", "encode_scratch_bytes"]
