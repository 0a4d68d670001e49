"""Rounds of fuzzing: damaged frames through several backends at once, which must agree on every bit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import adversarial
import numpy as np
import torch
from codec_jobs import Backend, Books, Span, flat_spans, make_blocks, run_decode, run_encode, to_bits
from mutations import mutations

from tightrec.compression.codebooks import code_lengths
from tightrec.kernels.format import Request

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((5, 8),),
    ((40, 3), (0, 4), (1, 1)),
    ((33, 33),),
    ((1, 2048), (70, 1)),
    ((9, 31), (3, 64)),
    ((300, 32),),
    ((17000, 2),),
)
"""Blocks (rows, dim) of a frame: one group to several tiles, strips and segments."""
KINDS = ("normal", "gradients", "zipf_rows", "non_finite", "constant", "one_outlier")
BOOK = code_lengths([2 ** max(0, 12 - symbol) if symbol < 14 else 0 for symbol in range(256)])
AT_ONCE = 50


@dataclass(frozen=True)
class Case:
    """A well-formed frame and what a receiver expects."""

    frame: bytes
    shape: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    has_book: bool
    """Whether the receiver has the codebooks already."""


def cases(encoder: Backend, seed: int) -> list[Case]:
    """Frames of every request, type and shape, with codebooks sent along and kept."""
    found = []
    generator = torch.Generator().manual_seed(seed)
    for number, shape in enumerate(SHAPES):
        for request in Request:
            dtype = DTYPES[(number + request) % 3]
            spans, count = flat_spans([shape])
            blocks, totals = make_blocks(spans)
            kind = KINDS[(number * 5 + request + seed) % len(KINDS)]
            values = adversarial.GENERATORS[kind](count, dtype, 0.02, generator)
            has_book = bool((number + request) % 2)
            frames = run_encode(
                encoder,
                values,
                blocks,
                totals,
                bound=float(np.float32(0.02)),
                request=request,
                books=Books.of([BOOK] * len(shape), [3] * len(shape)),
                sent=torch.full((1, len(shape)), 3 * has_book, dtype=torch.int32),
            )
            found.append(Case(frames[0], shape, dtype, has_book))
    return found


def received_books(peers: int, case: Case) -> Books:
    """What a receiver of ``peers`` copies of a case's frame holds before."""
    books = Books.none(peers, len(case.shape))
    if case.has_book:
        books.lengths[:] = torch.tensor(BOOK, dtype=torch.uint8)
        books.ids[:] = 3
    return books


def comparable(frames: Sequence[bytes], spans: Sequence[Sequence[Span]], values: torch.Tensor) -> np.ndarray:
    """The bits of decoded values, with one NaN in blocks of 16-bit modes, where the format leaves it open."""
    bits = to_bits(values).copy()
    for frame, blocks in zip(frames, spans, strict=True):
        for number, (offset, rows, _, dim) in enumerate(blocks):
            if frame[24 + 24 * number : 25 + 24 * number] in (b"\x01", b"\x02"):
                part = slice(offset, offset + rows * dim)
                bits[part][values[part].isnan().numpy()] = 0x7FC0
    return bits


def fuzz(case: Case, other: Case, count: int, seed: int, backends: Sequence[Backend]) -> Iterator[bool]:
    """Decode ``count`` damaged copies of a frame by all backends; whether each call found a fault.

    A call decodes up to 50 of them, a peer each. Asserts that the backends agree on the values (NaN of
    faulty blocks included), on the first faulty peer, and on the codebooks that they keep.
    """
    generator = np.random.default_rng(seed)
    damaged = list(mutations(case.frame, generator, count, other.frame))
    for first in range(0, count, AT_ONCE):
        frames = damaged[first : first + AT_ONCE]
        spans, size = flat_spans([case.shape] * len(frames))
        blocks, totals = make_blocks(spans)
        results = []
        for backend in backends:
            books = received_books(len(frames), case)
            decoded = run_decode(backend, frames, blocks, totals, case.dtype, books=books, count=size)
            kept = (books.ids, books.lengths * (books.ids != 0)[..., None])
            results.append(
                (comparable(frames, spans, decoded.values), decoded.peer, bool(decoded.status), kept)
            )
        for result in results[1:]:
            at = f"shape {case.shape}, {case.dtype}, seed {seed}, frames from {first}"
            assert np.array_equal(result[0], results[0][0]), f"other values: {at}"
            assert result[1:3] == results[0][1:3], f"other verdicts: {at}"
            assert all(map(torch.equal, result[3], results[0][3])), f"other codebooks: {at}"
        yield results[0][2]
