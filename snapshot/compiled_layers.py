"""Dense layers that torch.export and TorchScript can write to a file, bit for bit those of layers.py.

| type | TorchScript | torch.export |
|---|---|---|
| fp32, bf16 | native linear | native linear |
| fp16 | fbgemm's kernel, its weights packed on loading | the same, packed at every call |
| int8 | fbgemm's operator, its weights packed on loading | the same integers by `torch._int_mm` |

torch.export cannot keep a packed weight, which is an object of C++ to it, hence the last column.

Legend: B rows of a batch, K inputs and N outputs of a layer.
"""

import torch
from torch import Tensor, nn

from tightrec.snapshot.integers import fixed_levels, fused_multiply_add, products
from tightrec.snapshot.layers import ACTIVATION_BITS, StoredLayer, make_layer, row_steps
from tightrec.snapshot.ranges import affine

CPU = torch.device("cpu")


def scripted_layer(stored: StoredLayer, relu: bool) -> nn.Module:
    """A layer for TorchScript: float32 [B, K] to float32 [B, N].

    Raises:
        ValueError: as :func:`tightrec.snapshot.layers.make_layer`.
    """
    if stored.kind == "fp16":
        return _PackedHalf(stored, relu)
    return make_layer(stored, relu=relu, device=CPU) if stored.kind == "int8" else _Native(stored, relu)


def exported_layer(stored: StoredLayer, relu: bool) -> nn.Module:
    """A layer for torch.export: float32 [B, K] to float32 [B, N], of plain tensors only."""
    if stored.kind == "int8":
        return _RowIntegers(stored, relu) if stored.activation is None else _FixedIntegers(stored, relu)
    return _UnpackedHalf(stored, relu) if stored.kind == "fp16" else _Native(stored, relu)


class _Layer(nn.Module):
    """Weights as buffers, so that a file holds them once."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, relu: bool) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.relu = relu


class _Native(_Layer):
    def __init__(self, stored: StoredLayer, relu: bool) -> None:
        bias = None if stored.bias is None else stored.bias.to(stored.weight.dtype)
        super().__init__(stored.weight, bias, relu)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return (torch.relu(y) if self.relu else y).to(torch.float32)


class _PackedHalf(nn.Module):
    """`layers.py` keeps the address of the packed weight instead, which means nothing in another process."""

    def __init__(self, stored: StoredLayer, relu: bool) -> None:
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(stored.weight.to(torch.float32), _bias(stored))
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return torch.relu(y) if self.relu else y


class _UnpackedHalf(_Layer):
    def __init__(self, stored: StoredLayer, relu: bool) -> None:
        # The operator takes float32 only, and rounds values that are float16 already to themselves.
        super().__init__(stored.weight.to(torch.float32), _bias(stored), relu)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.quantized.linear_dynamic_fp16_unpacked_weight(x, self.weight, self.bias)
        return torch.relu(y) if self.relu else y


class _Integers(_Layer):
    """int8 weights times quantised inputs, in whole numbers."""

    scale: Tensor
    sums: Tensor

    def __init__(self, stored: StoredLayer, relu: bool) -> None:
        super().__init__(stored.weight.t(), _bias(stored), relu)
        assert stored.scale is not None
        self.register_buffer("scale", stored.scale)
        self.register_buffer("sums", stored.weight.sum(1, dtype=torch.int32))


class _FixedIntegers(_Integers):
    """The input quantised in a fixed range, with the roundings of fbgemm's fused operator."""

    inputs_scale: Tensor
    factor: Tensor

    def __init__(self, stored: StoredLayer, relu: bool) -> None:
        super().__init__(stored, relu)
        assert stored.activation is not None
        scale, self.zero_point = affine(*stored.activation, ACTIVATION_BITS)
        self.register_buffer("inputs_scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("factor", self.inputs_scale * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        levels = fixed_levels(x, self.inputs_scale, self.zero_point)
        sums = products(levels, self.weight, self.sums) - self.zero_point * self.sums
        y = fused_multiply_add(sums.to(torch.float32), self.factor, self.bias)
        return torch.relu(y) if self.relu else y


class _RowIntegers(_Integers):
    """Each row of the input quantised in its own range."""

    def __init__(self, stored: StoredLayer, relu: bool) -> None:
        super().__init__(stored, relu)
        self.register_buffer("row_sums", self.sums.to(torch.float32) * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        step, zero = row_steps(x)
        levels = torch.round(x / step - zero).clamp(0, 255)
        y = products(levels, self.weight, self.sums).to(torch.float32) * self.scale
        y = (y + zero * self.row_sums) * step + self.bias
        return torch.relu(y) if self.relu else y


def _bias(stored: StoredLayer) -> Tensor:
    return torch.zeros(len(stored.weight)) if stored.bias is None else stored.bias
