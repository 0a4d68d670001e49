"""Encoding block by block: the choice of a mode and the writing of frames (docs/FORMAT.md)."""

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
    FRAME_HEADER_BYTES,
    MAGIC,
    SYMBOLS,
    VERSION,
    BoundKind,
    Column,
    Mode,
    Request,
)
from tightrec.kernels.job import EncodeJob, Stages, Totals
from tightrec.kernels.reference import bound as bounds
from tightrec.kernels.reference.codebook import lengths_to_bytes
from tightrec.kernels.reference.dedup import distinct_rows, pack_index
from tightrec.kernels.reference.entropy import encode_values, symbols
from tightrec.kernels.reference.packed import pack
from tightrec.kernels.reference.quantise import Codes, decoded, half_dtype, quantise


class _Block(NamedTuple):
    mode: Mode
    bound: float
    payload: Tensor
    book: int = 0
    includes_book: bool = False


def encode_scratch_bytes(totals: Totals, stages: Stages, value_bytes: int) -> int:
    """Bytes of scratch that ``encode`` needs: none, it allocates as it goes."""
    return 0


def encode(job: EncodeJob) -> None:
    """Writes the frames of a job, block by block."""
    blocks = job.blocks.tolist()
    end = 0
    for peer in range(job.totals.peers):
        encoded = []
        for table in range(job.totals.tables):
            place = blocks[peer * job.totals.tables + table]
            encoded.append(_encode_block(job, peer, table, gather(job.values, place), place[Column.DIM]))
        headers = [
            struct.pack(
                "<BBHIfIQ",
                block.mode,
                BLOCK_FLAG_CODEBOOK * block.includes_book,
                blocks[peer * job.totals.tables + table][Column.DIM],
                blocks[peer * job.totals.tables + table][Column.ROWS],
                block.bound,
                block.book,
                block.payload.numel(),
            )
            for table, block in enumerate(encoded)
        ]
        used = FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * len(encoded)
        used += sum(block.payload.numel() for block in encoded)
        size = -(-used // FRAME_ALIGNMENT) * FRAME_ALIGNMENT
        dtype = DTYPES.index(job.values.dtype)
        header = struct.pack("<IBBBBIIQ", MAGIC, VERSION, dtype, 0, 0, len(encoded), 0, size)
        head = torch.frombuffer(bytearray(b"".join([header, *headers])), dtype=torch.uint8)
        padding = torch.zeros(size - used, dtype=torch.uint8)
        job.out[end : end + size] = torch.cat([head, *(block.payload for block in encoded), padding])
        job.offsets[peer], job.sizes[peer] = end, size
        end += size


def gather(values: Tensor, place: list[int]) -> Tensor:
    """The values of a block, flat and contiguous, by its row of the block table."""
    shape = (place[Column.ROWS], place[Column.DIM])
    strides = (place[Column.STRIDE], 1)
    start = values.storage_offset() + place[Column.OFFSET]  # as_strided counts from the storage's start
    return values.view(-1).as_strided(shape, strides, start).reshape(-1)


def _encode_block(job: EncodeJob, peer: int, table: int, values: Tensor, dim: int) -> _Block:
    if values.numel() == 0:
        return _Block(Mode.RAW, 0.0, torch.zeros(0, dtype=torch.uint8))
    raw = _padded(values)
    request = Request(int(job.request[table]))
    if request == Request.RAW:
        return _Block(Mode.RAW, 0.0, raw)
    bound = bounds.resolve(values, job.bound[table], BoundKind(int(job.bound_kind[table])))
    best = _Block(Mode.RAW, float(bound), raw)
    if request != Request.HALF:
        best = _quantised(job, peer, table, values, bound, dim)
    if request in (Request.HALF, Request.AUTO):
        best = _half(values, bound, best)
    if best.payload.numel() >= raw.numel():
        best = _Block(Mode.RAW, float(bound), raw)
    if best.includes_book:
        job.book_sent[peer, table] = best.book
    return best


def _half(values: Tensor, bound: Tensor, best: _Block) -> _Block:
    """The block in 16 bits where that keeps the bound and is smaller."""
    dtype = half_dtype(values, bound)
    if dtype is None:
        return best
    payload = _padded(values.to(dtype))
    # Compared without the codebook, which is paid once: or a book that is due would never be sent.
    if payload.numel() >= best.payload.numel() - CODEBOOK_BYTES * best.includes_book:
        return best
    return _Block(Mode.FLOAT16 if dtype == torch.float16 else Mode.BFLOAT16, float(bound), payload)


def _quantised(job: EncodeJob, peer: int, table: int, values: Tensor, bound: Tensor, dim: int) -> _Block:
    """The smallest of what the table's request allows: packed, dedup, and entropy over the smaller."""
    request = Request(int(job.request[table]))
    codes = quantise(values, bound)
    # A row stands for all that decode to the same bits, so even a raw group must hold what it decodes to.
    received = decoded(values, codes, bound)
    candidates = []
    if request != Request.DEDUP:
        candidates.append((Mode.PACKED, torch.zeros(0, dtype=torch.uint8), received, codes))
    if request != Request.PACKED:
        owners, index = distinct_rows(received, dim)
        own, code, exception = (each.view(-1, dim)[owners].flatten() for each in (received, *codes))
        sent = Codes(code, exception)
        candidates.append((Mode.DEDUP, pack_index(owners.numel(), index), own, sent))
    packed = [torch.cat([index, pack(own, sent)]) for _, index, own, sent in candidates]
    smallest = min(range(len(packed)), key=lambda i: packed[i].numel())
    mode, index, own, sent = candidates[smallest]
    best = _Block(mode, float(bound), packed[smallest])
    if request in (Request.PACKED, Request.DEDUP):
        return best

    if job.histogram is not None:
        job.histogram[table] += torch.bincount(symbols(sent), minlength=SYMBOLS)
    book = int(job.book_ids[table])
    if not book:
        return best
    payload = torch.cat([index, encode_values(own, sent, job.book_lengths[table])])
    include = int(job.book_sent[peer, table]) != book
    raw_bytes = _padded(values).numel()
    if payload.numel() >= best.payload.numel() or payload.numel() + include * CODEBOOK_BYTES >= raw_bytes:
        return best
    if include:
        payload = torch.cat([lengths_to_bytes(job.book_lengths[table]), payload])
    coded = Mode.ENTROPY if mode == Mode.PACKED else Mode.DEDUP_ENTROPY
    return _Block(coded, float(bound), payload, book, include)


def _padded(values: Tensor) -> Tensor:
    """The values' bytes, with zeros to a multiple of 4."""
    data = values.contiguous().view(torch.uint8).flatten()
    return torch.cat([data, data.new_zeros(-data.numel() % 4)])
