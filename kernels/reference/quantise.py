"""The error-bounded uniform quantiser: docs/FORMAT.md, sections 3 and 5; docs/error_bounds.md proves it.

The step is twice the bound, as in SZ and the published scheme; the encoder evaluates the decoder's exact
expression and keeps what it would get wrong as an exception.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tightrec.kernels.format import SAFE_CODE
from tightrec.kernels.reference.bits import bits_to_values, value_bits


class Codes(NamedTuple):
    """What each value of a block is sent as."""

    code: Tensor
    """int64, zig-zag codes below 2^24; zero for exceptions."""
    exception: Tensor
    """bool: the value's own bits are sent."""


def quantise(values: Tensor, bound: Tensor) -> Codes:
    """Codes and exceptions of values, any shape and dtype, at a float32 bound."""
    x = values.to(torch.float32)
    step = bound * 2
    scaled = x * (1.0 / step)
    safe = scaled.abs() < SAFE_CODE
    q = torch.where(safe, scaled, torch.zeros_like(scaled)).round()
    decoded = (q * step).to(values.dtype).to(torch.float32)
    kept = safe & ((x - decoded).abs() <= bound)
    integer = torch.where(kept, q, torch.zeros_like(q)).to(torch.int64)
    return Codes((integer << 1) ^ (integer >> 63), ~kept)


def reconstruct(code: Tensor, bound: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that codes decode to."""
    q = (code >> 1) ^ -(code & 1)
    return (q.to(torch.float32) * (bound * 2)).to(dtype)


def decoded(values: Tensor, codes: Codes, bound: Tensor) -> Tensor:
    """What the receiver gets for values sent as these codes and exceptions, to the bit."""
    received = value_bits(reconstruct(codes.code, bound, values.dtype))
    return bits_to_values(torch.where(codes.exception, value_bits(values), received), values.dtype)


def half_dtype(values: Tensor, bound: Tensor) -> torch.dtype | None:
    """The 16-bit type that keeps every value of a float32 block within the bound, or None."""
    if values.dtype != torch.float32:
        return None
    for dtype in (torch.float16, torch.bfloat16):
        half = values.to(dtype).to(torch.float32)
        if bool((((values - half).abs() <= bound) | (values == half)).all()):
            return dtype
    return None
