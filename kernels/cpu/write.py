"""Payloads at their places in the frames: copies of packed tiles, raw and 16-bit values, index planes."""

import numpy as np

from tightrec.kernels.cpu.coded import write_coded
from tightrec.kernels.cpu.floats import (
    FLOAT32,
    Words,
    copy_words,
    i64,
    load_values,
    narrow_bfloat16,
    narrow_float16,
    own_bits,
    u32,
)
from tightrec.kernels.cpu.jit import inner, loop
from tightrec.kernels.cpu.rows import index_words
from tightrec.kernels.cpu.work import BOOK, DISTINCT, MODE, PLACE, EncodeWork
from tightrec.kernels.format import (
    CODEBOOK_BYTES,
    GROUP_VALUES,
    SEGMENT_TILES,
    TILE_VALUES,
    Mode,
)

_SEGMENT_VALUES = SEGMENT_TILES * TILE_VALUES
_RAW = int(Mode.RAW)
_FLOAT16 = int(Mode.FLOAT16)
_BFLOAT16 = int(Mode.BFLOAT16)
_PACKED = int(Mode.PACKED)
_DEDUP = int(Mode.DEDUP)
_DEDUP_ENTROPY = int(Mode.DEDUP_ENTROPY)


@inner
def _write_values(work: EncodeWork, block: int, segment: int, bits: Words) -> None:
    """A segment's values in modes raw, float16 and bfloat16, with the zeros after the last one."""
    place, mode = work.blocks[block], work.state[block, MODE]
    total = place[1] * place[3]
    stop = min(total, (segment + 1) * _SEGMENT_VALUES)
    at = work.state[block, PLACE]
    for start in range(segment * _SEGMENT_VALUES, stop, TILE_VALUES):
        count = min(TILE_VALUES, stop - start)
        load_values(work.values32, work.values16, work.dtype, place, work.first, False, start, count, bits)
        if mode == _RAW and work.dtype == FLOAT32:
            to = at // 4 + start
            copy_words(bits, 0, work.out32, to, count)
            continue
        to = at // 2 + start
        halves = work.out16[to : to + count]
        if mode == _FLOAT16:
            for i in range(count):
                halves[i] = np.uint16(narrow_float16(bits[i]))
        elif mode == _BFLOAT16:
            for i in range(count):
                halves[i] = np.uint16(narrow_bfloat16(bits[i]))
        else:
            for i in range(count):
                halves[i] = np.uint16(own_bits(bits[i], work.dtype))
        if start + count == total and total % 2:
            work.out16[at // 2 + total] = np.uint16(0)


@inner
def _write_packed(work: EncodeWork, block: int, segment: int, unit: int, at: int) -> None:
    """A segment's directory entries and tile data; ``at`` is the packed payload's first word of ``out``."""
    total = work.state[block, DISTINCT] * work.blocks[block, 3]
    if segment * _SEGMENT_VALUES >= total:
        return
    tiles = (total + TILE_VALUES - 1) // TILE_VALUES
    segments = (tiles + SEGMENT_TILES - 1) // SEGMENT_TILES
    words, before = work.unit_words[unit, 0], work.unit_words[unit, 1]
    if segment:
        work.out32[at + segment - 1] = u32(before)
    first = segment * SEGMENT_TILES
    here = min(SEGMENT_TILES, tiles - first)
    first_tile = work.blocks[block, 4] + first
    entry = at + segments - 1 + first
    copy_words(work.entries, first_tile, work.out32, entry, here)
    to = at + segments - 1 + tiles + before
    source = first_tile * work.tile_words
    copy_words(work.slots, source, work.out32, to, words)


@inner
def _write_index(work: EncodeWork, block: int, at: int) -> None:
    """The number of distinct rows and the index planes, from word ``at`` of ``out``."""
    rows, distinct = work.blocks[block, 1], work.state[block, DISTINCT]
    index = work.row_index[work.blocks[block, 6] :]
    planes = index_words(GROUP_VALUES, distinct)
    work.out32[at] = u32(distinct)
    at += 1
    for start in range(0, rows, GROUP_VALUES):
        for j in range(planes):
            plane = 0
            for i in range(min(GROUP_VALUES, rows - start)):
                plane |= (i64(index[start + i]) >> j & 1) << i
            work.out32[at] = u32(plane)
            at += 1


@inner
def _write_book(work: EncodeWork, block: int, at: int) -> None:
    """A block's codebook, from byte ``at`` of ``out``."""
    lengths = work.book_lengths[block % work.tables]
    for i in range(CODEBOOK_BYTES):
        work.out8[at + i] = np.uint8(lengths[2 * i] | lengths[2 * i + 1] << 4)


@loop
def write_units(start: int, stop: int, work: EncodeWork) -> None:
    """Write the payloads of units start..stop; a block's first unit writes what belongs to no segment."""
    bits = np.empty(TILE_VALUES, np.uint32)
    for unit in range(start, stop):
        block, segment = i64(work.units[unit, 0]), i64(work.units[unit, 1])
        mode, at = work.state[block, MODE], work.state[block, PLACE]
        head = 0
        if mode in (_DEDUP, _DEDUP_ENTROPY):
            head = 4 + 4 * index_words(work.blocks[block, 1], work.state[block, DISTINCT])
        if mode <= _BFLOAT16:
            _write_values(work, block, segment, bits)
        elif mode <= _DEDUP:
            if mode == _DEDUP and segment == 0:
                _write_index(work, block, at // 4)
            _write_packed(work, block, segment, unit, (at + head) // 4)
        elif segment == 0:
            if work.state[block, BOOK]:
                _write_book(work, block, at)
                at += CODEBOOK_BYTES
            if mode == _DEDUP_ENTROPY:
                _write_index(work, block, at // 4)
            write_coded(work, block, at + head)
