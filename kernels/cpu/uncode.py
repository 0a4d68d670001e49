"""Entropy-coded payloads back to values (docs/FORMAT.md, section 4.4).

A symbol's place is known only after the one before it, so one stream keeps a processor mostly waiting: the
four chunks of 1,024 values are read in step. Reads stay within the frame; a stream that uses more than its
chunk's bytes is rejected after the fact, since what it read is at least the frame's own.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightrec.kernels.cpu.decode_work import AT, DISTINCT, END, MODE, DecodeWork
from tightrec.kernels.cpu.floats import FLOAT32, Words, i64, u32
from tightrec.kernels.cpu.jit import inner
from tightrec.kernels.cpu.lanes import add_plane, load_pair, load_word
from tightrec.kernels.cpu.quantise import EXCEPTION, decode_group
from tightrec.kernels.cpu.unpack import step_of, store
from tightrec.kernels.format import (
    CHUNK_VALUES,
    ESCAPED_CODE_BITS,
    GROUP_VALUES,
    MAX_CHUNK_BYTES,
    MAX_CODE_LENGTH,
    MAX_SIZE_PLANES,
    SEGMENT_TILES,
    STRIP_CHUNKS,
    STRIP_VALUES,
    SYMBOL_ESCAPE_CODE,
    SYMBOL_ESCAPE_RAW,
    TILE_VALUES,
    Fault,
    Mode,
)

_PAYLOAD_SIZE = int(Fault.PAYLOAD_SIZE)
_DIRECTORY = int(Fault.DIRECTORY)
_STREAM = int(Fault.STREAM)
_DEDUP_ENTROPY = int(Mode.DEDUP_ENTROPY)
_SEGMENT_STRIPS = SEGMENT_TILES * TILE_VALUES // STRIP_VALUES
_FULL = TILE_VALUES // CHUNK_VALUES
_PEEK = (1 << MAX_CODE_LENGTH) - 1
u64: Any = np.uint64


@inner
def _take(window: np.uint64, table: Words, raw_bits: int, codes: Words, patterns: Words, to: int) -> int:
    """Put the value that ``window`` starts with to place ``to``; returns its bits."""
    entry = table[window & u64(_PEEK)]
    symbol, length = u32(entry & u32(0xFF)), i64(u32(entry >> u32(8)))
    codes[to] = symbol
    if symbol >= u32(SYMBOL_ESCAPE_CODE):
        after = window >> u64(length)
        if symbol == u32(SYMBOL_ESCAPE_RAW):
            codes[to] = EXCEPTION
            patterns[to] = u32(after & ((u64(1) << u64(raw_bits)) - u64(1)))
            return length + raw_bits
        codes[to] = u32(after & u64((1 << ESCAPED_CODE_BITS) - 1))
        return length + ESCAPED_CODE_BITS
    return length


@inner
def _window(buffer: NDArray[np.uint8], bit: int) -> np.uint64:
    """At least 57 bits of the stream from ``bit`` of the buffer on."""
    return load_pair(buffer, bit >> 3) >> u64(bit & 7)


@inner
def _last_window(buffer: NDArray[np.uint8], bit: int, end: int) -> np.uint64:
    """The same with zeros from byte ``end`` on."""
    at, window = bit >> 3, u64(0)
    for byte in range(min(8, end - at)):
        window |= u64(buffer[at + byte]) << u64(8 * byte)
    return window >> u64(bit & 7)


@inner
def _read_chunk(
    buffer: NDArray[np.uint8],
    at: int,
    end: int,
    count: int,
    table: Words,
    raw_bits: int,
    codes: Words,
    patterns: Words,
    to: int,
) -> int:
    """``count`` values of the chunk at byte ``at`` of a frame that ends at ``end``; returns bits used."""
    bit = 8 * at
    for i in range(count):
        window = _window(buffer, bit) if (bit >> 3) + 8 <= end else _last_window(buffer, bit, end)
        bit += _take(window, table, raw_bits, codes, patterns, to + i)
    return bit - 8 * at


@inner
def _read_four(
    buffer: NDArray[np.uint8],
    at: NDArray[np.int64],
    table: Words,
    raw_bits: int,
    codes: Words,
    patterns: Words,
    used: NDArray[np.int64],
) -> None:
    """Four whole chunks at bytes ``at``, in step; the frame reaches far enough behind the last one."""
    bit0, bit1, bit2, bit3 = 8 * at[0], 8 * at[1], 8 * at[2], 8 * at[3]
    for i in range(CHUNK_VALUES):
        bit0 += _take(_window(buffer, bit0), table, raw_bits, codes, patterns, i)
        bit1 += _take(_window(buffer, bit1), table, raw_bits, codes, patterns, CHUNK_VALUES + i)
        bit2 += _take(_window(buffer, bit2), table, raw_bits, codes, patterns, 2 * CHUNK_VALUES + i)
        bit3 += _take(_window(buffer, bit3), table, raw_bits, codes, patterns, 3 * CHUNK_VALUES + i)
    used[0], used[1] = bit0 - 8 * at[0], bit1 - 8 * at[1]
    used[2], used[3] = bit2 - 8 * at[2], bit3 - 8 * at[3]


@inner
def _restore(codes: Words, patterns: Words, decoded: Words, count: int, dtype: int, step: np.float32) -> None:
    """Patterns of ``count`` values from their codes; exceptions have theirs already."""
    for at in range(0, count, GROUP_VALUES):
        decode_group(codes, decoded, at, dtype, step)
        code, target, source = codes[at:], patterns[at:], decoded[at:]
        for i in range(GROUP_VALUES):
            target[i] = target[i] if code[i] == EXCEPTION else source[i]


@inner
def _read_sizes(buffer: NDArray[np.uint8], at: int, base: int, planes: int, chunks: int, sizes: Words) -> int:
    """Sizes of a strip's chunks, from the planes at byte ``at``; their sum, or -1 where one is too large."""
    for chunk in range(STRIP_CHUNKS):
        sizes[chunk] = u32(0)
    for j in range(planes):
        add_plane(sizes, 0, load_word(buffer, at + 4 * j), u32(j))
    total = 0
    for chunk in range(chunks):
        size = base + i64(sizes[chunk])
        if size > MAX_CHUNK_BYTES:
            return -1
        sizes[chunk] = u32(size)
        total += size
    return total


@inner
def _read_strip(
    work: DecodeWork,
    block: int,
    start: int,
    count: int,
    at: int,
    end: int,
    table: Words,
    sizes: Words,
    codes: Words,
    patterns: Words,
    decoded: Words,
) -> int:
    """``count`` values of a strip from ``start`` on, whose chunks start at byte ``at``; the fault or 0."""
    mapped = work.state[block, MODE] == _DEDUP_ENTROPY
    raw_bits = 32 if work.dtype == FLOAT32 else 16
    step = step_of(work, block)
    starts, used = np.empty(_FULL, np.int64), np.empty(_FULL, np.int64)
    for first in range(0, count, TILE_VALUES):
        here = min(TILE_VALUES, count - first)
        chunks, chunk = (here + CHUNK_VALUES - 1) // CHUNK_VALUES, first // CHUNK_VALUES
        for k in range(chunks):
            starts[k] = at
            at += i64(sizes[chunk + k])
        if here == TILE_VALUES and starts[_FULL - 1] + MAX_CHUNK_BYTES + 8 <= end:
            _read_four(work.buffer, starts, table, raw_bits, codes, patterns, used)
        else:
            for k in range(chunks):
                left = min(CHUNK_VALUES, here - k * CHUNK_VALUES)
                used[k] = _read_chunk(
                    work.buffer, starts[k], end, left, table, raw_bits, codes, patterns, k * CHUNK_VALUES
                )
        for k in range(chunks):
            if (used[k] + 7) // 8 != i64(sizes[chunk + k]):
                return _STREAM
        _restore(codes, patterns, decoded, here, work.dtype, step)
        store(work, block, mapped, start + first, here, patterns)
    return 0


@inner
def read_coded(
    work: DecodeWork,
    block: int,
    segment: int,
    table: Words,
    sizes: Words,
    codes: Words,
    patterns: Words,
    decoded: Words,
) -> int:
    """Values of the strips of one segment of a block in mode entropy or dedup_entropy; the fault or 0."""
    state, buffer = work.state[block], work.buffer
    total = state[DISTINCT] * work.blocks[block, 3]
    strips = (total + STRIP_VALUES - 1) // STRIP_VALUES
    first = segment * _SEGMENT_STRIPS
    if first >= strips:
        return 0
    data = state[AT] + 8 * strips
    if data > state[END]:
        return _PAYLOAD_SIZE
    peer = block // work.tables
    end = work.offsets[peer] + work.sizes[peer]
    at = data
    if first:
        at = data + 4 * i64(load_word(buffer, state[AT] + 8 * first))
    for strip in range(first, min(strips, first + _SEGMENT_STRIPS)):
        entry = i64(load_word(buffer, state[AT] + 8 * strip + 4))
        base, planes = entry & 0xFFFF, entry >> 16
        offset = data + 4 * i64(load_word(buffer, state[AT] + 8 * strip))
        if offset != at or planes > MAX_SIZE_PLANES or at + 4 * planes > state[END]:
            return _DIRECTORY
        start = strip * STRIP_VALUES
        count = min(STRIP_VALUES, total - start)
        chunks = (count + CHUNK_VALUES - 1) // CHUNK_VALUES
        size = _read_sizes(buffer, at, base, planes, chunks, sizes)
        if size < 0 or (size + 3) // 4 * 4 > state[END] - at - 4 * planes:
            return _DIRECTORY
        fault = _read_strip(
            work, block, start, count, at + 4 * planes, end, table, sizes, codes, patterns, decoded
        )
        if fault:
            return fault
        at += 4 * planes + (size + 3) // 4 * 4
    if first + _SEGMENT_STRIPS < strips:
        stop = data + 4 * i64(load_word(buffer, state[AT] + 8 * (first + _SEGMENT_STRIPS)))
    else:
        stop = state[END]
    return 0 if at == stop else _DIRECTORY
