"""Packed tiles: group kinds, tile entries and tile data (docs/FORMAT.md, section 4.2), into scratch slots."""

import numpy as np
from numpy.typing import NDArray

from tightrec.kernels.cpu.floats import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Words,
    copy_words,
    f32,
    i64,
    load_values,
    own_bits,
    u32,
)
from tightrec.kernels.cpu.jit import inner, loop
from tightrec.kernels.cpu.lanes import plane_word
from tightrec.kernels.cpu.quantise import EXCEPTION, EXCEPTION_BIT, code_group, half_misses, receive_values
from tightrec.kernels.cpu.work import MISSES_BFLOAT16, MISSES_FLOAT16, EncodeWork
from tightrec.kernels.format import (
    GROUP_VALUES,
    KIND_MIXED,
    KIND_RAW,
    MAX_KIND,
    SEGMENT_TILES,
    TILE_GROUPS,
    TILE_VALUES,
    Request,
)

_HALF = int(Request.HALF)
_PACKED = int(Request.PACKED)
_DEDUP = int(Request.DEDUP)
_AUTO = int(Request.AUTO)


@inner
def bit_length(number: int) -> int:
    """Bits of a number below 2^24: 0 for 0, 1 for 1, 2 for 2 and 3."""
    return max(0, (i64(f32(number).view(np.int32)) >> 23) - 126)


@inner
def count_bits(word: np.uint32) -> int:
    """Number of bits set in a word."""
    pairs = u32(word - u32(u32(word >> u32(1)) & u32(0x55555555)))
    fours = u32(u32(pairs & u32(0x33333333)) + u32(u32(pairs >> u32(2)) & u32(0x33333333)))
    bytes_ = u32(u32(fours + u32(fours >> u32(4))) & u32(0x0F0F0F0F))
    return i64(u32(u32(bytes_ * u32(0x01010101)) >> u32(24)))


@inner
def plan_tile(
    bits: Words,
    codes: Words,
    kinds: NDArray[np.int64],
    count: int,
    dtype: int,
    step: np.float32,
    bound: np.float32,
) -> np.uint32:
    """Codes and group kinds of a tile of ``count`` values given as float32 bits; returns its tile entry."""
    inverse = f32(f32(1.0) / step)
    raw_words = GROUP_VALUES if dtype == FLOAT32 else GROUP_VALUES // 2
    lowest, highest, words = MAX_KIND, 0, 0
    for group in range((count + GROUP_VALUES - 1) // GROUP_VALUES):
        at = group * GROUP_VALUES
        every = code_group(bits, codes, at, dtype, inverse, step, bound)
        size = bit_length(u32(every & u32(~EXCEPTION)))
        kind = size
        if every >= EXCEPTION:
            exceptions = count_bits(plane_word(codes, at, u32(EXCEPTION_BIT)))
            size += 1 + (exceptions if dtype == FLOAT32 else (exceptions + 1) // 2)
            kind = KIND_MIXED + size
        if size >= raw_words:
            size, kind = raw_words, KIND_RAW
        kinds[group] = kind
        words += size
        lowest = min(lowest, kind)
        highest = max(highest, kind)
    planes = bit_length(highest - lowest)
    return u32(words + planes | lowest << 11 | planes << 17)


@inner
def _emit_raw(
    bits: Words,
    patterns: Words,
    at: int,
    dtype: int,
    step: np.float32,
    bound: np.float32,
    words: Words,
    to: int,
) -> int:
    """A raw group's words, what its values decode to; returns where the next word goes."""
    receive_values(bits[at:], patterns, GROUP_VALUES, dtype, step, bound)
    if dtype == FLOAT32:
        copy_words(patterns, 0, words, to, GROUP_VALUES)
        return to + GROUP_VALUES
    for i in range(GROUP_VALUES // 2):
        words[to + i] = u32(patterns[2 * i] | u32(patterns[2 * i + 1] << u32(16)))
    return to + GROUP_VALUES // 2


@inner
def _emit_exceptions(bits: Words, at: int, mask: np.uint32, dtype: int, words: Words, to: int) -> int:
    """The own bits of the values in ``mask``; returns where the next word goes."""
    half = False
    for i in range(GROUP_VALUES):
        if u32(mask >> u32(i)) & u32(1):
            own = own_bits(bits[at + i], dtype)
            if half:
                words[to - 1] = u32(words[to - 1] | u32(own << u32(16)))
            else:
                words[to] = own
                to += 1
            half = not half and dtype != FLOAT32
    return to


@inner
def emit_tile(
    bits: Words,
    codes: Words,
    patterns: Words,
    kinds: NDArray[np.int64],
    count: int,
    entry: np.uint32,
    dtype: int,
    step: np.float32,
    bound: np.float32,
    words: Words,
    to: int,
) -> None:
    """Write the tile data that ``plan_tile`` planned to ``words[to:]``."""
    base, planes = i64(entry) >> 11 & 0x3F, i64(entry) >> 17
    groups = (count + GROUP_VALUES - 1) // GROUP_VALUES
    for j in range(planes):
        plane = 0
        for group in range(groups):
            plane |= (kinds[group] - base >> j & 1) << group
        words[to] = u32(plane)
        to += 1
    for group in range(groups):
        kind, at = kinds[group], group * GROUP_VALUES
        if kind == KIND_RAW:
            to = _emit_raw(bits, patterns, at, dtype, step, bound, words, to)
            continue
        width, mask = kind, u32(0)
        if kind > KIND_RAW:
            mask = plane_word(codes, at, u32(EXCEPTION_BIT))
            words[to] = mask
            to += 1
            exceptions = count_bits(mask)
            width = kind - KIND_MIXED - 1 - (exceptions if dtype == FLOAT32 else (exceptions + 1) // 2)
        for j in range(width):
            words[to + j] = plane_word(codes, at, u32(j))
        to += width
        if mask:
            to = _emit_exceptions(bits, at, mask, dtype, words, to)


@inner
def _load(work: EncodeWork, block: int, mapped: bool, start: int, count: int, bits: Words) -> None:
    """Values of a block, or of its distinct rows, as float32 bits."""
    place = work.blocks[block]
    load_values(
        work.values32, work.values16, work.dtype, place, work.first[place[6] :], mapped, start, count, bits
    )


@inner
def pack_segment(
    work: EncodeWork,
    block: int,
    segment: int,
    mapped: bool,
    total: int,
    bits: Words,
    codes: Words,
    patterns: Words,
    kinds: NDArray[np.int64],
) -> int:
    """Pack one segment of a block's ``total`` values into its slot; returns its words."""
    first_tile = work.blocks[block, 4] + segment * SEGMENT_TILES
    start = segment * SEGMENT_TILES * TILE_VALUES
    bound = work.bounds[block]
    step = f32(bound * f32(2.0))
    at = first_tile * work.tile_words
    words = 0
    tiles = min(SEGMENT_TILES, (total - start + TILE_VALUES - 1) // TILE_VALUES)
    for tile in range(tiles):
        count = min(TILE_VALUES, total - start)
        _load(work, block, mapped, start, count, bits)
        entry = plan_tile(bits, codes, kinds, count, work.dtype, step, bound)
        emit_tile(bits, codes, patterns, kinds, count, entry, work.dtype, step, bound, work.slots, at + words)
        work.entries[first_tile + tile] = entry
        words += i64(entry) & 0x7FF
        start += TILE_VALUES
    return words


@inner
def directory_words(total: int) -> int:
    """Words of a packed payload of ``total`` values before the first tile's data."""
    tiles = (total + TILE_VALUES - 1) // TILE_VALUES
    return tiles + (tiles + SEGMENT_TILES - 1) // SEGMENT_TILES - 1


@inner
def pack_rows(work: EncodeWork, block: int, total: int) -> int:
    """Pack a block's distinct rows, ``total`` values, into its slots; returns the payload's words."""
    bits, codes = np.empty(TILE_VALUES, np.uint32), np.empty(TILE_VALUES, np.uint32)
    patterns, kinds = np.empty(GROUP_VALUES, np.uint32), np.empty(TILE_GROUPS, np.int64)
    unit = work.state[block, 6]
    words = directory_words(total)
    segments = (total + SEGMENT_TILES * TILE_VALUES - 1) // (SEGMENT_TILES * TILE_VALUES)
    for segment in range(segments):
        size = pack_segment(work, block, segment, True, total, bits, codes, patterns, kinds)
        work.unit_words[unit + segment, 0] = size
        words += size
    return words


@inner
def measure_rows(work: EncodeWork, block: int, total: int) -> int:
    """Words of the packed payload of a block's distinct rows, ``total`` values."""
    bits, codes = np.empty(TILE_VALUES, np.uint32), np.empty(TILE_VALUES, np.uint32)
    kinds = np.empty(TILE_GROUPS, np.int64)
    bound = work.bounds[block]
    step = f32(bound * f32(2.0))
    words = directory_words(total)
    for start in range(0, total, TILE_VALUES):
        count = min(TILE_VALUES, total - start)
        _load(work, block, True, start, count, bits)
        words += i64(plan_tile(bits, codes, kinds, count, work.dtype, step, bound)) & 0x7FF
    return words


@inner
def _misses(work: EncodeWork, block: int, segment: int, bits: Words) -> int:
    """Which 16-bit types miss the bound on a segment of a float32 block."""
    total = work.blocks[block, 1] * work.blocks[block, 3]
    start = segment * SEGMENT_TILES * TILE_VALUES
    stop = min(total, start + SEGMENT_TILES * TILE_VALUES)
    bound = work.bounds[block]
    missed = 0
    while start < stop and missed != MISSES_FLOAT16 | MISSES_BFLOAT16:
        count = min(TILE_VALUES, stop - start)
        _load(work, block, False, start, count, bits)
        if not missed & MISSES_FLOAT16 and half_misses(bits, count, FLOAT16, bound):
            missed |= MISSES_FLOAT16
        if not missed & MISSES_BFLOAT16 and half_misses(bits, count, BFLOAT16, bound):
            missed |= MISSES_BFLOAT16
        start += TILE_VALUES
    return missed


@loop
def pack_units(start: int, stop: int, work: EncodeWork) -> None:
    """Pack units start..stop where their request may send them packed, and test them for 16 bits."""
    bits, codes = np.empty(TILE_VALUES, np.uint32), np.empty(TILE_VALUES, np.uint32)
    patterns, kinds = np.empty(GROUP_VALUES, np.uint32), np.empty(TILE_GROUPS, np.int64)
    for unit in range(start, stop):
        block, segment = i64(work.units[unit, 0]), i64(work.units[unit, 1])
        request = work.request[block % work.tables]
        if request >= _PACKED and request != _DEDUP:
            total = work.blocks[block, 1] * work.blocks[block, 3]
            work.unit_words[unit, 0] = pack_segment(
                work, block, segment, False, total, bits, codes, patterns, kinds
            )
        if request in (_HALF, _AUTO):
            missed = MISSES_FLOAT16 | MISSES_BFLOAT16
            if work.dtype == FLOAT32:
                missed = _misses(work, block, segment, bits)
            work.unit_misses[unit] = missed
