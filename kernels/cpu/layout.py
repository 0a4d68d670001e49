"""The modes of blocks, and frames: offsets, sizes and headers (docs/FORMAT.md, sections 1, 2 and 5)."""

import numpy as np

from tightrec.kernels.cpu.floats import FLOAT32, f32, u32
from tightrec.kernels.cpu.jit import inner, loop
from tightrec.kernels.cpu.rows import index_words, packed_words
from tightrec.kernels.cpu.work import (
    BOOK,
    CODED,
    DISTINCT,
    FIRST_UNIT,
    MISSES_BFLOAT16,
    MISSES_FLOAT16,
    MODE,
    PLACE,
    SIZE,
    EncodeWork,
)
from tightrec.kernels.format import (
    BLOCK_FLAG_CODEBOOK,
    BLOCK_HEADER_BYTES,
    CODEBOOK_BYTES,
    FRAME_ALIGNMENT,
    FRAME_HEADER_BYTES,
    MAGIC,
    SEGMENT_TILES,
    SYMBOLS,
    TILE_VALUES,
    VERSION,
    Mode,
    Request,
)

_SEGMENT_VALUES = SEGMENT_TILES * TILE_VALUES
_REQUEST_RAW = int(Request.RAW)
_REQUEST_HALF = int(Request.HALF)
_REQUEST_PACKED = int(Request.PACKED)
_REQUEST_ENTROPY = int(Request.ENTROPY)
_REQUEST_AUTO = int(Request.AUTO)
_RAW = int(Mode.RAW)
_FLOAT16 = int(Mode.FLOAT16)
_BFLOAT16 = int(Mode.BFLOAT16)
_PACKED = int(Mode.PACKED)
_DEDUP = int(Mode.DEDUP)
_ENTROPY = int(Mode.ENTROPY)
_DEDUP_ENTROPY = int(Mode.DEDUP_ENTROPY)


@inner
def _choose_coded(work: EncodeWork, block: int, raw: int) -> None:
    """Entropy instead of packed or dedup where it is smaller."""
    state, table, peer = work.state[block], block % work.tables, block // work.tables
    if state[CODED] == 0:
        return
    size = state[CODED]
    if state[MODE] == _DEDUP:
        size += 4 + 4 * index_words(work.blocks[block, 1], state[DISTINCT])
    include = 1 if work.book_sent[peer, table] != work.book_ids[table] else 0
    if size < state[SIZE] and size + include * CODEBOOK_BYTES < raw:
        state[MODE] = _ENTROPY if state[MODE] == _PACKED else _DEDUP_ENTROPY
        state[SIZE] = size + include * CODEBOOK_BYTES
        state[BOOK] = include


@inner
def _choose_half(work: EncodeWork, block: int, half: int) -> None:
    """A 16-bit type where it keeps the bound and is smaller."""
    state = work.state[block]
    total = work.blocks[block, 1] * work.blocks[block, 3]
    missed = 0
    for segment in range((total + _SEGMENT_VALUES - 1) // _SEGMENT_VALUES):
        missed |= work.unit_misses[state[FIRST_UNIT] + segment]
    # Compared without the codebook, which is paid once: or a book that is due would never be sent.
    if half < state[SIZE] - state[BOOK] * CODEBOOK_BYTES and missed != MISSES_FLOAT16 | MISSES_BFLOAT16:
        state[MODE] = _BFLOAT16 if missed & MISSES_FLOAT16 else _FLOAT16
        state[SIZE] = half
        state[BOOK] = 0


@inner
def _choose(work: EncodeWork, block: int) -> None:
    """The block's mode and the size of its payload; remembers a codebook that is sent."""
    state, table = work.state[block], block % work.tables
    request = work.request[table]
    total = work.blocks[block, 1] * work.blocks[block, 3]
    value_bytes = 4 if work.dtype == FLOAT32 else 2
    raw = (total * value_bytes + 3) // 4 * 4
    state[BOOK] = 0
    if total == 0 or request in (_REQUEST_RAW, _REQUEST_HALF):
        state[MODE] = _RAW
        state[SIZE] = raw
    elif request == _REQUEST_PACKED:
        state[MODE] = _PACKED
        state[SIZE] = 4 * packed_words(work, block, total)
    elif request >= _REQUEST_ENTROPY:
        _choose_coded(work, block, raw)
    if total > 0 and (request in (_REQUEST_HALF, _REQUEST_AUTO)):
        _choose_half(work, block, (total * 2 + 3) // 4 * 4)
    if state[SIZE] >= raw:
        state[MODE] = _RAW
        state[SIZE] = raw
        state[BOOK] = 0
    if state[BOOK]:
        work.book_sent[block // work.tables, table] = work.book_ids[table]
    if state[MODE] == _PACKED or state[MODE] == _DEDUP:
        before = 0
        total = state[DISTINCT] * work.blocks[block, 3]
        for segment in range((total + _SEGMENT_VALUES - 1) // _SEGMENT_VALUES):
            unit = state[FIRST_UNIT] + segment
            work.unit_words[unit, 1] = before
            before += work.unit_words[unit, 0]


@inner
def _write_block_header(work: EncodeWork, block: int, at: int) -> None:
    """One block header, at word ``at`` of ``out``."""
    state, out = work.state[block], work.out32
    coded = state[MODE] >= _ENTROPY
    flags = BLOCK_FLAG_CODEBOOK if state[BOOK] else 0
    out[at] = u32(state[MODE] | flags << 8 | work.blocks[block, 3] << 16)
    out[at + 1] = u32(work.blocks[block, 1])
    out[at + 2] = f32(work.bounds[block]).view(np.uint32)
    out[at + 3] = u32(work.book_ids[block % work.tables]) if coded else u32(0)
    out[at + 4] = u32(state[SIZE] & 0xFFFFFFFF)
    out[at + 5] = u32(state[SIZE] >> 32)


@loop
def lay_out(work: EncodeWork) -> None:
    """Choose all modes, place the payloads and write everything of the frames but the payloads."""
    tables, out = work.tables, work.out32
    end = 0
    for peer in range(work.offsets.shape[0]):
        start = end
        end += FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * tables
        for table in range(tables):
            block = peer * tables + table
            _choose(work, block)
            work.state[block, PLACE] = end
            at = (start + FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * table) // 4
            _write_block_header(work, block, at)
            end += work.state[block, SIZE]
            if work.counts.shape[0] and work.histogram.shape[0]:
                for symbol in range(SYMBOLS):
                    work.histogram[table, symbol] += work.counts[block, symbol]
        while end % FRAME_ALIGNMENT:
            out[end // 4] = u32(0)
            end += 4
        work.offsets[peer] = start
        work.sizes[peer] = end - start
        out[start // 4] = u32(MAGIC)
        out[start // 4 + 1] = u32(VERSION | work.dtype << 8)
        out[start // 4 + 2] = u32(tables)
        out[start // 4 + 3] = u32(0)
        out[start // 4 + 4] = u32((end - start) & 0xFFFFFFFF)
        out[start // 4 + 5] = u32((end - start) >> 32)
