"""The definition of the codec in plain torch: slow, simple, and what every other backend must equal."""

from tightrec.kernels.reference.decode import decode, decode_scratch_bytes
from tightrec.kernels.reference.encode import encode, encode_scratch_bytes

__all__ = ["decode", "decode_scratch_bytes", "encode", "encode_scratch_bytes"]
