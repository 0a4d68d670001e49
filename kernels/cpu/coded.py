"""Entropy-coded payloads: their size, the histogram of their symbols, and the streams (section 4.4)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightrec.kernels.cpu.codebook import code_words
from tightrec.kernels.cpu.floats import FLOAT32, Words, f32, i64, load_values, own_bits, u32
from tightrec.kernels.cpu.jit import inner, loop
from tightrec.kernels.cpu.lanes import store_word
from tightrec.kernels.cpu.quantise import EXCEPTION, code_values
from tightrec.kernels.cpu.work import CODED, DISTINCT, MODE, EncodeWork
from tightrec.kernels.format import (
    CHUNK_VALUES,
    ESCAPED_CODE_BITS,
    STRIP_CHUNKS,
    STRIP_VALUES,
    SYMBOL_ESCAPE_CODE,
    SYMBOL_ESCAPE_RAW,
    SYMBOLS,
    Mode,
    Request,
)

_REQUEST_ENTROPY = int(Request.ENTROPY)
_DEDUP = int(Mode.DEDUP)
_DEDUP_ENTROPY = int(Mode.DEDUP_ENTROPY)
u64: Any = np.uint64


@inner
def _symbol(code: np.uint32) -> int:
    """The symbol of a code where every code below 254 has a code word."""
    small = min(code, u32(SYMBOL_ESCAPE_CODE))
    return i64(u32(SYMBOL_ESCAPE_RAW) if code == EXCEPTION else small)


@inner
def _costs(lengths: NDArray[np.uint8], raw_bits: int, costs: NDArray[np.int64]) -> None:
    """Bits that each symbol adds to a stream, with what follows an escape."""
    escaped = i64(lengths[SYMBOL_ESCAPE_CODE]) + ESCAPED_CODE_BITS
    for symbol in range(SYMBOLS):
        costs[symbol] = i64(lengths[symbol]) if lengths[symbol] else escaped
    costs[SYMBOL_ESCAPE_CODE] = escaped
    costs[SYMBOL_ESCAPE_RAW] = i64(lengths[SYMBOL_ESCAPE_RAW]) + raw_bits


@inner
def strip_size(sizes: NDArray[np.uint16]) -> tuple[int, int, int]:
    """(base, planes, bytes of the strip's data) from the sizes of a strip's chunks."""
    base, highest, total = i64(sizes[0]), 0, 0
    for chunk in range(sizes.shape[0]):
        size = i64(sizes[chunk])
        base, highest = min(base, size), max(highest, size)
        total += size
    planes = 0
    while highest - base >> planes:
        planes += 1
    return base, planes, 4 * planes + (total + 3) // 4 * 4


@loop
def measure_blocks(start: int, stop: int, work: EncodeWork) -> None:
    """Size of the coded payload of blocks start..stop over their chosen rows, and their histograms."""
    bits, codes = np.empty(CHUNK_VALUES, np.uint32), np.empty(CHUNK_VALUES, np.uint32)
    costs = np.zeros(SYMBOLS, np.int64)
    values32, values16, dtype = work.values32, work.values16, work.dtype
    raw_bits = 32 if dtype == FLOAT32 else 16
    for block in range(start, stop):
        table = block % work.tables
        counts = work.counts[block]
        for symbol in range(SYMBOLS):
            counts[symbol] = 0
        total = work.state[block, DISTINCT] * work.blocks[block, 3]
        has_book = work.book_ids[table] != 0
        if total == 0 or work.request[table] < _REQUEST_ENTROPY:
            continue
        if not has_book and work.histogram.shape[0] == 0:
            continue
        mapped = work.state[block, MODE] == _DEDUP
        place, bound = work.blocks[block], work.bounds[block]
        rows, step = work.first[place[6] :], f32(bound * f32(2.0))
        _costs(work.book_lengths[table], raw_bits, costs)
        chunks = (total + CHUNK_VALUES - 1) // CHUNK_VALUES
        first_chunk = work.blocks[block, 5] * STRIP_CHUNKS
        sizes = work.chunk_bytes[first_chunk : first_chunk + chunks]
        for chunk in range(chunks):
            count = min(CHUNK_VALUES, total - chunk * CHUNK_VALUES)
            start_ = chunk * CHUNK_VALUES
            load_values(values32, values16, dtype, place, rows, mapped, start_, count, bits)
            code_values(bits, codes, count, dtype, step, bound)
            length = 0
            for i in range(count):
                symbol = _symbol(codes[i])
                length += costs[symbol]
                counts[symbol] += 1
            sizes[chunk] = (length + 7) // 8
        if has_book:
            size = 0
            for chunk in range(0, chunks, STRIP_CHUNKS):
                size += 8 + strip_size(sizes[chunk : chunk + STRIP_CHUNKS])[2]
            work.state[block, CODED] = size


@inner
def _write_chunk(
    out: NDArray[np.uint8],
    at: int,
    dtype: int,
    bits: Words,
    codes: Words,
    count: int,
    words: Words,
    lengths: NDArray[np.uint8],
) -> int:
    """Write a chunk's stream to byte ``at``; returns where the next one goes."""
    held, pending = u64(0), u64(0)
    raw_bits = u64(32) if dtype == FLOAT32 else u64(16)
    for i in range(count):
        code = codes[i]
        symbol = _symbol(code)
        if lengths[symbol] == 0:
            symbol = SYMBOL_ESCAPE_CODE
        held |= u64(words[symbol]) << pending
        pending += u64(lengths[symbol])
        if symbol >= SYMBOL_ESCAPE_CODE:
            # Fewer than 32 + 12 bits are held: make room for up to 32 more.
            if pending >= u64(32):
                store_word(out, at, u32(held))
                at += 4
                held >>= u64(32)
                pending -= u64(32)
            if symbol == SYMBOL_ESCAPE_RAW:
                held |= u64(own_bits(bits[i], dtype)) << pending
                pending += raw_bits
            else:
                held |= u64(code) << pending
                pending += u64(ESCAPED_CODE_BITS)
        if pending >= u64(32):
            store_word(out, at, u32(held))
            at += 4
            held >>= u64(32)
            pending -= u64(32)
    while pending > u64(0):
        out[at] = np.uint8(held & u64(0xFF))
        at += 1
        held >>= u64(8)
        pending -= min(pending, u64(8))
    return at


@inner
def write_coded(work: EncodeWork, block: int, at: int) -> None:
    """Write the coded payload of a block's chosen rows from byte ``at`` of ``out``."""
    bits, codes = np.empty(CHUNK_VALUES, np.uint32), np.empty(CHUNK_VALUES, np.uint32)
    words = np.empty(SYMBOLS, np.uint32)
    values32, values16, dtype, out8 = work.values32, work.values16, work.dtype, work.out8
    place, bound = work.blocks[block], work.bounds[block]
    rows, step = work.first[place[6] :], f32(bound * f32(2.0))
    lengths = work.book_lengths[block % work.tables]
    code_words(lengths, words)
    mapped = work.state[block, MODE] == _DEDUP_ENTROPY
    total = work.state[block, DISTINCT] * work.blocks[block, 3]
    strips = (total + STRIP_VALUES - 1) // STRIP_VALUES
    first_chunk = work.blocks[block, 5] * STRIP_CHUNKS
    data, offset = at + 8 * strips, 0
    for strip in range(strips):
        left = total - strip * STRIP_VALUES
        chunks = min(STRIP_CHUNKS, (left + CHUNK_VALUES - 1) // CHUNK_VALUES)
        first = first_chunk + strip * STRIP_CHUNKS
        sizes = work.chunk_bytes[first : first + chunks]
        base, planes, size = strip_size(sizes)
        work.out32[(at + 8 * strip) // 4] = u32(offset // 4)
        work.out32[(at + 8 * strip) // 4 + 1] = u32(base | planes << 16)
        to = data + offset
        for j in range(planes):
            plane = 0
            for chunk in range(chunks):
                plane |= (i64(sizes[chunk]) - base >> j & 1) << chunk
            work.out32[to // 4] = u32(plane)
            to += 4
        for chunk in range(chunks):
            start = strip * STRIP_VALUES + chunk * CHUNK_VALUES
            count = min(CHUNK_VALUES, total - start)
            load_values(values32, values16, dtype, place, rows, mapped, start, count, bits)
            code_values(bits, codes, count, dtype, step, bound)
            to = _write_chunk(out8, to, dtype, bits, codes, count, words, lengths)
        offset += size
        while to < data + offset:
            out8[to] = np.uint8(0)
            to += 1
