"""Decoding frame by frame, trusting nothing in them (docs/FORMAT.md)."""

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from tightrec.kernels.format import (
    BLOCK_FLAG_CODEBOOK,
    BLOCK_HEADER_BYTES,
    CODEBOOK_BYTES,
    DTYPES,
    FRAME_ALIGNMENT,
    FRAME_FLAG_CHECKSUM,
    FRAME_HEADER_BYTES,
    MAGIC,
    MAX_BOUND,
    MIN_BOUND,
    VERSION,
    Column,
    Fault,
    Mode,
)
from tightrec.kernels.job import DecodeJob, Totals
from tightrec.kernels.reference.codebook import bytes_to_lengths, is_complete
from tightrec.kernels.reference.dedup import unpack_index
from tightrec.kernels.reference.entropy import decode_values
from tightrec.kernels.reference.packed import Rejected, unpack

_CODED = (Mode.ENTROPY, Mode.DEDUP_ENTROPY)


class _Header(NamedTuple):
    mode: Mode
    flags: int
    bound: Tensor
    book: int
    payload: Tensor


def decode_scratch_bytes(totals: Totals, value_bytes: int) -> int:
    """Bytes of scratch that ``decode`` needs: none, it allocates as it goes."""
    return 0


def decode(job: DecodeJob) -> None:
    """Writes the values of all blocks of a job, NaN where a frame is faulty, and its status."""
    tables = job.totals.tables
    places = job.blocks.tolist()
    faults = []
    for peer in range(job.totals.peers):
        expected = places[peer * tables : (peer + 1) * tables]
        at = 0
        try:
            frame = _frame(job, peer)
            headers = []
            _frame_header(frame, job.out.dtype, tables)
            end = FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * tables
            for at, place in enumerate(expected):
                headers.append(_block_header(frame, at, end, place, job.out.dtype))
                end += headers[-1].payload.numel()
            at = 0
            _padding(frame, end)
        except Rejected as rejected:
            faults.append(peer << 40 | at << 8 | rejected.fault)
            for place in expected:
                _scatter(job.out, place, torch.tensor(float("nan"), dtype=job.out.dtype))
            continue
        for table, (header, place) in enumerate(zip(headers, expected, strict=True)):
            try:
                values = _decode_block(job, peer, table, header, place)
            except Rejected as rejected:
                faults.append(peer << 40 | table << 8 | rejected.fault)
                values = torch.tensor(float("nan"), dtype=job.out.dtype)
            _scatter(job.out, place, values)
    job.status.fill_(min(faults, default=0))


def _scatter(out: Tensor, place: list[int], values: Tensor) -> None:
    """Writes a block's flat values, or one value everywhere, to its rows."""
    shape = (place[Column.ROWS], place[Column.DIM])
    start = out.storage_offset() + place[Column.OFFSET]  # as_strided counts from the storage's start
    rows = out.view(-1).as_strided(shape, (place[Column.STRIDE], 1), start)
    if values.dim():
        rows.copy_(values.view(shape))
    else:
        rows.fill_(values)


def _frame(job: DecodeJob, peer: int) -> Tensor:
    """The bytes received from a peer."""
    offset, size = int(job.offsets[peer]), int(job.sizes[peer])
    if offset < 0 or size < 0 or offset + size > job.buffer.numel():
        raise Rejected(Fault.TRUNCATED)
    if size < FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * job.totals.tables:
        raise Rejected(Fault.TRUNCATED)
    return job.buffer[offset : offset + size]


def _frame_header(frame: Tensor, dtype: torch.dtype, tables: int) -> None:
    header = bytes(frame[:FRAME_HEADER_BYTES].tolist())
    magic, version, dtype_index, flags, reserved, blocks, checksum, size = struct.unpack("<IBBBBIIQ", header)
    if magic != MAGIC:
        raise Rejected(Fault.MAGIC)
    if version != VERSION:
        raise Rejected(Fault.VERSION)
    if dtype_index != DTYPES.index(dtype):
        raise Rejected(Fault.DTYPE)
    if flags & ~FRAME_FLAG_CHECKSUM or reserved or (checksum and not flags & FRAME_FLAG_CHECKSUM):
        raise Rejected(Fault.RESERVED)
    if blocks != tables:
        raise Rejected(Fault.BLOCKS)
    if size != frame.numel() or size % FRAME_ALIGNMENT:
        raise Rejected(Fault.FRAME_SIZE)


def _block_header(frame: Tensor, table: int, end: int, place: list[int], dtype: torch.dtype) -> _Header:
    """A block's header and its payload, which starts at ``end``."""
    start = FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * table
    header = bytes(frame[start : start + BLOCK_HEADER_BYTES].tolist())
    mode, flags, dim, rows, bound, book, size = struct.unpack("<BBHIfIQ", header)
    if mode > max(Mode) or (mode in (Mode.FLOAT16, Mode.BFLOAT16) and dtype != torch.float32):
        raise Rejected(Fault.MODE)
    if flags & ~BLOCK_FLAG_CODEBOOK or (flags and mode not in _CODED):
        raise Rejected(Fault.RESERVED)
    if dim != place[Column.DIM]:
        raise Rejected(Fault.DIM)
    if rows != place[Column.ROWS]:
        raise Rejected(Fault.ROWS)
    if not (MIN_BOUND <= bound <= MAX_BOUND or (bound == 0 and mode == Mode.RAW)):
        raise Rejected(Fault.BOUND)
    if (book != 0) != (mode in _CODED):
        raise Rejected(Fault.CODEBOOK)
    if size % 4 or (rows == 0 and size):
        raise Rejected(Fault.PAYLOAD_SIZE)
    if rows == 0 and mode != Mode.RAW:
        raise Rejected(Fault.MODE)
    if size > frame.numel() - end:
        raise Rejected(Fault.PAYLOAD_SIZE)
    return _Header(Mode(mode), flags, torch.tensor(bound), book, frame[end : end + size])


def _padding(frame: Tensor, end: int) -> None:
    """Checks that the payloads, which end at ``end``, and the padding fill the frame."""
    if frame.numel() - end >= FRAME_ALIGNMENT:
        raise Rejected(Fault.FRAME_SIZE)
    if bool(frame[end:].any()):
        raise Rejected(Fault.PADDING)


def _decode_block(job: DecodeJob, peer: int, table: int, header: _Header, place: list[int]) -> Tensor:
    rows, dim = place[Column.ROWS], place[Column.DIM]
    dtype, payload, count = job.out.dtype, header.payload, rows * dim
    if rows == 0:
        return torch.zeros(0, dtype=dtype)
    if header.mode in (Mode.RAW, Mode.FLOAT16, Mode.BFLOAT16):
        sent = {Mode.RAW: dtype, Mode.FLOAT16: torch.float16, Mode.BFLOAT16: torch.bfloat16}[header.mode]
        size = count * sent.itemsize
        if payload.numel() != -(-size // 4) * 4:
            raise Rejected(Fault.PAYLOAD_SIZE)
        return payload[:size].clone().view(sent).to(dtype)
    lengths = None
    if header.mode in _CODED:
        lengths, payload = _codebook(job, peer, table, header)
    index = None
    if header.mode in (Mode.DEDUP, Mode.DEDUP_ENTROPY):
        index, distinct, payload = unpack_index(payload, rows)
        count = distinct * dim
    if lengths is None:
        values = unpack(payload, count, header.bound, dtype)
    else:
        values = decode_values(payload, count, lengths, header.bound, dtype)
    return values if index is None else values.view(-1, dim)[index].flatten()


def _codebook(job: DecodeJob, peer: int, table: int, header: _Header) -> tuple[Tensor, Tensor]:
    """The code lengths that a block uses and its payload after the codebook; keeps a book that came."""
    payload = header.payload
    if header.flags & BLOCK_FLAG_CODEBOOK:
        if payload.numel() < CODEBOOK_BYTES:
            raise Rejected(Fault.PAYLOAD_SIZE)
        lengths = bytes_to_lengths(payload[:CODEBOOK_BYTES])
        if not is_complete(lengths):
            raise Rejected(Fault.CODEBOOK)
        job.book_lengths[peer, table] = lengths
        signed = header.book - 2**32 if header.book >= 2**31 else header.book
        job.book_ids[peer, table] = signed
        return lengths, payload[CODEBOOK_BYTES:]
    if int(job.book_ids[peer, table]) & 0xFFFFFFFF != header.book:
        raise Rejected(Fault.CODEBOOK_MISSING)
    return job.book_lengths[peer, table], payload
