"""What every type of dense layer computes, in plain torch, step by step.

Slow and only for comparison: a layer with 1,000 inputs is a loop over a thousand steps in fp16.

Legend: B rows of a batch, K inputs and N outputs of a layer.
"""

import torch
from torch import Tensor

from tightrec.snapshot.layers import StoredLayer

FP16_BLOCK = 512
"""Inputs that fbgemm's float16 kernel sums before it stores, ..."""

FP16_COLUMNS = 32
"""... and outputs that it works on at once, with AVX-512."""


def reference_layer(stored: StoredLayer, x: Tensor, relu: bool) -> Tensor:
    """float32 [B, K] to float32 [B, N].

    int8: equal to the operator bit for bit, on every x86-64 processor. fp16: equal bit for bit with
    AVX-512; kernels for AVX2 sum some rows in another order. fp32 and bf16: the exact sum, rounded to
    the type once; no library promises an order of summation, see `summation_error`.
    """
    if stored.kind == "int8":
        y = _fixed(stored, x) if stored.activation is not None else _by_row(stored, x)
    elif stored.kind == "fp16":
        y = _sums_fp16(x, stored.weight.to(torch.float32))
        y = y if stored.bias is None else y + stored.bias
    else:
        dtype = stored.weight.dtype
        exact = x.to(dtype).double() @ stored.weight.double().t()
        exact = exact if stored.bias is None else exact + stored.bias.to(dtype).double()
        y = exact.to(dtype).to(torch.float32)
    return torch.relu(y) if relu else y


def summation_error(stored: StoredLayer, x: Tensor) -> Tensor:
    """By how much two float32 sums of the same terms can differ from the exact one: [B, N].

    (K + 2) / 2**23 times the sum of the terms' magnitudes (Higham, Accuracy and Stability of Numerical
    Algorithms, section 4.2, for any order), with a bias as one more term.
    """
    dtype = torch.float32 if stored.kind == "fp16" else stored.weight.dtype
    terms = x.to(dtype).double().abs() @ stored.weight.double().abs().t()
    terms = terms if stored.bias is None else terms + stored.bias.double().abs()
    return terms * (x.shape[1] + 2) / 2**23


def rounded_once(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32 tensors, rounded to float32 once, as a processor's fused operation does.

    The product is exact in float64. Rounding the sum there and then to float32 goes wrong only where the
    first lands midway between two values of float32: which way the exact sum lies decides there.
    """
    product, c = torch.broadcast_tensors(a.double() * b.double(), c.double())
    total = product + c
    large = torch.where(product.abs() >= c.abs(), product, c)
    small = torch.where(product.abs() >= c.abs(), c, product)
    lost = small - (total - large)  # exact (Dekker, Numerische Mathematik 1971)
    near = total.to(torch.float32)
    beyond = torch.nextafter(near, torch.where(total > near, torch.inf, -torch.inf).to(torch.float32))
    midway = (total - near).abs() == (beyond - total).abs()
    decided = torch.where(lost > 0, torch.maximum(near, beyond), torch.minimum(near, beyond))
    return torch.where(midway & (lost != 0), decided, near)


def _fixed(stored: StoredLayer, x: Tensor) -> Tensor:
    assert stored.activation is not None
    assert stored.scale is not None
    low, high = min(stored.activation[0], 0.0), max(stored.activation[1], 0.0)
    scale = torch.tensor((high - low) / 255, dtype=torch.float64).to(torch.float32)
    if scale < 2**-126:
        scale, zero_point = torch.ones(()), 0
    else:
        zero_point = int(torch.round(-low / scale.double()).clamp(0, 255))
    shifted = rounded_once(x, torch.ones(()) / scale, torch.tensor(float(zero_point)))
    levels = torch.round(shifted).clamp(0, 255).to(torch.int64)
    sums = (levels - zero_point) @ stored.weight.to(torch.int64).t()
    bias = torch.zeros(len(stored.weight)) if stored.bias is None else stored.bias
    return rounded_once(sums.to(torch.int32).to(torch.float32), scale * stored.scale, bias)


def _by_row(stored: StoredLayer, x: Tensor) -> Tensor:
    assert stored.scale is not None
    weight = stored.weight.to(torch.int64)
    low, high = x.amin(1).clamp(max=0.0), x.amax(1).clamp(min=0.0)
    step = ((high - low) * (1.0 / 254)).clamp(min=2.0**-126)[:, None]
    zero = torch.floor(low[:, None] / step)
    levels = torch.round(x / step - zero).clamp(0, 255).to(torch.int64)
    sums = (levels @ weight.t()).to(torch.float32) * stored.scale
    y = (sums + zero * (weight.sum(1).to(torch.float32) * stored.scale)) * step
    return y + (torch.zeros(len(weight)) if stored.bias is None else stored.bias)


def _sums_fp16(x: Tensor, weight: Tensor) -> Tensor:
    """Sums of fbgemm's float16 kernel: one input after the other, each by a fused multiply-add.

    Blocks of inputs go on from the sum so far, save for the last outputs that fill no group of columns:
    their blocks start at zero and are added.
    """
    outputs, inputs = weight.shape
    whole = outputs // FP16_COLUMNS * FP16_COLUMNS
    total = x.new_zeros(x.shape[0], outputs)
    for start in range(0, inputs, FP16_BLOCK):
        part = total.clone()
        part[:, whole:] = 0
        for k in range(start, min(start + FP16_BLOCK, inputs)):
            part = rounded_once(x[:, k : k + 1], weight[:, k], part)
        if start:
            part[:, whole:] += total[:, whole:]
        total = part
    return total
