"""Whole-number arithmetic of int8 layers by operators that every device and torch.export know.

It gives the bits of fbgemm's fused operators. `layer_reference` defines the same numbers by a coding of its
own and shares nothing with this file, so that a test of one against the other compares two.

Legend: B rows of a batch, K inputs and N outputs of a layer.
"""

import torch
from torch import Tensor

OFFSET = 128
"""From levels 0 to 255 to int8, which torch._int_mm takes."""


def products(levels: Tensor, weight: Tensor, sums: Tensor) -> Tensor:
    """Products of levels with the weights: int32 [B, N].

    Args:
        levels: whole numbers 0 to 255 [B, K], of any type that holds -128 to 255.
        weight: int8 [K, N].
        sums: int32 [N], of the weights of each output.
    """
    return torch._int_mm((levels - OFFSET).to(torch.int8), weight) + OFFSET * sums


def fixed_levels(x: Tensor, scale: Tensor, zero_point: int) -> Tensor:
    """Levels 0 to 255, float32, as which a fixed range quantises float32 [B, K]; `scale` is a float32 scalar.

    fbgemm multiplies by the scale's reciprocal and adds the zero point with one rounding.
    """
    zero = torch.full((), float(zero_point), device=x.device)
    return torch.round(fused_multiply_add(x, torch.ones_like(scale) / scale, zero)).clamp(0, 255)


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32 tensors, rounded to float32 once.

    The product is exact in float64. The sum is rounded to odd there, after which rounding to float32
    is as good as rounding the exact sum (Boldo and Melquiond, IEEE Transactions on Computers 2008).
    """
    a, b, c = torch.broadcast_tensors(a.double(), b.double(), c.double())
    product = a * b
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    even = (total.contiguous().view(torch.int64) & 1) == 0
    towards = torch.where(error > 0, torch.inf, -torch.inf).double()
    return torch.where((error != 0) & even, torch.nextafter(total, towards), total).to(torch.float32)
