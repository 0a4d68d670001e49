"""Units of a call, and each block's bound from what its table was given (docs/FORMAT.md, section 5)."""

import math

import numpy as np

from tightrec.kernels.cpu.floats import Words, f32, load_values, u32
from tightrec.kernels.cpu.jit import inner, loop
from tightrec.kernels.cpu.work import CODED, DISTINCT, FIRST_UNIT, EncodeWork
from tightrec.kernels.format import (
    GROUP_VALUES,
    MAX_BOUND,
    MIN_BOUND,
    SEGMENT_TILES,
    TILE_VALUES,
    BoundKind,
    Request,
)

_ABSOLUTE = int(BoundKind.ABSOLUTE)
_RANGE = int(BoundKind.RANGE)
_RAW = int(Request.RAW)
_SEGMENT_VALUES = SEGMENT_TILES * TILE_VALUES


@loop
def plan_units(work: EncodeWork) -> int:
    """Number the segments of all blocks; returns how many there are."""
    unit = 0
    for block in range(work.blocks.shape[0] - 1):
        work.state[block, FIRST_UNIT] = unit
        work.state[block, DISTINCT] = work.blocks[block, 1]
        work.state[block, CODED] = 0
        total = work.blocks[block, 1] * work.blocks[block, 3]
        for segment in range((total + _SEGMENT_VALUES - 1) // _SEGMENT_VALUES):
            work.units[unit, 0] = block
            work.units[unit, 1] = segment
            unit += 1
    return unit


@inner
def _tree(lanes: np.ndarray) -> float:
    """Sum of 32 lanes by halves; they are overwritten."""
    distance = GROUP_VALUES // 2
    while distance:
        for lane in range(distance):
            lanes[lane] += lanes[lane + distance]
        distance //= 2
    return lanes[0]


@inner
def _resolve(work: EncodeWork, block: int, bits: Words, lanes: np.ndarray, sums: np.ndarray) -> np.float32:
    """The bound of a block whose table's is relative."""
    place = work.blocks[block]
    table = block % work.tables
    share = work.bound[table]
    total = place[1] * place[3]
    values = bits.view(f32)
    low, high, known = f32(np.inf), f32(-np.inf), 0
    for lane in range(GROUP_VALUES):
        sums[lane] = 0.0
    for start in range(0, total, TILE_VALUES):
        count = min(TILE_VALUES, total - start)
        load_values(work.values32, work.values16, work.dtype, place, work.first, False, start, count, bits)
        for i in range(count):
            finite = u32(bits[i] & u32(0x7F800000)) != u32(0x7F800000)
            low = values[i] if finite and values[i] < low else low
            high = values[i] if finite and values[i] > high else high
            known += 1 if finite else 0
            bits[i] = bits[i] if finite else u32(0)
        if work.bound_kind[table] != _RANGE:
            for lane in range(GROUP_VALUES):
                lanes[lane] = 0.0
            for group in range((count + GROUP_VALUES - 1) // GROUP_VALUES):
                for lane in range(GROUP_VALUES):
                    x = np.float64(values[group * GROUP_VALUES + lane])
                    lanes[lane] += x * x
            sums[start // TILE_VALUES % GROUP_VALUES] += _tree(lanes)
    if known == 0:
        return f32(MIN_BOUND)
    if work.bound_kind[table] == _RANGE:
        return f32(f32(share * high) - f32(share * low))
    return f32(share * f32(math.sqrt(_tree(sums) / np.float64(known))))


@inner
def _allowed(bound: np.float32) -> np.float32:
    """The bound within what the format allows."""
    # A NaN (an overflowing product on both ends) compares false and becomes the smallest bound.
    if not bound >= f32(MIN_BOUND):
        return f32(MIN_BOUND)
    return min(bound, f32(MAX_BOUND))


@loop
def resolve_bounds(start: int, stop: int, work: EncodeWork) -> None:
    """The absolute bounds of blocks start..stop that have rows and are not lossless, 0 for the others."""
    bits = np.empty(TILE_VALUES, np.uint32)
    lanes, sums = np.empty(GROUP_VALUES, np.float64), np.empty(GROUP_VALUES, np.float64)
    for block in range(start, stop):
        table = block % work.tables
        if work.blocks[block, 1] == 0 or work.request[table] == _RAW:
            work.bounds[block] = f32(0.0)
        elif work.bound_kind[table] == _ABSOLUTE:
            work.bounds[block] = _allowed(work.bound[table])
        else:
            work.bounds[block] = _allowed(_resolve(work, block, bits, lanes, sums))
