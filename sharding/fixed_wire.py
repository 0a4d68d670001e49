"""torchrec's fixed-rate formats (fp16, bf16, int8, fp8, mx4) in the bytes of the project's own exchange.

torchrec's quantised collectives hand a tensor of the format's own dtype to the process group, so what runs
depends on backend and collective. Here the quantised values are bytes in an all-to-all, and sums are made
after decoding: bf16 is bf16 on gloo too, and every type of sharding works in every format. The quantisers
are fbgemm's, made by torchrec's own factory (Yang et al., "Training Deep Learning Recommendation Model with
Quantized Collective Communications", DLP-KDD 2020): where groups start at the same value, the numbers are
those of torchrec's all-to-all.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tightrec.sharding.codecs import INT8_GROUP, MX4_GROUP, quantisers
from tightrec.sharding.config import CodecName

FixedName = Literal["fp16", "bf16", "int8", "fp8", "mx4"]
FIXED_NAMES: tuple[str, ...] = get_args(FixedName)

_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_FP8_GROUP = 32
# int8 keeps scale and offset, fp8 its scale and four zero bytes: two float32 behind each group.
_SCALE_BYTES = 8
# fbgemm's CUDA kernels write those two as float32.
_ALIGNMENT = 4


def refusal(name: CodecName, device_type: str) -> str | None:
    """Why the format ``name`` cannot run on this type of device; None if it can."""
    if name == "fp8" and device_type == "cpu":
        return "fbgemm has no fp8 quantiser on CPU"
    return None


def fp8_group(dim: int) -> int:
    """Values that share a scale in fp8: a row where that is worth its 8 bytes, else 32.

    fbgemm reads back only groups of a multiple of 4 values, and in groups below 16 the scales cost so much
    that bf16 is about as small. ``codec_registry`` gives torchrec ``dim`` in any case.
    """
    return dim if dim >= 16 and dim % 4 == 0 else _FP8_GROUP


class FixedCodec:
    """One fixed-rate format for one direction of the exchange.

    What goes to peer p is a *run* of ``counts[p]`` float32 values; the runs lie back to back, on the wire as
    in memory. A run is cut into groups from its own start, so no group holds values for two peers; the last
    group is filled up with zeros, which are sent. Sizes follow from the counts alone: nothing is
    synchronised, and both sides know them.

    ======  ======  ===============  =============================================================
    name    group   bytes a group    in a group
    ======  ======  ===============  =============================================================
    fp16    1       2                clamped to the largest finite value
    bf16    1       2                clamped to the largest finite value
    int8    32      40               255 steps from the least to the largest value
    fp8     G(dim)  G + 8            1-4-3 bits forward, 1-5-2 backward, scaled by the largest value
    mx4     32      17               1-2-1 bits, one shared power of two
    ======  ======  ===============  =============================================================

    G is ``fp8_group``.

    Zero: exact in every format, except in an int8 group with a negative value, where it may come back off
    by up to half a step.

    NaN and Inf: fp16 and bf16 keep NaN and clamp Inf. In int8, fp8 and mx4 they spoil their own group and
    no other, but may come back as finite values: on CPU, NaN in int8 becomes finite, Inf makes its
    group NaN, and mx4 makes a group with either all zeros. Whoever watches for NaN looks before encoding.

    One object serves one stream at a time: encoding and decoding share a buffer.
    """

    def __init__(
        self,
        name: CodecName,
        direction: Literal["forward", "backward"],
        dim: int,
        device: torch.device,
    ) -> None:
        """Prepare the format; nothing is allocated on the device.

        Args:
            name: one of ``FIXED_NAMES``.
            direction: pooled embeddings (forward) or their gradients; fp8 has another format for each.
            dim: fp8 shares a scale over ``fp8_group(dim)`` values. Where a run holds rows of several dims,
                give their greatest common divisor: then no group straddles two rows, or groups are 32
                values, whichever rows they are of. The other formats do not read it.
            device: where tensors will be.

        Raises:
            ValueError: the name is none of a fixed format, or the format cannot run on this device.
        """
        if name not in FIXED_NAMES:
            raise ValueError(
                f"codec.{direction}={name} is no fixed-rate format. Use one of {', '.join(FIXED_NAMES)}."
            )
        why = refusal(name, device.type)
        if why:
            raise ValueError(
                f"codec.{direction}={name} cannot run on {device.type}: {why}. Use codec.{direction}=int8, "
                "which has about the same size."
            )
        self.name = name
        self._half = _HALVES.get(name)
        groups = {"int8": INT8_GROUP, "fp8": fp8_group(dim), "mx4": MX4_GROUP}
        self.group: int = groups.get(name, 1)
        """Values of one group."""
        sizes = {
            "int8": self.group + _SCALE_BYTES,
            "fp8": self.group + _SCALE_BYTES,
            "mx4": self.group // 2 + 1,
        }
        self.group_bytes: int = sizes.get(name, 2)
        """Wire bytes of one group."""
        both = quantisers(name, name, self.group)
        self._quantiser: Any = getattr(both, direction)
        self._context: Any = self._quantiser.create_context()
        if self._context is not None:
            # Encoding would set it, but a rank that holds no table only decodes.
            self._context.row_dim_quant = self.group_bytes
        # fbgemm has operators that write into a given tensor for int8 on CPU alone.
        self._in_place = name == "int8" and device.type == "cpu"
        self._buffer: Tensor | None = None
        self._zeros: Tensor | None = None

    def encoded_bytes(self, counts: Sequence[int]) -> list[int]:
        """Wire bytes of each peer's run of ``counts[p]`` values; 0 for an empty run."""
        return [-(-count // self.group) * self.group_bytes for count in counts]

    def encode(self, flat: Tensor, counts: Sequence[int], out: Tensor) -> Tensor:
        """Quantise the runs of all peers.

        Args:
            flat: float32 [sum of counts], contiguous.
            counts: values of each peer's run.
            out: uint8 [at least the sum of ``encoded_bytes(counts)``], contiguous and aligned to 4 bytes.

        Returns:
            The front of ``out``, uint8 [sum of ``encoded_bytes(counts)``].

        Raises:
            ValueError: a tensor has another dtype, shape, size or alignment.
        """
        total = sum(counts)
        _require("flat", flat, torch.float32, total, exact=True)
        size = sum(self.encoded_bytes(counts))
        _require("out", out, torch.uint8, size, exact=False)
        wire = out[:size]
        if not total:
            return wire
        if self._half is not None:
            # Clamping after the cast gives the values of fbgemm's clamp before it, without a copy.
            limits = torch.finfo(self._half)
            wire.view(self._half).copy_(flat).clamp_(limits.min, limits.max)
            return wire
        values = self._padded(flat, counts)
        if self._in_place:
            torch.ops.fbgemm.FloatToFused8BitRowwiseQuantizedOut(
                wire.view(-1, self.group_bytes), values.view(-1, self.group)
            )
        else:
            wire.copy_(self._quantiser.encode(values, self._context))
        return wire

    def decode(self, wire: Tensor, counts: Sequence[int], out: Tensor) -> Tensor:
        """Read back what ``encode`` wrote, each run by its sender's codec of the same name and direction.

        Args:
            wire: uint8 [sum of ``encoded_bytes(counts)``], contiguous and aligned to 4 bytes.
            counts: values of each peer's run.
            out: float32 [at least the sum of counts], contiguous.

        Returns:
            The front of ``out``, float32 [sum of counts].

        Raises:
            ValueError: a tensor has another dtype, shape, size or alignment.
        """
        total = sum(counts)
        size = sum(self.encoded_bytes(counts))
        _require("wire", wire, torch.uint8, size, exact=True)
        _require("out", out, torch.float32, total, exact=False)
        flat = out[:total]
        if not total:
            return flat
        if self._half is not None:
            return flat.copy_(wire.view(self._half))
        whole = self._padding(counts) == 0
        if self._in_place:
            values = flat if whole else self._scratch(flat, size // self.group_bytes * self.group)
            torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloatOut(
                values.view(-1, self.group), wire.view(-1, self.group_bytes)
            )
        else:
            values = self._quantiser.decode(wire, self._context)
            if whole:
                flat.copy_(values)
        if not whole:
            torch.cat([values[start:stop] for start, stop in self._runs(counts)], out=flat)
        return flat

    def _padding(self, counts: Sequence[int]) -> int:
        """Zeros that fill up the last groups of all runs."""
        return sum(-count % self.group for count in counts)

    def _runs(self, counts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Where each run lies among the values with padding."""
        starts = accumulate((count + -count % self.group for count in counts), initial=0)
        return ((start, start + count) for start, count in zip(starts, counts, strict=False))

    def _padded(self, flat: Tensor, counts: Sequence[int]) -> Tensor:
        """The values with every run filled up to whole groups; ``flat`` itself where all runs are."""
        padding = self._padding(counts)
        if not padding:
            return flat
        values = self._scratch(flat, len(flat) + padding)
        if self._zeros is None:
            self._zeros = flat.new_zeros(self.group)
        # One concatenation is one launch on CUDA, whatever the number of peers.
        pieces = []
        for run, count in zip(flat.split(list(counts)), counts, strict=True):
            pieces += [run, self._zeros[: -count % self.group]]
        return torch.cat(pieces, out=values)

    def _scratch(self, like: Tensor, size: int) -> Tensor:
        if self._buffer is None or len(self._buffer) < size:
            self._buffer = like.new_empty(size)
        return self._buffer[:size]


def _require(what: str, tensor: Tensor, dtype: torch.dtype, size: int, *, exact: bool) -> None:
    fits = tensor.numel() == size if exact else tensor.numel() >= size
    if tensor.dtype != dtype or tensor.ndim != 1 or not tensor.is_contiguous() or not fits:
        raise ValueError(
            f"{what} is {tensor.dtype} of shape {list(tensor.shape)}; these counts need a contiguous {dtype} "
            f"tensor of one dimension and {'' if exact else 'at least '}{size} elements."
        )
    if tensor.data_ptr() % _ALIGNMENT:
        raise ValueError(
            f"{what} starts at an address that is no multiple of {_ALIGNMENT}. Give it its own buffer."
        )
