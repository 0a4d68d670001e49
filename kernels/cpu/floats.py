"""Float16 and bfloat16 by exact bit arithmetic, and tiles of values in and out of the caller's tensor.

In this package a value travels as its float32 bits in a uint32, whatever the tensor's dtype is; ``dtype`` is
the frame's field: 0 float32, 1 float16, 2 bfloat16. Widening keeps a NaN's payload, so that ``own_bits``
gives back every 16-bit pattern. A tensor is passed as two views of one memory, ``values32`` and
``values16``, so that each loop is compiled once instead of once for each dtype.

A block's values lie at ``offset + row * stride + column``; with ``mapped`` set, row r of the source is row
``rows[r]`` of the block (the distinct rows).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightrec.kernels.cpu.jit import inner

FLOAT32 = 0
FLOAT16 = 1
BFLOAT16 = 2

# Any, because Numba's numbers are plain ones of that type, and mypy's are not the same as int and bool.
u32: Any = np.uint32
i32: Any = np.int32
i64: Any = np.int64
f32: Any = np.float32
Words = NDArray[np.uint32]
Floats = NDArray[np.float32]
Halves = NDArray[np.uint16]
Rows = NDArray[np.int32]


@inner
def widen_float16(half: np.uint32) -> np.uint32:
    """Bits of the float32 that equals the float16 with these bits, a NaN with its payload."""
    sign = u32(u32(half & u32(0x8000)) << u32(16))
    magnitude = u32(u32(half & u32(0x7FFF)) << u32(13))
    normal = u32(magnitude + u32(112 << 23))
    # A denormal times 2^-24 is the difference of two normal floats, which is exact.
    small = f32(f32(u32(magnitude + u32(113 << 23)).view(f32)) - f32(2.0**-14)).view(u32)
    wide = small if magnitude < u32(1 << 23) else normal
    wide = u32(magnitude | u32(0x7F800000)) if magnitude >= u32(31 << 23) else wide
    return u32(sign | wide)


@inner
def narrow_float16(bits: np.uint32) -> np.uint32:
    """Bits of the float16 nearest to these float32 bits, ties to even; NaN keeps its upper payload."""
    sign = u32(u32(bits >> u32(16)) & u32(0x8000))
    magnitude = u32(bits & u32(0x7FFFFFFF))
    odd = u32(u32(magnitude >> u32(13)) & u32(1))
    normal = u32(u32(u32(magnitude + u32(0xFFF)) + odd) - u32(112 << 23)) >> u32(13)
    normal = min(u32(normal), u32(0x7C00))
    # The spacing of floats from 0.5 on is the smallest float16 denormal: the sum rounds as it should.
    small = u32(f32(f32(u32(magnitude).view(f32)) + f32(0.5)).view(u32) - u32(126 << 23))
    half = small if magnitude < u32(113 << 23) else normal
    other = u32(u32(0x7C00) | u32(u32(magnitude >> u32(13)) & u32(0x3FF)))
    half = other if magnitude > u32(0x7F800000) else half
    half = u32(0x7C00) if magnitude == u32(0x7F800000) else half
    return u32(sign | half)


@inner
def narrow_bfloat16(bits: np.uint32) -> np.uint32:
    """Bits of the bfloat16 nearest to these float32 bits, ties to even; NaN keeps its upper payload."""
    odd = u32(u32(bits >> u32(16)) & u32(1))
    rounded = u32(u32(u32(bits + u32(0x7FFF)) + odd) >> u32(16))
    return u32(bits >> u32(16)) if u32(bits & u32(0x7FFFFFFF)) > u32(0x7F800000) else rounded


@inner
def own_bits(bits: np.uint32, dtype: int) -> np.uint32:
    """The value's pattern in its own dtype, from its float32 bits."""
    if dtype == FLOAT32:
        return bits
    if dtype == FLOAT16:
        return narrow_float16(bits)
    return u32(bits >> u32(16))


@inner
def _load_run(
    values32: Words, values16: Halves, dtype: int, source: int, count: int, bits: Words, at: int
) -> None:
    """Widen ``count`` adjacent values into ``bits[at:]``."""
    target = bits[at : at + count]
    if dtype == FLOAT32:
        words = values32[source : source + count]
        for i in range(count):
            target[i] = words[i]
    else:
        halves = values16[source : source + count]
        if dtype == FLOAT16:
            for i in range(count):
                target[i] = widen_float16(u32(halves[i]))
        else:
            for i in range(count):
                target[i] = u32(u32(halves[i]) << u32(16))


@inner
def copy_words(source: Words, at: int, target: Words, to: int, count: int) -> None:
    """Copy ``count`` words; a loop, since assigning a slice takes Numba a second to compile."""
    words, places = source[at : at + count], target[to : to + count]
    for i in range(count):
        places[i] = words[i]


@inner
def load_values(
    values32: Words,
    values16: Halves,
    dtype: int,
    block: NDArray[np.int64],
    rows: Rows,
    mapped: bool,
    start: int,
    count: int,
    bits: Words,
) -> None:
    """Values start .. start+count of a block as float32 bits, followed by zeros up to a multiple of 32."""
    offset, stride, dim = block[0], block[2], block[3]
    if stride == dim and not mapped:
        _load_run(values32, values16, dtype, offset + start, count, bits, 0)
    else:
        row = start // dim
        column = start - row * dim
        at = 0
        while at < count:
            run = min(dim - column, count - at)
            line = rows[row] if mapped else row
            _load_run(values32, values16, dtype, offset + line * stride + column, run, bits, at)
            at += run
            row += 1
            column = 0
    for i in range(count, (count + 31) // 32 * 32):
        bits[i] = u32(0)


@inner
def _store_run(
    values32: Words, values16: Halves, dtype: int, target: int, count: int, bits: Words, at: int
) -> None:
    """Write ``count`` patterns from ``bits[at:]`` to adjacent values."""
    source = bits[at : at + count]
    if dtype == FLOAT32:
        words = values32[target : target + count]
        for i in range(count):
            words[i] = source[i]
    else:
        halves = values16[target : target + count]
        for i in range(count):
            halves[i] = np.uint16(source[i])


@inner
def store_values(
    values32: Words,
    values16: Halves,
    dtype: int,
    block: NDArray[np.int64],
    rows: Rows,
    mapped: bool,
    start: int,
    count: int,
    bits: Words,
) -> None:
    """Write patterns (in the tensor's own dtype) to values start .. start+count of a block."""
    offset, stride, dim = block[0], block[2], block[3]
    if stride == dim and not mapped:
        _store_run(values32, values16, dtype, offset + start, count, bits, 0)
    else:
        row = start // dim
        column = start - row * dim
        at = 0
        while at < count:
            run = min(dim - column, count - at)
            line = rows[row] if mapped else row
            _store_run(values32, values16, dtype, offset + line * stride + column, run, bits, at)
            at += run
            row += 1
            column = 0
