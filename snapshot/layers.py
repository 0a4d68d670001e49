"""Dense layers in the type in which a snapshot stores them: the one file that chooses their operators.

A stored layer holds plain tensors; `make_layer` packs them for the operator of its type, so nothing packed
is ever saved. docs/snapshots.md has the exact arithmetic, `layer_reference` computes it in plain torch.

Legend: B rows of a batch, K inputs and N outputs of a layer.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor, nn

from tightrec.snapshot.integers import fixed_levels, fused_multiply_add, products
from tightrec.snapshot.precision import LAYER_TYPES
from tightrec.snapshot.ranges import affine

ACTIVATION_BITS = 8
"""Of an int8 layer's input, unsigned with a zero point."""

WEIGHT_LIMIT = 64
"""Largest magnitude of an int8 weight.

x86 processors without VNNI add pairs of products of an unsigned and a signed byte in 16 bits, saturating:
2 * 255 * 64 is 32,640 and fits, so that every processor adds the same integers. Weights up to 127 would leave
7 bits to the inputs, which costs more accuracy: these share a scale over a row or all rows.
"""

ROW_STEPS = 254
"""Steps that the range of a row is divided into: one of the 255 is for the rounded zero point."""

MOST_INPUTS = (2**31 - 1) // (255 * WEIGHT_LIMIT)
"""Of an int8 layer: sums of more products could leave int32."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
"""Of the stored weights, by layer type."""


_packing = Lock()


@dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """One dense layer as it is stored: plain tensors, nothing packed."""

    kind: str
    """Type, see precision.LAYER_TYPES."""

    weight: Tensor
    """[N, K]: float32, float16, bfloat16, or int8 between -WEIGHT_LIMIT and WEIGHT_LIMIT."""

    bias: Tensor | None
    """float32 [N]; None: zeros."""

    scale: Tensor | None = None
    """float32 [N], int8 only: a weight is its integer times the scale of its output."""

    activation: tuple[float, float] | None = None
    """int8 only: the fixed range (low, high) of the input; None: the range of each row by itself."""


def store_layer(
    weight: Tensor, bias: Tensor | None, kind: str, activation: tuple[float, float] | None = None
) -> StoredLayer:
    """Convert a float32 layer to `kind`.

    Args:
        weight: [N, K], any floating type.
        bias: [N] or None.
        kind: see precision.LAYER_TYPES.
        activation: int8 only, see `StoredLayer`.

    Raises ValueError for shapes and kinds that do not fit, for values that are not finite or that float16
    cannot hold (with the output's row), for a range that is not finite or upside down, and for an int8
    layer of more than MOST_INPUTS inputs.
    """
    if kind not in LAYER_TYPES:
        raise ValueError(f"{kind!r} is no type of a dense layer: choose one of {', '.join(LAYER_TYPES)}")
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shape = None if bias is None else list(bias.shape)
        raise ValueError(f"a weight [N, K] and a bias [N] are needed, not {list(weight.shape)} and {shape}")
    weight = weight.detach().to("cpu", torch.float32)
    bias = None if bias is None else bias.detach().to("cpu", torch.float32).contiguous()
    _refuse_rows(~torch.isfinite(weight).all(1), "weights that are NaN or infinite")
    if bias is not None:
        _refuse_rows(~torch.isfinite(bias), "a bias that is NaN or infinite")
    if kind == "int8":
        return _store_int8(weight, bias, activation)
    if activation is not None:
        raise ValueError(f"only int8 layers have a range of their input, not {kind}: leave it out")
    if kind != "fp32":
        largest = torch.finfo(DTYPES[kind]).max
        stored = weight.to(DTYPES[kind]).contiguous()
        _refuse_rows(~torch.isfinite(stored).all(1), f"weights beyond {largest:g}, the largest {kind}")
        return StoredLayer(kind=kind, weight=stored, bias=bias)
    return StoredLayer(kind=kind, weight=weight.contiguous(), bias=bias)


def make_layer(
    stored: StoredLayer, *, relu: bool, device: torch.device, nonnegative: bool = False
) -> nn.Module:
    """Build the module: float32 [B, K] to float32 [B, N], followed by a ReLU where `relu`; B may be 0.

    `nonnegative` promises that no input is below 0, as behind a ReLU: the same numbers, sooner.
    The module owns what it needs and cannot be pickled or copied; make another from the stored layer.

    Raises ValueError for tensors that do not belong together, and where this processor has no operator.
    """
    _check(stored)
    on_gpu = device.type == "cuda"
    if stored.kind == "fp32" or (stored.kind == "fp16" and on_gpu) or stored.kind == "bf16":
        return _Float(stored, relu, device)
    if not on_gpu and "fbgemm" not in _engines():
        raise ValueError(
            f"{stored.kind} layers need an x86-64 processor with AVX2 (fbgemm), which this one is not: "
            "export the snapshot with fp32 or bf16 layers"
        )
    if stored.kind == "fp16":
        return _Half(stored, relu)
    if on_gpu:
        return _GpuInt8(stored, relu, device)
    if stored.activation is None:
        return _RowInt8(stored, relu, nonnegative)
    return _FixedInt8(stored, relu)


def layer_bytes(kind: str, outputs: int, inputs: int, bias: bool) -> int:
    """Stored bytes of a layer: weights, a float32 bias, and the float32 scales of int8."""
    vectors = int(bias) + int(kind == "int8")
    return outputs * (inputs * DTYPES[kind].itemsize + 4 * vectors)


class _Layer(nn.Module):
    """Keeps packed weights out of state dicts, pickles and copies: some are addresses in this process."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.relu = relu

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("a packed layer cannot be pickled or copied: make another from its StoredLayer")


class _Float(_Layer):
    """Native linear in the type of the weights; the output becomes float32."""

    def __init__(self, stored: StoredLayer, relu: bool, device: torch.device) -> None:
        super().__init__(relu)
        self.weight = stored.weight.to(device)
        self.bias = None if stored.bias is None else stored.bias.to(device, self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return (torch.relu_(y) if self.relu else y).to(torch.float32)


class _Half(_Layer):
    """float16 weights, float32 inputs and sums (fbgemm).

    `quantized.linear_dynamic_fp16` runs the same kernel with more than twice the overhead at one row.
    """

    def __init__(self, stored: StoredLayer, relu: bool) -> None:
        super().__init__(relu)
        self.bias = _bias(stored)
        with _alone_and_quiet():
            # torch announces the operator's removal once, at the first call: spend that here.
            self.packed = torch.fbgemm_pack_gemm_matrix_fp16(stored.weight.to(torch.float32))
            self(torch.zeros(0, stored.weight.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fbgemm_linear_fp16_weight_fp32_activation(x, self.packed, self.bias)
        return torch.relu_(y) if self.relu else y


class _FixedInt8(_Layer):
    """int8 weights, the input quantised in a fixed range (fbgemm): quantisation, bias and ReLU are fused."""

    def __init__(self, stored: StoredLayer, relu: bool) -> None:
        super().__init__(relu)
        assert stored.activation is not None
        self.scale, self.zero_point = affine(*stored.activation, ACTIVATION_BITS)
        self.packed = _packed(stored, _bias(stored))
        self.operator = _fused(relu)

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x, self.scale, self.zero_point, self.packed)


class _RowInt8(_Layer):
    """int8 weights, each row of the input quantised in its own range: no row depends on its batch.

    fbgemm's operator with dynamic ranges takes one range for the batch. Here rows are brought to a step
    of one first, the fused operator then quantises with scale 1, and the output is scaled back.
    """

    def __init__(self, stored: StoredLayer, relu: bool, nonnegative: bool) -> None:
        super().__init__(relu)
        assert stored.scale is not None
        self.nonnegative = nonnegative
        self.packed = _packed(stored, None)
        self.operator = _fused(False)
        self.sums = stored.weight.sum(1, dtype=torch.int32).to(torch.float32) * stored.scale
        self.bias = _bias(stored)

    def forward(self, x: Tensor) -> Tensor:
        if self.nonnegative:
            # Every zero point is 0, and what it stands in can be left out.
            step = _step(x.amax(1, keepdim=True))
            y = self.operator(x.div(step), 1.0, 0, self.packed).mul_(step).add_(self.bias)
            return torch.relu_(y) if self.relu else y
        step, zero = row_steps(x)
        y = self.operator(x.div(step).sub_(zero), 1.0, 0, self.packed)
        # One operation at a time: fused forms round differently from processor to processor.
        y.add_(zero * self.sums).mul_(step).add_(self.bias)
        return torch.relu_(y) if self.relu else y


class _GpuInt8(_Layer):
    """The integers of the CPU's int8 layers through `torch._int_mm`; not measured."""

    def __init__(self, stored: StoredLayer, relu: bool, device: torch.device) -> None:
        super().__init__(relu)
        assert stored.scale is not None
        outputs, inputs = stored.weight.shape
        # cuBLASLt takes multiples of 8 alone.
        padded = torch.zeros(_up(outputs), _up(inputs), dtype=torch.int8, device=device)
        padded[:outputs, :inputs] = stored.weight.to(device)
        self.weight, self.padded_sums = padded.t(), padded.sum(1, dtype=torch.int32)
        self.outputs, self.inputs = outputs, inputs
        self.sums = self.padded_sums[:outputs]
        self.scale, self.bias = stored.scale.to(device), _bias(stored).to(device)
        self.fixed = None if stored.activation is None else affine(*stored.activation, ACTIVATION_BITS)

    def forward(self, x: Tensor) -> Tensor:
        if self.fixed is None:
            step, zero = row_steps(x)
            sums = self.multiply(torch.round(x.div(step).sub_(zero)))
            y = sums.to(torch.float32).mul_(self.scale)
            y.add_(zero * (self.sums.to(torch.float32) * self.scale)).mul_(step).add_(self.bias)
        else:
            scale = torch.tensor(self.fixed[0], dtype=torch.float32, device=x.device)
            sums = self.multiply(fixed_levels(x, scale, self.fixed[1])) - self.fixed[1] * self.sums
            y = fused_multiply_add(sums.to(torch.float32), scale * self.scale, self.bias)
        return torch.relu_(y) if self.relu else y

    def multiply(self, levels: Tensor) -> Tensor:
        """Products of levels 0 to 255, float32 [B, K], with the weights: int32 [B, N]."""
        rows = levels.shape[0]
        # At least 17 rows are needed. What is added meets weights of zero, or is cut off.
        padded = levels.new_zeros(max(rows, 32), self.weight.shape[0])
        padded[:rows, : self.inputs] = levels
        return products(padded, self.weight, self.padded_sums)[:rows, : self.outputs]


def row_steps(x: Tensor) -> tuple[Tensor, Tensor]:
    """Step and zero point, float32 [B, 1], of each row of float32 [B, K]: x is near step * (q + zero).

    The zero points are integers between -255 and 0; q lies between 0 and 255.
    """
    low, high = x.amin(1, keepdim=True).clamp_max_(0.0), x.amax(1, keepdim=True).clamp_min_(0.0)
    step = _step(high.sub_(low))
    return step, low.div_(step).floor_()


def _step(width: Tensor) -> Tensor:
    """Step of rows whose values span `width` [B, 1], which is overwritten."""
    return width.mul_(1.0 / ROW_STEPS).clamp_min_(torch.finfo(torch.float32).tiny)


def _store_int8(weight: Tensor, bias: Tensor | None, activation: tuple[float, float] | None) -> StoredLayer:
    if weight.shape[1] > MOST_INPUTS:
        raise ValueError(
            f"an int8 layer has at most {MOST_INPUTS} inputs, not {weight.shape[1]}: choose another type"
        )
    if activation is not None:
        low, high = activation
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(
                f"the range of a layer's input must be finite, low before high, not {activation}"
            )
    scale = weight.abs().amax(1) / WEIGHT_LIMIT
    # A row of zeros, or of values so small that their scale is not normal, is stored as zeros.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    integers = torch.round(weight / scale[:, None]).clamp_(-WEIGHT_LIMIT, WEIGHT_LIMIT).to(torch.int8)
    return StoredLayer(kind="int8", weight=integers, bias=bias, scale=scale, activation=activation)


def _check(stored: StoredLayer) -> None:
    """Refuse tensors that do not belong together: an operator would read past their ends."""
    weight, bias, scale = stored.weight, stored.bias, stored.scale
    if stored.kind not in LAYER_TYPES or weight.dtype != DTYPES[stored.kind] or weight.dim() != 2:
        raise ValueError(f"a {stored.kind} layer cannot have a weight {weight.dtype} {list(weight.shape)}")
    for name, vector in (("bias", bias), ("scale", scale)):
        if vector is not None and (vector.dtype != torch.float32 or vector.shape != weight.shape[:1]):
            raise ValueError(
                f"the {name} of a layer with {weight.shape[0]} outputs must be float32 [{weight.shape[0]}], "
                f"not {vector.dtype} {list(vector.shape)}"
            )
    if stored.kind != "int8":
        return
    if scale is None:
        raise ValueError("an int8 layer needs the scales of its outputs: its file has none")
    if int(weight.to(torch.int16).abs().max()) > WEIGHT_LIMIT or weight.shape[1] > MOST_INPUTS:
        raise ValueError(
            f"an int8 layer has weights between -{WEIGHT_LIMIT} and {WEIGHT_LIMIT} and at most {MOST_INPUTS} "
            "inputs, else its sums would overflow: this one is not what store_layer makes"
        )


def _engines() -> list[str]:
    """Quantised operators that this build has and this processor can run."""
    return torch.backends.quantized.supported_engines


def _bias(stored: StoredLayer) -> Tensor:
    return torch.zeros(len(stored.weight)) if stored.bias is None else stored.bias


def _packed(stored: StoredLayer, bias: Tensor | None) -> torch.ScriptObject:
    """Weights in fbgemm's layout."""
    assert stored.scale is not None
    # The removal of quantised tensors from torch is announced; fbgemm's operators take nothing else.
    with _alone_and_quiet():
        engine = torch.backends.quantized.engine
        zeros = torch.zeros(len(stored.scale), dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(stored.weight, stored.scale.double(), zeros, 0)
        try:
            torch.backends.quantized.engine = "fbgemm"  # decides whose layout the next line packs
            return torch.ops.quantized.linear_prepack(weight, bias)
        finally:
            torch.backends.quantized.engine = engine


@contextmanager
def _alone_and_quiet() -> Iterator[None]:
    """One thread at a time, without warnings: filters and the engine are the process's, and two threads that
    put back what each of them found would leave the other's in place."""
    with _packing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _fused(relu: bool) -> torch._ops.OpOverload:
    """The overload itself: looking it up at each call costs a microsecond."""
    if relu:
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_relu_output_fp32.default
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default


def _refuse_rows(bad: Tensor, what: str) -> None:
    if bool(bad.any()):
        first = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"{int(bad.sum())} of {len(bad)} outputs have {what}, the first of them output {first}"
        )


def _up(size: int) -> int:
    return -(-size // 8) * 8
