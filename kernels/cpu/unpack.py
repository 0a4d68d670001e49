"""Packed, raw and 16-bit payloads back to values, segment by segment (docs/FORMAT.md, 4.1 and 4.2).

Each segment starts where its directory word says and must end where the next one's does, the first at 0 and
the last at the payload's end: that proves all words of the directory. Nothing is read before its place is
known to lie in the payload.
"""

import numpy as np
from numpy.typing import NDArray

from tightrec.kernels.cpu.decode_work import AT, BOUND, DISTINCT, END, MODE, DecodeWork
from tightrec.kernels.cpu.floats import FLOAT32, Words, f32, i64, store_values, u32, widen_float16
from tightrec.kernels.cpu.jit import inner
from tightrec.kernels.cpu.lanes import add_plane, load_word
from tightrec.kernels.cpu.pack import count_bits
from tightrec.kernels.cpu.quantise import decode_group
from tightrec.kernels.format import (
    GROUP_VALUES,
    KIND_MIXED,
    KIND_RAW,
    MAX_CODE_PLANES,
    MAX_KIND,
    MAX_KIND_PLANES,
    SEGMENT_TILES,
    TILE_GROUPS,
    TILE_VALUES,
    Fault,
    Mode,
)

_PAYLOAD_SIZE = int(Fault.PAYLOAD_SIZE)
_DIRECTORY = int(Fault.DIRECTORY)
_GROUP_KIND = int(Fault.GROUP_KIND)
_MIXED_GROUP = int(Fault.MIXED_GROUP)
_RAW = int(Mode.RAW)
_FLOAT16 = int(Mode.FLOAT16)
_PACKED = int(Mode.PACKED)
_SEGMENT_VALUES = SEGMENT_TILES * TILE_VALUES


@inner
def step_of(work: DecodeWork, block: int) -> np.float32:
    """Twice the bound of a block."""
    return f32(u32(work.state[block, BOUND]).view(f32) * f32(2.0))


@inner
def store(work: DecodeWork, block: int, mapped: bool, start: int, count: int, patterns: Words) -> None:
    """Write patterns to values start .. start+count of a block, or of its distinct rows."""
    place = work.blocks[block]
    rows = work.first[place[6] :]
    store_values(work.values32, work.values16, work.dtype, place, rows, mapped, start, count, patterns)


@inner
def _half_word(buffer: NDArray[np.uint8], at: int) -> np.uint32:
    """A little-endian 16-bit number."""
    return u32(u32(buffer[at]) | u32(u32(buffer[at + 1]) << u32(8)))


@inner
def read_values(work: DecodeWork, block: int, segment: int, patterns: Words) -> int:
    """Values of one segment of a block in mode raw, float16 or bfloat16; the fault or 0."""
    place, state, buffer = work.blocks[block], work.state[block], work.buffer
    mode, total = state[MODE], place[1] * place[3]
    value_bytes = 4 if mode == _RAW and work.dtype == FLOAT32 else 2
    if state[END] - state[AT] != (total * value_bytes + 3) // 4 * 4:
        return _PAYLOAD_SIZE
    stop = min(total, (segment + 1) * _SEGMENT_VALUES)
    for start in range(segment * _SEGMENT_VALUES, stop, TILE_VALUES):
        count = min(TILE_VALUES, stop - start)
        at = state[AT] + start * value_bytes
        if value_bytes == 4:
            for i in range(count):
                patterns[i] = load_word(buffer, at + 4 * i)
        elif mode == _RAW:
            for i in range(count):
                patterns[i] = _half_word(buffer, at + 2 * i)
        elif mode == _FLOAT16:
            for i in range(count):
                patterns[i] = widen_float16(_half_word(buffer, at + 2 * i))
        else:
            for i in range(count):
                patterns[i] = u32(_half_word(buffer, at + 2 * i) << u32(16))
        store(work, block, False, start, count, patterns)
    return 0


@inner
def _own_bits(
    buffer: NDArray[np.uint8], at: int, mask: np.uint32, dtype: int, patterns: Words, to: int
) -> None:
    """Patterns of the values in ``mask`` from the words at byte ``at``."""
    for i in range(GROUP_VALUES):
        if u32(mask >> u32(i)) & u32(1):
            if dtype == FLOAT32:
                patterns[to + i] = load_word(buffer, at)
                at += 4
            else:
                patterns[to + i] = _half_word(buffer, at)
                at += 2


@inner
def _read_kinds(
    buffer: NDArray[np.uint8], at: int, entry: int, groups: int, raw_words: int, kinds: Words
) -> int:
    """Group kinds of a tile whose data starts at byte ``at``, checked against its entry; the fault or 0."""
    words, base, planes = entry & 0x7FF, entry >> 11 & 0x3F, entry >> 17
    for group in range(TILE_GROUPS):
        kinds[group] = u32(0)
    for j in range(planes):
        add_plane(kinds, 0, load_word(buffer, at + 4 * j), u32(j))
    total = planes
    for group in range(groups):
        kind = base + i64(kinds[group])
        if kind > MAX_KIND:
            return _GROUP_KIND
        kinds[group] = u32(kind)
        total += kind if kind < KIND_RAW else (raw_words if kind == KIND_RAW else kind - KIND_MIXED)
    return 0 if total == words else _DIRECTORY


@inner
def _read_tile(
    buffer: NDArray[np.uint8],
    at: int,
    entry: int,
    count: int,
    dtype: int,
    step: np.float32,
    kinds: Words,
    codes: Words,
    patterns: Words,
) -> int:
    """Patterns of a tile of ``count`` values whose data, of the entry's size, starts at byte ``at``."""
    raw_words = GROUP_VALUES if dtype == FLOAT32 else GROUP_VALUES // 2
    groups = (count + GROUP_VALUES - 1) // GROUP_VALUES
    fault = _read_kinds(buffer, at, entry, groups, raw_words, kinds)
    if fault:
        return fault
    at += 4 * (entry >> 17)
    for group in range(groups):
        kind, to = i64(kinds[group]), group * GROUP_VALUES
        if kind == KIND_RAW:
            _own_bits(buffer, at, u32(0xFFFFFFFF), dtype, patterns, to)
            at += 4 * raw_words
            continue
        width, mask, own_words = kind, u32(0), 0
        if kind > KIND_RAW:
            mask = load_word(buffer, at)
            at += 4
            exceptions = count_bits(mask)
            own_words = exceptions if dtype == FLOAT32 else (exceptions + 1) // 2
            width = kind - KIND_MIXED - 1 - own_words
            if exceptions == 0 or width < 0 or width > MAX_CODE_PLANES:
                return _MIXED_GROUP
        for i in range(GROUP_VALUES):
            codes[i] = u32(0)
        for j in range(width):
            add_plane(codes, 0, load_word(buffer, at + 4 * j), u32(j))
        at += 4 * width
        decode_group(codes, patterns[to:], 0, dtype, step)
        if mask:
            _own_bits(buffer, at, mask, dtype, patterns, to)
            at += 4 * own_words
    return 0


@inner
def read_packed(
    work: DecodeWork, block: int, segment: int, kinds: Words, codes: Words, patterns: Words
) -> int:
    """Values of one segment of a block in mode packed or dedup; the fault or 0."""
    state, buffer = work.state[block], work.buffer
    total = state[DISTINCT] * work.blocks[block, 3]
    mapped = state[MODE] != _PACKED
    tiles = (total + TILE_VALUES - 1) // TILE_VALUES
    segments = (tiles + SEGMENT_TILES - 1) // SEGMENT_TILES
    if segment >= segments:
        return 0
    directory, entries = state[AT], state[AT] + 4 * (segments - 1)
    data = entries + 4 * tiles
    if data > state[END]:
        return _PAYLOAD_SIZE
    at, stop = data, state[END]
    if segment:
        at = data + 4 * i64(load_word(buffer, directory + 4 * (segment - 1)))
    if segment + 1 < segments:
        stop = data + 4 * i64(load_word(buffer, directory + 4 * segment))
    if at > stop or stop > state[END]:
        return _DIRECTORY
    step = step_of(work, block)
    for tile in range(segment * SEGMENT_TILES, min(tiles, (segment + 1) * SEGMENT_TILES)):
        entry = i64(load_word(buffer, entries + 4 * tile))
        words, planes = entry & 0x7FF, entry >> 17
        if planes > MAX_KIND_PLANES or planes > words or 4 * words > stop - at:
            return _DIRECTORY
        count = min(TILE_VALUES, total - tile * TILE_VALUES)
        fault = _read_tile(buffer, at, entry, count, work.dtype, step, kinds, codes, patterns)
        if fault:
            return fault
        store(work, block, mapped, tile * TILE_VALUES, count, patterns)
        at += 4 * words
    return 0 if at == stop else _DIRECTORY
