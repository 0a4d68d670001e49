"""Rows of embedding tables as bytes, in the layout that fbgemm's inference operator reads.

Row-wise int8, int4 and int2 are those of the low-precision inference paper (arXiv 2105.12676), with an fp16
scale and bias in front of the values, as fbgemm's operator has it. The greedy search is torch's, from Guan et
al., "Post-Training 4-bit Quantization on Embedding Tables" (arXiv 1911.02079).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import fbgemm_gpu  # noqa: F401  its import registers torch.ops.fbgemm
import torch
from torch import Tensor

from tightrec.snapshot.precision import ROW_SEARCHES, TABLE_TYPES

BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4, "int2": 2}
"""Of one value."""

SCALE_BIAS_BYTES = 4
"""fp16 scale, then fp16 bias, in front of an integer row."""

DIM_MULTIPLE = 4
"""Of values in a row, for every type: fbgemm's operator asks for it, and int2 fills its bytes with it."""

_CHUNK_VALUES = 1 << 19
"""Values that are worked on at a time, which bounds the extra memory: tens of bytes for each."""

_GREEDY = {"int4": (200, 0.16), "int2": (50, 0.6)}
"""Bins, and the share of the range that the search may cut off, one bin at a time. Rows of normal, uniform
and Student's t values end above 84 % of their range in int4; int2 needs down to 40 %, and finer bins gain
nothing."""

_GREEDY_RELATIVE_RANGE = 2.0**-14
_GREEDY_LEAST_SCALE = 2.0**-20
"""Least range of a row, relative to its largest value, and least min-max scale. Where a bin's width is lost
in float32's rounding, torch's search never returns; below this it has little to gain anyway."""

_HALF_MAX = 65504


def row_bytes(kind: str, dim: int) -> int:
    """Bytes of one row of ``dim`` values, without the padding that a device may ask for.

    Raises:
        ValueError: Unknown type, or a dim that the operator cannot have.
    """
    if kind not in TABLE_TYPES:
        raise ValueError(f"table type {kind!r} is unknown: choose one of {', '.join(TABLE_TYPES)}")
    if dim <= 0 or dim % DIM_MULTIPLE:
        raise ValueError(f"embedding dim {dim} cannot be stored: it has to be a multiple of {DIM_MULTIPLE}")
    return dim * BITS[kind] // 8 + (SCALE_BIAS_BYTES if kind.startswith("int") else 0)


def pack(rows: Tensor, kind: str, row_search: str = "greedy") -> Tensor:
    """Stores rows as ``kind``.

    Integer rows get the largest fp16 bias that is not above their minimum and the smallest fp16 scale that
    reaches their maximum: no value is clipped, each is at most half a stored step off (and what float32
    rounds away), however small the range. With ``greedy``, int4 and int2 rows whose L2 error is lower with
    torch's narrowed range have that instead. Rows of zeros come back as exact zeros in every type.

    Args:
        rows: float32 [R, D] on the CPU, may be memory-mapped; D a multiple of 4.
        kind: See TABLE_TYPES.
        row_search: See ROW_SEARCHES; only int4 and int2 heed it.

    Returns:
        uint8 [R, row_bytes]; shares the memory of contiguous ``rows`` where the type is fp32.

    Raises:
        ValueError: Unknown words, another shape, or a row that the type cannot hold (by its number).
    """
    if row_search not in ROW_SEARCHES:
        raise ValueError(f"row search {row_search!r} is unknown: choose one of {', '.join(ROW_SEARCHES)}")
    if rows.dtype != torch.float32 or rows.dim() != 2 or rows.device.type != "cpu":
        got = f"{rows.dtype} {list(rows.shape)} on {rows.device}"
        raise ValueError(f"rows to store have to be float32 [R, D] on the CPU, not {got}")
    rows = rows.detach()
    width = row_bytes(kind, rows.shape[1])
    fp32 = kind == "fp32"
    out = rows.contiguous().view(torch.uint8) if fp32 else torch.empty(len(rows), width, dtype=torch.uint8)
    for start, stop in _chunks(len(rows), rows.shape[1]):
        chunk = rows[start:stop].contiguous()
        _refuse(~torch.isfinite(chunk).all(dim=1), chunk, start, "holds NaN or Inf", "repair the table")
        if kind == "fp16":
            half = chunk.half()
            what = f"goes beyond fp16 ({_HALF_MAX:g})"
            _refuse(torch.isinf(half).any(dim=1), chunk, start, what, "store the table as fp32")
            out[start:stop] = half.view(torch.uint8)
        elif not fp32:
            out[start:stop] = _pack_integers(chunk, kind, row_search, start)
    return out


def unpack(data: Tensor, kind: str, dim: int) -> Tensor:
    """Gives the values of stored rows, bit for bit what a lookup of a bag of one id gives on a CPU.

    Args:
        data: uint8 [R, row_bytes].
        kind: See TABLE_TYPES.
        dim: D, values in a row.

    Returns:
        float32 [R, D].

    Raises:
        ValueError: Unknown type, or data of another shape.
    """
    check_shape(data, kind, dim)
    out = torch.empty(len(data), dim)
    for start, stop in _chunks(len(data), dim):
        chunk = data[start:stop]
        # Added to a zero as in the operator, which turns -0 into +0. Code times scale is exact in float32.
        if kind in ("fp32", "fp16"):
            out[start:stop] = 0.0 + stored_floats(chunk, kind)
        else:
            codes, scale, bias = stored_integers(chunk, kind)
            out[start:stop] = (0.0 + bias) + codes.float() * scale
    return out


def check_shape(data: Tensor, kind: str, dim: int) -> None:
    """Holds stored rows to their type's shape.

    Raises:
        ValueError: ``data`` is not uint8 [R, row_bytes].
    """
    width = row_bytes(kind, dim)
    if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] != width:
        raise ValueError(
            f"{kind} rows of dim {dim} have to be uint8 [R, {width}], not {data.dtype} {list(data.shape)}"
        )


def stored_floats(data: Tensor, kind: str) -> Tensor:
    """The values of fp32 or fp16 rows: uint8 [R, row_bytes] -> float32 [R, D]."""
    # A slice of a memory-mapped file need not start where a float may.
    aligned = data.clone(memory_format=torch.contiguous_format)
    return aligned.view(torch.float32 if kind == "fp32" else torch.float16).float()


def stored_integers(data: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of int8, int4 or int2 rows; the first value of a byte has its lowest bits.

    Args:
        data: uint8 [R, row_bytes].
        kind: See TABLE_TYPES.

    Returns:
        Codes uint8 [R, D], scale float32 [R, 1], bias float32 [R, 1].
    """
    bits = BITS[kind]
    head = data[:, :SCALE_BIAS_BYTES].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
    codes = data[:, SCALE_BIAS_BYTES:]
    if bits < 8:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        codes = (codes[:, :, None] >> shifts & (1 << bits) - 1).flatten(1)
    return codes, head[:, :1], head[:, 1:]


def _chunks(rows: int, dim: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_VALUES // dim)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _refuse(bad: Tensor, chunk: Tensor, start: int, what: str, do: str) -> None:
    """Raises for the first bad row, if there is one."""
    if bad.any():
        row = int(bad.nonzero()[0])
        low, high = chunk[row].aminmax()
        raise ValueError(f"row {start + row} (from {low:g} to {high:g}) {what}: {do}")


def _pack_integers(chunk: Tensor, kind: str, row_search: str, start: int) -> Tensor:
    """float32 [r, D] -> uint8 [r, row_bytes]; ``start`` is the first row's number, for messages."""
    levels = (1 << BITS[kind]) - 1
    low, high = chunk.aminmax(dim=1)
    bias = _half_below(low.double())
    scale = -_half_below(-(high.double() - bias.double()) / levels)
    unheld = torch.isinf(bias) | torch.isinf(scale)
    _refuse(unheld, chunk, start, f"goes beyond an fp16 bias and scale of {kind}", "store the table as fp32")

    # With these two the library's own rounding to fp16 finds nothing to round.
    ends = torch.stack([bias.float(), (bias.double() + levels * scale.double()).float()], dim=1)
    if kind == "int8":
        fused = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalfWithRowwiseMinMax(chunk, 8, ends)
    elif kind == "int4":
        fused = torch.ops.quantized.embedding_bag_4bit_prepack_with_rowwise_min_max(chunk, ends)
    else:
        fused = torch.ops.quantized.embedding_bag_2bit_prepack_with_rowwise_min_max(chunk, ends)
    packed = _head_first(fused)
    if kind == "int8" or row_search == "min_max":
        return packed

    # The search does not see fp16's rounding and need not end better: each row keeps the better of the two.
    searched = high - low > _GREEDY_RELATIVE_RANGE * chunk.abs().amax(dim=1)
    searched &= scale > _GREEDY_LEAST_SCALE
    rows = chunk[searched]
    greedy = _greedy(rows, kind)
    better = _squared_error(greedy, rows, kind) < _squared_error(packed[searched], rows, kind)
    packed[searched] = torch.where(better[:, None], greedy, packed[searched])
    return packed


def _greedy(rows: Tensor, kind: str) -> Tensor:
    """torch's search, which works row by row on one thread: on as many threads as torch has."""
    quantized = torch.ops.quantized
    prepack = quantized.embedding_bag_4bit_prepack if kind == "int4" else quantized.embedding_bag_2bit_prepack
    bins, ratio = _GREEDY[kind]

    def search(part: Tensor) -> Tensor:
        return prepack(part, optimized_qparams=True, nbins=bins, ratio=ratio)

    threads = torch.get_num_threads()
    if threads == 1 or len(rows) < threads:
        return _head_first(search(rows))
    with ThreadPoolExecutor(threads) as pool:
        return _head_first(torch.cat(list(pool.map(search, rows.chunk(threads)))))


def _head_first(fused: Tensor) -> Tensor:
    """Moves scale and bias from the end of the rows, where the packing operators have them, to the front."""
    return torch.cat([fused[:, -SCALE_BIAS_BYTES:], fused[:, :-SCALE_BIAS_BYTES]], dim=1)


def _squared_error(packed: Tensor, chunk: Tensor, kind: str) -> Tensor:
    """Of each row: float64 [r]."""
    return (unpack(packed, kind, chunk.shape[1]).double() - chunk).square().sum(dim=1)


def _half_below(values: Tensor) -> Tensor:
    """The largest float16 not above each value, -Inf where there is none: float64 [n] -> float16 [n]."""
    half = values.half()
    bits = half.view(torch.int16)
    # Of a negative float16, -0 included, the next one down has the next larger bits; Inf's is 65504.
    below = torch.where(torch.signbit(half), bits + 1, bits - 1).view(torch.float16)
    return torch.where(half.double() > values, below, half)
