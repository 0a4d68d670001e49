"""Distinct rows and their copies, NaN in faulty blocks, and the status (docs/FORMAT.md, section 4.3)."""

import numpy as np

from tightrec.kernels.cpu.decode_work import AT, DISTINCT, END, FAULT, FIRST_UNIT, MODE, DecodeWork
from tightrec.kernels.cpu.floats import BFLOAT16, FLOAT32, Words, copy_words, i64, u32
from tightrec.kernels.cpu.jit import inner, loop
from tightrec.kernels.cpu.lanes import add_plane, load_word
from tightrec.kernels.format import GROUP_VALUES, SEGMENT_TILES, TILE_VALUES, Fault, Mode

_DEDUP = int(Mode.DEDUP)
_DEDUP_ENTROPY = int(Mode.DEDUP_ENTROPY)
_PAYLOAD_SIZE = int(Fault.PAYLOAD_SIZE)
_DISTINCT = int(Fault.DISTINCT)
_INDEX = int(Fault.INDEX)
_SEGMENT_VALUES = SEGMENT_TILES * TILE_VALUES
_NAN32 = np.uint32(0x7FC00000)
_NAN_FLOAT16 = np.uint16(0x7E00)
_NAN_BFLOAT16 = np.uint16(0x7FC0)


@inner
def _read_index(work: DecodeWork, block: int, numbers: Words) -> int:
    """Fill a block's ``row_index`` and ``first`` from its payload; the fault or 0."""
    buffer, state, place = work.buffer, work.state[block], work.blocks[block]
    rows, at = place[1], state[AT] + 4
    if at > state[END]:
        return _PAYLOAD_SIZE
    distinct = i64(load_word(buffer, state[AT]))
    if distinct < 1 or distinct > rows:
        return _DISTINCT
    bits = 0
    while 1 << bits < distinct:
        bits += 1
    after = at + 4 * bits * ((rows + GROUP_VALUES - 1) // GROUP_VALUES)
    if after > state[END]:
        return _PAYLOAD_SIZE
    index, first = work.row_index[place[6] :], work.first[place[6] :]
    for number in range(distinct):
        first[number] = -1
    seen = 0
    for start in range(0, rows, GROUP_VALUES):
        for i in range(GROUP_VALUES):
            numbers[i] = u32(0)
        for j in range(bits):
            add_plane(numbers, 0, load_word(buffer, at), u32(j))
            at += 4
        for i in range(min(GROUP_VALUES, rows - start)):
            number = i64(numbers[i])
            if number >= distinct:
                return _INDEX
            index[start + i] = number
            if first[number] < 0:
                first[number] = start + i
                seen += 1
    if seen != distinct:
        return _INDEX
    state[AT] = after
    state[DISTINCT] = distinct
    return 0


@loop
def read_indices(start: int, stop: int, work: DecodeWork) -> None:
    """Read the index planes of those blocks of start..stop that have them."""
    numbers = np.empty(GROUP_VALUES, np.uint32)
    for block in range(start, stop):
        if work.state[block, FAULT] == 0:
            mode = work.state[block, MODE]
            if mode in (_DEDUP, _DEDUP_ENTROPY):
                work.state[block, FAULT] = _read_index(work, block, numbers)


@inner
def _copy_rows(work: DecodeWork, block: int) -> None:
    """Copy each distinct row to the other rows that it stands for."""
    place = work.blocks[block]
    offset, rows, stride, dim, first_row = place[0], place[1], place[2], place[3], place[6]
    for row in range(rows):
        owner = i64(work.first[first_row + work.row_index[first_row + row]])
        if owner != row:
            to, source = offset + row * stride, offset + owner * stride
            if work.dtype == FLOAT32:
                copy_words(work.values32, source, work.values32, to, dim)
            else:
                for i in range(dim):
                    work.values16[to + i] = work.values16[source + i]


@inner
def _poison(work: DecodeWork, block: int) -> None:
    """Fill a block with NaN."""
    offset, rows, stride, dim = (
        work.blocks[block, 0],
        work.blocks[block, 1],
        work.blocks[block, 2],
        work.blocks[block, 3],
    )
    for row in range(rows):
        to = offset + row * stride
        if work.dtype == FLOAT32:
            for i in range(dim):
                work.values32[to + i] = _NAN32
        else:
            for i in range(dim):
                work.values16[to + i] = _NAN_BFLOAT16 if work.dtype == BFLOAT16 else _NAN_FLOAT16


@loop
def finish_blocks(start: int, stop: int, work: DecodeWork) -> None:
    """Gather the faults of blocks start..stop, poison the faulty ones and complete the others' rows."""
    for block in range(start, stop):
        total = work.blocks[block, 1] * work.blocks[block, 3]
        fault = work.state[block, FAULT]
        for segment in range((total + _SEGMENT_VALUES - 1) // _SEGMENT_VALUES):
            found = i64(work.unit_faults[work.state[block, FIRST_UNIT] + segment])
            if found and (fault == 0 or (0 < found < fault)):
                fault = found
        work.state[block, FAULT] = fault
        mode = work.state[block, MODE]
        if fault:
            _poison(work, block)
        elif mode in (_DEDUP, _DEDUP_ENTROPY):
            _copy_rows(work, block)


@loop
def report(work: DecodeWork) -> None:
    """Write the status: the smallest of all faults by peer, then table."""
    work.status[0] = 0
    for peer in range(work.peer_faults.shape[0]):
        if work.peer_faults[peer]:
            work.status[0] = peer << 40 | work.peer_faults[peer]
            return
        for table in range(work.tables):
            fault = work.state[peer * work.tables + table, FAULT]
            if fault:
                work.status[0] = peer << 40 | table << 8 | fault
                return
