"""Checks of frame and block headers, and codebooks that come with blocks (docs/FORMAT.md, 1, 2 and 4.4)."""

import numpy as np

from tightrec.kernels.cpu.codebook import is_complete
from tightrec.kernels.cpu.decode_work import (
    AT,
    BOOK,
    BOUND,
    DISTINCT,
    END,
    FAULT,
    FIRST_UNIT,
    FLAGS,
    MODE,
    POISONED,
    DecodeWork,
)
from tightrec.kernels.cpu.floats import FLOAT32, f32, i64, u32
from tightrec.kernels.cpu.jit import inner, loop
from tightrec.kernels.cpu.lanes import load_word
from tightrec.kernels.format import (
    BLOCK_FLAG_CODEBOOK,
    BLOCK_HEADER_BYTES,
    CODEBOOK_BYTES,
    FRAME_ALIGNMENT,
    FRAME_FLAG_CHECKSUM,
    FRAME_HEADER_BYTES,
    MAGIC,
    MAX_BOUND,
    MIN_BOUND,
    SEGMENT_TILES,
    SYMBOLS,
    TILE_VALUES,
    VERSION,
    Fault,
    Mode,
)

_TRUNCATED = int(Fault.TRUNCATED)
_MAGIC = int(Fault.MAGIC)
_VERSION = int(Fault.VERSION)
_DTYPE = int(Fault.DTYPE)
_RESERVED = int(Fault.RESERVED)
_BLOCKS = int(Fault.BLOCKS)
_FRAME_SIZE = int(Fault.FRAME_SIZE)
_MODE = int(Fault.MODE)
_ROWS = int(Fault.ROWS)
_DIM = int(Fault.DIM)
_BOUND = int(Fault.BOUND)
_PAYLOAD_SIZE = int(Fault.PAYLOAD_SIZE)
_CODEBOOK = int(Fault.CODEBOOK)
_CODEBOOK_MISSING = int(Fault.CODEBOOK_MISSING)
_PADDING = int(Fault.PADDING)
_RAW = int(Mode.RAW)
_FLOAT16 = int(Mode.FLOAT16)
_BFLOAT16 = int(Mode.BFLOAT16)
_ENTROPY = int(Mode.ENTROPY)
_LAST_MODE = int(max(Mode))
_SEGMENT_VALUES = SEGMENT_TILES * TILE_VALUES


@inner
def _long(buffer: np.ndarray, at: int) -> int:
    """An unsigned 64-bit number as int64: negative from 2^63 on, which no size check lets through."""
    return i64(load_word(buffer, at)) | i64(load_word(buffer, at + 4)) << 32


@inner
def _frame_header(work: DecodeWork, peer: int) -> int:
    """The fault of a frame's size or header, or 0."""
    buffer, at, size = work.buffer, work.offsets[peer], work.sizes[peer]
    if at < 0 or size < 0 or at > buffer.size or size > buffer.size - at:
        return _TRUNCATED
    if size < FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * work.tables:
        return _TRUNCATED
    if load_word(buffer, at) != u32(MAGIC):
        return _MAGIC
    if buffer[at + 4] != VERSION:
        return _VERSION
    if buffer[at + 5] != work.dtype:
        return _DTYPE
    flags = buffer[at + 6]
    if flags > FRAME_FLAG_CHECKSUM or buffer[at + 7] != 0:
        return _RESERVED
    if flags == 0 and load_word(buffer, at + 12) != u32(0):
        return _RESERVED
    if i64(load_word(buffer, at + 8)) != work.tables:
        return _BLOCKS
    if _long(buffer, at + 16) != size or size % FRAME_ALIGNMENT:
        return _FRAME_SIZE
    return 0


@inner
def _block_header(work: DecodeWork, block: int, at: int, payload: int, end: int) -> int:
    """The fault of the block header at byte ``at``, or 0; notes what it says.

    Its payload starts at byte ``payload`` of a frame that ends at ``end``.
    """
    buffer, state, place = work.buffer, work.state[block], work.blocks[block]
    mode, flags = i64(buffer[at]), i64(buffer[at + 1])
    head = i64(load_word(buffer, at))
    rows = i64(load_word(buffer, at + 4))
    bound = u32(load_word(buffer, at + 8)).view(f32)
    book = i64(load_word(buffer, at + 12))
    size = _long(buffer, at + 16)
    coded = mode >= _ENTROPY
    if mode > _LAST_MODE or ((mode in (_FLOAT16, _BFLOAT16)) and work.dtype != FLOAT32):
        return _MODE
    if flags > BLOCK_FLAG_CODEBOOK or (flags and not coded):
        return _RESERVED
    if head >> 16 != place[3]:
        return _DIM
    if rows != place[1]:
        return _ROWS
    allowed = bound >= f32(MIN_BOUND) and bound <= f32(MAX_BOUND)
    if not allowed and not (bound == f32(0.0) and mode == _RAW):
        return _BOUND
    if (book != 0) != coded:
        return _CODEBOOK
    if size < 0 or size % 4 or (rows == 0 and size):
        return _PAYLOAD_SIZE
    if rows == 0 and mode != _RAW:
        return _MODE
    if size > end - payload:
        return _PAYLOAD_SIZE
    state[MODE] = mode
    state[FLAGS] = flags
    state[BOUND] = i64(load_word(buffer, at + 8))
    state[BOOK] = book
    state[DISTINCT] = rows
    state[AT] = payload
    state[END] = payload + size
    state[FAULT] = 0
    return 0


@inner
def _padding(work: DecodeWork, at: int, end: int) -> int:
    """The fault of what follows the payloads, which end at byte ``at``, or 0."""
    if end - at >= FRAME_ALIGNMENT:
        return _FRAME_SIZE
    for byte in range(at, end):
        if work.buffer[byte] != 0:
            return _PADDING
    return 0


@inner
def _check_frame(work: DecodeWork, peer: int) -> int:
    """0, or table << 8 | fault of a frame's size, headers or padding."""
    fault = _frame_header(work, peer)
    if fault:
        return fault
    header = work.offsets[peer] + FRAME_HEADER_BYTES
    at, end = header + BLOCK_HEADER_BYTES * work.tables, work.offsets[peer] + work.sizes[peer]
    for table in range(work.tables):
        fault = _block_header(work, peer * work.tables + table, header, at, end)
        if fault:
            return table << 8 | fault
        header += BLOCK_HEADER_BYTES
        at = work.state[peer * work.tables + table, END]
    return _padding(work, at, end)


@inner
def _receive_book(work: DecodeWork, block: int, lengths: np.ndarray) -> int:
    """Keep the codebook that a block brings, or find the kept one; the fault or 0."""
    state = work.state[block]
    peer, table = block // work.tables, block % work.tables
    if not state[FLAGS] & BLOCK_FLAG_CODEBOOK:
        kept = i64(u32(work.book_ids[peer, table]))
        return 0 if kept == state[BOOK] else _CODEBOOK_MISSING
    if state[END] - state[AT] < CODEBOOK_BYTES:
        return _PAYLOAD_SIZE
    for i in range(CODEBOOK_BYTES):
        pair = work.buffer[state[AT] + i]
        lengths[2 * i] = pair & 15
        lengths[2 * i + 1] = pair >> 4
    if not is_complete(lengths):
        return _CODEBOOK
    for symbol in range(SYMBOLS):
        work.book_lengths[peer, table, symbol] = lengths[symbol]
    work.book_ids[peer, table] = np.int32(u32(state[BOOK]))
    state[AT] += CODEBOOK_BYTES
    return 0


@loop
def check_peers(start: int, stop: int, work: DecodeWork) -> None:
    """Check the headers of peers start..stop, note where their payloads lie and receive their codebooks."""
    lengths = np.empty(SYMBOLS, np.uint8)
    for peer in range(start, stop):
        fault = _check_frame(work, peer)
        work.peer_faults[peer] = fault
        for block in range(peer * work.tables, (peer + 1) * work.tables):
            if fault:
                work.state[block, FAULT] = POISONED
            elif work.state[block, MODE] >= _ENTROPY:
                work.state[block, FAULT] = _receive_book(work, block, lengths)


@loop
def plan_units(work: DecodeWork) -> int:
    """Number the segments of all blocks; returns how many there are."""
    unit = 0
    for block in range(work.blocks.shape[0] - 1):
        work.state[block, FIRST_UNIT] = unit
        total = work.blocks[block, 1] * work.blocks[block, 3]
        for segment in range((total + _SEGMENT_VALUES - 1) // _SEGMENT_VALUES):
            work.units[unit, 0] = block
            work.units[unit, 1] = segment
            work.unit_faults[unit] = 0
            unit += 1
    return unit
