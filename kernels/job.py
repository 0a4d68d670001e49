"""What every backend is called with.

Shapes: P peers, T tables, B = P*T blocks, block b belongs to peer b // T and table b % T. All tensors of a
job lie on one device; nothing in a job is read back to the host.
"""

from dataclasses import astuple, dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over the blocks that the host knows, to size launches and scratch."""

    peers: int
    tables: int
    tiles: int
    """Tiles of 1,024 values."""
    strips: int
    """Strips of 8,192 values."""
    rows: int
    values: int


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What the tables' requests need, so that a launch nobody needs is left out."""

    relative: bool
    """Some bound is relative to its block."""
    half: bool
    """Some request is HALF or AUTO."""
    packed: bool
    """Some request is PACKED, ENTROPY or AUTO."""
    dedup: bool
    """Some request is DEDUP, ENTROPY or AUTO."""
    entropy: bool
    """Some request is ENTROPY or AUTO, and there are codebooks or a histogram."""

    @property
    def bits(self) -> int:
        """The fields as bits of a number, the first lowest: how operators and kernels take them."""
        return sum(bit << place for place, bit in enumerate(astuple(self)))


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """One call of a backend's ``encode``: writes ``out``, ``offsets`` and ``sizes``."""

    values: Tensor
    """Contiguous, float32, float16 or bfloat16; the blocks' OFFSET and STRIDE count its elements."""
    blocks: Tensor
    """int64 [B + 1, 8], see ``format.Column``."""
    totals: Totals
    stages: Stages
    bound: Tensor
    """float32 [T]: absolute, or the share of range or RMS."""
    bound_kind: Tensor
    """uint8 [T], ``format.BoundKind``."""
    request: Tensor
    """uint8 [T], ``format.Request``."""
    book_lengths: Tensor
    """uint8 [T, 256] code lengths; only read where the id is not zero."""
    book_ids: Tensor
    """int32 [T], zero: the table has no codebook."""
    book_sent: Tensor
    """int32 [P, T], changed: id of the codebook the peer has; a block includes its book where it differs."""
    histogram: Tensor | None
    """int64 [T, 256], added to: symbols of the rows that ENTROPY and AUTO tables send."""
    out: Tensor
    """uint8, at least max_frame_bytes in all, 16-byte aligned: the frames, back to back."""
    offsets: Tensor
    """int64 [P], written: where each frame starts in ``out``."""
    sizes: Tensor
    """int64 [P], written: bytes of each frame."""
    scratch: Tensor
    """uint8, at least the backend's ``encode_scratch_bytes``, 16-byte aligned; its content means nothing."""


@dataclass(frozen=True, kw_only=True)
class DecodeJob:
    """One call of a backend's ``decode``: writes the blocks' values in ``out`` and ``status``."""

    buffer: Tensor
    """uint8 that holds the frames; anything may be in it."""
    offsets: Tensor
    """int64 [P]: where each frame starts in ``buffer``."""
    sizes: Tensor
    """int64 [P]: bytes received for each frame."""
    blocks: Tensor
    """int64 [B + 1, 8], see ``format.Column``: the blocks that are expected."""
    totals: Totals
    book_lengths: Tensor
    """uint8 [P, T, 256], changed: the codebooks received so far."""
    book_ids: Tensor
    """int32 [P, T], changed: their ids, zero for none."""
    out: Tensor
    """Contiguous; every value of every block is written, and nothing else."""
    status: Tensor
    """int64 [1], written: 0, or the smallest ``peer << 40 | table << 8 | fault`` among the faults found.

    A faulty block is filled with NaN; a faulty frame header or block header, a missing or faulty size, fills
    all blocks of that peer. Faults of a frame as a whole count as table 0. Where there are
    several faults in a block or in a frame's headers, which one is told may differ between backends; whether
    there is one may not.
    """
    scratch: Tensor
    """uint8, at least the backend's ``decode_scratch_bytes``, 16-byte aligned."""
