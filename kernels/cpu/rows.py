"""Rows that decode to identical bits (docs/FORMAT.md, section 4.3), found with one hash table for each block.

A table has at least twice as many places as the block has rows; the rows go in by number, so the lowest of
equal rows stands for all of them whatever the number of threads.
"""

import numpy as np
from numpy.typing import NDArray

from tightrec.kernels.cpu.floats import FLOAT32, Halves, Rows, Words, f32, i64, load_values, u32
from tightrec.kernels.cpu.jit import inner, loop
from tightrec.kernels.cpu.pack import directory_words, measure_rows, pack_rows
from tightrec.kernels.cpu.quantise import receive_values
from tightrec.kernels.cpu.work import DISTINCT, FIRST_UNIT, MODE, SIZE, EncodeWork
from tightrec.kernels.format import GROUP_VALUES, MAX_DIM, SEGMENT_TILES, TILE_VALUES, Mode, Request

_REQUEST_DEDUP = int(Request.DEDUP)
_PACKED = int(Mode.PACKED)
_DEDUP = int(Mode.DEDUP)
_MULTIPLIERS = np.random.default_rng(1).integers(0, 2**32, MAX_DIM, dtype=np.uint32) | np.uint32(1)


@inner
def index_words(rows: int, distinct: int) -> int:
    """Words of the index planes of ``rows`` rows."""
    bits = 0
    while 1 << bits < distinct:
        bits += 1
    return (rows + GROUP_VALUES - 1) // GROUP_VALUES * bits


@inner
def _receive_row(
    values32: Words,
    values16: Halves,
    dtype: int,
    place: NDArray[np.int64],
    rows: Rows,
    row: int,
    bound: np.float32,
    bits: Words,
    patterns: Words,
) -> None:
    """Patterns that the values of a row are received as."""
    load_values(values32, values16, dtype, place, rows, False, row * place[3], place[3], bits)
    receive_values(bits, patterns, place[3], dtype, f32(bound * f32(2.0)), bound)


@inner
def _hash(patterns: Words, dim: int) -> np.uint32:
    """A hash of a row's patterns; the upper bits of the products hold what the lower ones lack."""
    row = patterns[:dim]
    total = u32(0)
    for i in range(dim):
        total = u32(total + u32(u32(row[i] ^ u32(row[i] >> u32(15))) * _MULTIPLIERS[i]))
    total = u32(u32(total ^ u32(total >> u32(16))) * u32(0x9E3779B1))
    return u32(total ^ u32(total >> u32(15)))


@inner
def _same_input(
    values32: Words, values16: Halves, dtype: int, place: NDArray[np.int64], one: int, other: int
) -> bool:
    """Whether two rows of a block hold the same bits before they are coded."""
    dim = place[3]
    first, second = place[0] + one * place[2], place[0] + other * place[2]
    differ = u32(0)
    if dtype == FLOAT32:
        a32, b32 = values32[first : first + dim], values32[second : second + dim]
        for i in range(dim):
            differ = u32(differ | u32(a32[i] ^ b32[i]))
    else:
        a16, b16 = values16[first : first + dim], values16[second : second + dim]
        for i in range(dim):
            differ = u32(differ | u32(a16[i] ^ b16[i]))
    return differ == u32(0)


@inner
def _same(one: Words, other: Words, dim: int) -> bool:
    """Whether two rows of patterns are equal."""
    differ = u32(0)
    for i in range(dim):
        differ = u32(differ | u32(one[i] ^ other[i]))
    return differ == u32(0)


@inner
def find_distinct(work: EncodeWork, block: int) -> int:
    """Fill a block's ``row_index`` and ``first``; returns the number of distinct rows."""
    # Taken out of the loop: each access to the tuple counts references, which is slower than a short row.
    values32, values16, dtype = work.values32, work.values16, work.dtype
    place, bound = work.blocks[block], work.bounds[block]
    rows, dim, first_row = place[1], place[3], place[6]
    width = (dim + GROUP_VALUES - 1) // GROUP_VALUES * GROUP_VALUES
    bits, patterns, others = np.empty(width, u32), np.empty(width, u32), np.empty(width, u32)
    places = 2
    while places < 2 * rows:
        places *= 2
    table = work.table[4 * first_row : 4 * first_row + places]
    for at in range(places):
        table[at] = -1
    index, first, hashes = work.row_index[first_row:], work.first[first_row:], work.hashes[first_row:]
    distinct = 0
    for row in range(rows):
        _receive_row(values32, values16, dtype, place, first, row, bound, bits, patterns)
        hash_ = _hash(patterns, dim)
        hashes[row] = hash_
        at = i64(hash_) & (places - 1)
        while True:
            owner = i64(table[at])
            if owner < 0:
                table[at] = row
                index[row] = distinct
                first[distinct] = row
                distinct += 1
                break
            if hashes[owner] == hash_:
                same = _same_input(values32, values16, dtype, place, row, owner)
                if not same:
                    _receive_row(values32, values16, dtype, place, first, owner, bound, bits, others)
                    same = _same(patterns, others, dim)
                if same:
                    index[row] = index[owner]
                    break
            at = (at + 1) & (places - 1)
    return distinct


@inner
def packed_words(work: EncodeWork, block: int, total: int) -> int:
    """Words of the packed payload, ``total`` values, that lies in a block's slots."""
    words = directory_words(total)
    unit = work.state[block, FIRST_UNIT]
    for segment in range((total + SEGMENT_TILES * TILE_VALUES - 1) // (SEGMENT_TILES * TILE_VALUES)):
        words += work.unit_words[unit + segment, 0]
    return words


@loop
def dedup_blocks(start: int, stop: int, work: EncodeWork) -> None:
    """Choose between all rows and distinct rows for blocks start..stop, and pack the chosen ones.

    A block that may be sent packed has all rows in its slots before, and keeps them unless fewer are smaller.
    """
    for block in range(start, stop):
        request = work.request[block % work.tables]
        rows, dim = work.blocks[block, 1], work.blocks[block, 3]
        if rows == 0 or request < _REQUEST_DEDUP:
            continue
        state = work.state[block]
        distinct = find_distinct(work, block)
        head = 1 + index_words(rows, distinct)
        if request == _REQUEST_DEDUP:
            state[MODE] = _DEDUP
            state[DISTINCT] = distinct
            state[SIZE] = 4 * (head + pack_rows(work, block, distinct * dim))
            continue
        state[MODE] = _PACKED
        state[SIZE] = 4 * packed_words(work, block, rows * dim)
        if distinct < rows and 4 * (head + measure_rows(work, block, distinct * dim)) < state[SIZE]:
            state[MODE] = _DEDUP
            state[DISTINCT] = distinct
            state[SIZE] = 4 * (head + pack_rows(work, block, distinct * dim))


__all__ = ["dedup_blocks", "find_distinct", "index_words", "packed_words"]
