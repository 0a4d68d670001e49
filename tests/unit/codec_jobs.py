"""Builds the jobs of ``tightrec.kernels.job`` from plain lists, runs a backend and checks its manners.

P peers, T tables. Bits are numpy arrays, uint32 for float32 and uint16 for the 16-bit types, so that NaN
payloads compare. Each run puts guard bytes around what a backend may write and asserts that they are whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from tightrec.kernels.format import (
    BLOCK_HEADER_BYTES,
    FRAME_ALIGNMENT,
    FRAME_HEADER_BYTES,
    STRIP_VALUES,
    SYMBOLS,
    TILE_VALUES,
    BoundKind,
    Column,
    Request,
)
from tightrec.kernels.job import DecodeJob, EncodeJob, Stages, Totals

Span = tuple[int, int, int, int]
"""A block's first value, rows, stride and dim, in elements of the values tensor."""

GUARD_BYTES = 64
GUARD = 0xA5
SENTINEL = 0x5A
"""Fills what a decoder has not written: no NaN and no value that a test sends by chance."""


class Backend(Protocol):
    """A codec backend: a module with these four functions."""

    def encode(self, job: EncodeJob, /) -> None: ...

    def decode(self, job: DecodeJob, /) -> None: ...

    def encode_scratch_bytes(self, totals: Totals, stages: Stages, value_bytes: int, /) -> int: ...

    def decode_scratch_bytes(self, totals: Totals, value_bytes: int, /) -> int: ...


@dataclass
class Books:
    """Codebooks of T tables, or received ones of P x T blocks; the tensors may change in a call."""

    lengths: torch.Tensor
    """uint8 [..., 256]."""
    ids: torch.Tensor
    """int32 [...], zero for none."""

    @classmethod
    def none(cls, *shape: int) -> "Books":
        """No codebook anywhere: ``none(tables)`` for a sender, ``none(peers, tables)`` for a receiver."""
        return cls(torch.zeros(*shape, SYMBOLS, dtype=torch.uint8), torch.zeros(*shape, dtype=torch.int32))

    @classmethod
    def of(cls, lengths: Sequence[Any], ids: Sequence[int]) -> "Books":
        """A sender's books: one row of 256 code lengths for each table, or None, and the ids."""
        rows = [[0] * SYMBOLS if row is None else [int(x) for x in row] for row in lengths]
        return cls(torch.tensor(rows, dtype=torch.uint8), torch.tensor(list(ids), dtype=torch.int32))

    def to(self, device: Any) -> "Books":
        """The same on a device."""
        return Books(self.lengths.to(device), self.ids.to(device))


@dataclass
class Decoded:
    """What a decode left."""

    values: torch.Tensor
    """[size] on the CPU."""
    status: int
    books: Books

    @property
    def peer(self) -> int:
        return self.status >> 40

    @property
    def table(self) -> int:
        return self.status >> 8 & 0xFFFFFFFF

    @property
    def fault(self) -> int:
        return self.status & 0xFF


def to_bits(values: torch.Tensor) -> np.ndarray:
    """The bits of a float tensor: uint32 or uint16, the same shape."""
    values = values.detach().cpu().contiguous()
    if values.element_size() == 4:
        return values.view(torch.int32).numpy().view(np.uint32)
    return values.view(torch.int16).numpy().view(np.uint16)


def from_bits(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A float tensor with these bits; ``bits`` is uint32 or uint16, as wide as ``dtype``."""
    signed = np.ascontiguousarray(bits).view(np.int32 if bits.itemsize == 4 else np.int16)
    return torch.from_numpy(signed.copy()).view(dtype)


def make_blocks(peers: Sequence[Sequence[Span]], device: Any = "cpu") -> tuple[torch.Tensor, Totals]:
    """The block table int64 [P * T + 1, 8] and its totals, for every peer's list of T spans."""
    tables = len(peers[0]) if peers else 0
    assert all(len(spans) == tables for spans in peers)
    rows = []
    tiles = strips = first_row = first_value = 0
    for offset, count, stride, dim in (span for spans in peers for span in spans):
        rows.append([offset, count, stride, dim, tiles, strips, first_row, first_value])
        tiles += -(-count * dim // TILE_VALUES)
        strips += -(-count * dim // STRIP_VALUES)
        first_row += count
        first_value += count * dim
    rows.append([0, 0, 0, 0, tiles, strips, first_row, first_value])
    totals = Totals(
        peers=len(peers), tables=tables, tiles=tiles, strips=strips, rows=first_row, values=first_value
    )
    return torch.tensor(rows, dtype=torch.int64, device=device), totals


def flat_spans(shapes: Sequence[Sequence[tuple[int, int]]]) -> tuple[list[list[Span]], int]:
    """Spans for blocks back to back, from every peer's list of (rows, dim); and the values they hold."""
    peers, offset = [], 0
    for shape in shapes:
        spans = []
        for rows, dim in shape:
            spans.append((offset, rows, dim, dim))
            offset += rows * dim
        peers.append(spans)
    return peers, offset


def column_spans(peer_rows: Sequence[int], dims: Sequence[int]) -> tuple[list[list[Span]], int]:
    """Spans for a matrix [sum(peer_rows), sum(dims)]: a peer is a run of rows, a table a run of columns."""
    width = sum(dims)
    peers, row = [], 0
    for rows in peer_rows:
        columns = np.concatenate([[0], np.cumsum(dims)])
        peers.append(
            [(row * width + int(at), rows, width, dim) for at, dim in zip(columns, dims, strict=False)]
        )
        row += rows
    return peers, row * width


def gather(values: np.ndarray, span: Span) -> np.ndarray:
    """A block's values [rows, dim] out of the flat values."""
    offset, rows, stride, dim = span
    return values[offset + np.arange(rows)[:, None] * stride + np.arange(dim)]


def spans_of(blocks: torch.Tensor) -> list[Span]:
    """The spans of a block table, in order of peer, then table."""
    columns = [Column.OFFSET, Column.ROWS, Column.STRIDE, Column.DIM]
    return [tuple(row) for row in blocks[:-1, columns].tolist()]


def max_frame_bytes(blocks: torch.Tensor, totals: Totals, value_bytes: int) -> int:
    """Bytes that all frames together never exceed: every block raw."""
    spans = spans_of(blocks)
    total = 0
    for peer in range(totals.peers):
        size = FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * totals.tables
        for _, rows, _, dim in spans[peer * totals.tables : (peer + 1) * totals.tables]:
            size += -(-rows * dim * value_bytes // 4) * 4
        total += -(-size // FRAME_ALIGNMENT) * FRAME_ALIGNMENT
    return total


def make_stages(request: Sequence[int], kind: Sequence[int], with_books: bool) -> Stages:
    """The stages that these requests need; ``with_books``: there are codebooks or a histogram."""
    asked = set(request)
    return Stages(
        relative=any(k != BoundKind.ABSOLUTE for k in kind),
        half=bool(asked & {Request.HALF, Request.AUTO}),
        packed=bool(asked & {Request.PACKED, Request.ENTROPY, Request.AUTO}),
        dedup=bool(asked & {Request.DEDUP, Request.ENTROPY, Request.AUTO}),
        entropy=bool(asked & {Request.ENTROPY, Request.AUTO}) and with_books,
    )


class Guarded:
    """A uint8 tensor ``inner`` of ``size`` bytes, 64-byte aligned, between guard bytes."""

    def __init__(self, size: int, device: Any, fill: int = SENTINEL) -> None:
        self.whole = torch.full((size + 2 * GUARD_BYTES,), GUARD, dtype=torch.uint8, device=device)
        self.inner = self.whole[GUARD_BYTES : GUARD_BYTES + size]
        self.inner.fill_(fill)

    def check(self, name: str) -> None:
        """Assert that nothing was written outside."""
        size = len(self.inner)
        assert bool((self.whole[:GUARD_BYTES] == GUARD).all()), f"bytes before {name} were written"
        assert bool((self.whole[GUARD_BYTES + size :] == GUARD).all()), f"bytes after {name} were written"


def _spread(value: Any, tables: int) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value] * tables


def run_encode(
    backend: Backend,
    values: torch.Tensor,
    blocks: torch.Tensor,
    totals: Totals,
    *,
    bound: float | Sequence[float],
    request: int | Sequence[int],
    kind: int | Sequence[int] = BoundKind.ABSOLUTE,
    books: Books | None = None,
    sent: torch.Tensor | None = None,
    histogram: torch.Tensor | None = None,
) -> list[bytes]:
    """Encode ``values`` [any shape, contiguous] on their device and return each peer's frame.

    ``bound``, ``request`` and ``kind`` are one for all tables or one for each. ``sent`` int32 [P, T] and
    ``histogram`` int64 [T, 256] are changed as the job says. Frames must lie back to back from 0.
    """
    device, value_bytes, tables = values.device, values.element_size(), totals.tables
    kinds = [int(k) for k in _spread(kind, tables)]
    requests = [int(r) for r in _spread(request, tables)]
    with_books = books is not None or histogram is not None
    stages = make_stages(requests, kinds, with_books)
    books = (books or Books.none(tables)).to(device)
    out = Guarded(max_frame_bytes(blocks, totals, value_bytes), device)
    scratch = Guarded(backend.encode_scratch_bytes(totals, stages, value_bytes), device)
    offsets = torch.full((totals.peers,), -1, dtype=torch.int64, device=device)
    sizes = offsets.clone()
    before = to_bits(values).copy()
    backend.encode(
        EncodeJob(
            values=values,
            blocks=blocks.to(device),
            totals=totals,
            stages=stages,
            bound=torch.tensor(_spread(bound, tables), dtype=torch.float32, device=device),
            bound_kind=torch.tensor(kinds, dtype=torch.uint8, device=device),
            request=torch.tensor(requests, dtype=torch.uint8, device=device),
            book_lengths=books.lengths,
            book_ids=books.ids,
            book_sent=torch.zeros(totals.peers, tables, dtype=torch.int32, device=device)
            if sent is None
            else sent,
            histogram=histogram,
            out=out.inner,
            offsets=offsets,
            sizes=sizes,
            scratch=scratch.inner,
        )
    )
    out.check("out")
    scratch.check("scratch")
    assert np.array_equal(to_bits(values), before), "the values were changed"
    data = out.inner.cpu().numpy().tobytes()
    frames, at = [], 0
    for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
        assert offset == at and size > 0 and size % FRAME_ALIGNMENT == 0, (offset, at, size)
        at += size
        frames.append(data[offset:at])
    assert at <= len(data)
    return frames


def run_decode(
    backend: Backend,
    frames: Sequence[bytes],
    blocks: torch.Tensor,
    totals: Totals,
    dtype: torch.dtype,
    *,
    count: int | None = None,
    books: Books | None = None,
    offsets: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    device: Any = "cpu",
) -> Decoded:
    """Decode each peer's frame into ``count`` values (default: as far as the blocks reach).

    ``books`` [P, T] is changed as the job says. Frames start at multiples of 16 with guard bytes between;
    ``offsets`` and ``sizes`` replace what the job is told of where they lie. Elements outside all blocks
    must stay as they were, and are checked.
    """
    spans = spans_of(blocks)
    if count is None:
        count = max((o + (r - 1) * s + d for o, r, s, d in spans if r), default=0)
    value_bytes = torch.empty(0, dtype=dtype).element_size()
    buffer, starts = bytearray(), []
    for frame in frames:
        starts.append(len(buffer))
        buffer += frame + bytes([GUARD]) * (-len(frame) % FRAME_ALIGNMENT + FRAME_ALIGNMENT)
    books = (books or Books.none(totals.peers, totals.tables)).to(device)
    out = Guarded(count * value_bytes, device)
    scratch = Guarded(backend.decode_scratch_bytes(totals, value_bytes), device)
    status = torch.full((1,), -1, dtype=torch.int64, device=device)
    received = (
        torch.frombuffer(buffer, dtype=torch.uint8).clone() if buffer else torch.empty(0, dtype=torch.uint8)
    )
    backend.decode(
        DecodeJob(
            buffer=received.to(device),
            offsets=torch.tensor(
                starts if offsets is None else list(offsets), dtype=torch.int64, device=device
            ),
            sizes=torch.tensor(
                [len(f) for f in frames] if sizes is None else list(sizes), dtype=torch.int64, device=device
            ),
            blocks=blocks.to(device),
            totals=totals,
            book_lengths=books.lengths,
            book_ids=books.ids,
            out=out.inner.view(dtype),
            status=status,
            scratch=scratch.inner,
        )
    )
    out.check("out")
    scratch.check("scratch")
    values = out.inner.cpu().view(dtype)
    outside = np.ones(count, dtype=bool)
    for offset, rows, stride, dim in spans:
        outside[offset + np.arange(rows)[:, None] * stride + np.arange(dim)] = False
    untouched = to_bits(values)[outside] == (0x5A5A5A5A if value_bytes == 4 else 0x5A5A)
    assert untouched.all(), "values outside the blocks were written"
    return Decoded(values, int(status.item()), books)
