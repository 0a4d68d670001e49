"""The backends and the independent decoder read frames alike: what is legal, the bits, the kept codebooks."""

import functools
import struct
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import adversarial
import codec_jobs
import independent_decoder as independent
import mutations
import numpy as np
import pytest
import torch
from codec_jobs import Books, Span
from hypothesis import given, settings
from hypothesis import strategies as st

from tightrec.kernels import cpu, reference
from tightrec.kernels.format import BoundKind, Request

NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
BOUND = float(np.float32(0.01))
SMALL_BOOK = [0] * 256
"""Eight short codes, so that most codes are escaped."""
SMALL_BOOK[:6] = [2, 2, 3, 4, 5, 6]
SMALL_BOOK[254:] = [7, 7]
SMALL_BOOK[6] = 2

BACKENDS = [reference, cpu]
MUTATIONS = {reference: 50, cpu: 150}
"""Damaged frames for each seed frame; the reference is slow."""

EXTREME_BOUNDS = [2.0**-126, BOUND, 2.0**125]
over_backends = pytest.mark.parametrize("backend", BACKENDS, ids=lambda m: m.__name__.rsplit(".", 1)[-1])


def expected_of(spans: Sequence[Span]) -> list[tuple[int, int]]:
    return [(rows, dim) for _, rows, _, dim in spans]


def nan_of(dtype: torch.dtype) -> int:
    return {torch.float32: 0x7FC00000, torch.float16: 0x7E00, torch.bfloat16: 0x7FC0}[dtype]


def kept(books: Books, peer: int) -> dict[int, tuple[int, bytes]]:
    """A peer's received codebooks as the independent decoder keeps them."""
    ids = books.ids[peer].tolist()
    rows = books.lengths[peer].numpy()
    return {table: (number & 0xFFFFFFFF, rows[table].tobytes()) for table, number in enumerate(ids) if number}


def check_alike(
    backend: Any,
    frame: bytes,
    spans: list[Span],
    dtype: torch.dtype,
    books: Books | None = None,
) -> bool:
    """Assert that a backend and the independent decoder agree on one peer's frame; whether it is legal."""
    blocks, totals = codec_jobs.make_blocks([spans])
    books = Books.none(1, len(spans)) if books is None else books
    mine = kept(books, 0)
    decoded = codec_jobs.run_decode(backend, [frame], blocks, totals, dtype, books=books)
    bits = codec_jobs.to_bits(decoded.values)
    results: list[np.ndarray | independent.Rejected]
    try:
        results = independent.decode_blocks(frame, expected_of(spans), NAMES[dtype], mine, checksum=False)
    except independent.Rejected as fault:
        results = [fault] * len(spans)
    faults = [table for table, result in enumerate(results) if isinstance(result, independent.Rejected)]
    assert bool(decoded.status) == bool(faults), (results, decoded.status)
    if 0 < len(faults) < len(spans):
        assert decoded.table == faults[0], (results, decoded.table)
    for number, (span, result) in enumerate(zip(spans, results, strict=True)):
        got = codec_jobs.gather(bits, span)
        if isinstance(result, independent.Rejected):
            assert (got == nan_of(dtype)).all(), f"block {number} is not filled with NaN: {result}"
            continue
        same = got == result
        mode = frame[24 + 24 * number]
        if mode in (
            independent.FLOAT16,
            independent.BFLOAT16,
        ):  # FORMAT.md says nothing of a NaN's bits there
            same |= np.isnan(got.view(np.float32)) & np.isnan(result.view(np.float32))
        assert same.all(), (
            f"block {number}, mode {mode}: {got[~same]} and {result[~same]}, {np.argwhere(~same)}"
        )
    assert kept(decoded.books, 0) == mine, "other codebooks are kept"
    return decoded.status == 0


def draw_values(kind: str, count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return adversarial.GENERATORS[kind](count, dtype, BOUND, generator)


KINDS = tuple(adversarial.GENERATORS)
SHAPE = st.tuples(st.integers(0, 70), st.integers(1, 40)) | st.sampled_from(
    [(0, 1), (1, 1), (1, 2048), (1025, 1), (33, 32), (32, 33), (257, 33)]
)


@over_backends
@settings(max_examples=80, deadline=None)
@given(
    shapes=st.lists(SHAPE, min_size=1, max_size=3),
    dtype=st.sampled_from(list(NAMES)),
    requests=st.lists(st.sampled_from(list(Request)), min_size=3, max_size=3),
    bound_kind=st.sampled_from(list(BoundKind)),
    kind=st.sampled_from(KINDS),
    with_book=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_encoded_frames_decode_alike_and_keep_the_bound(
    backend: ModuleType,
    shapes: list[tuple[int, int]],
    dtype: torch.dtype,
    requests: list[Request],
    bound_kind: BoundKind,
    kind: str,
    with_book: bool,
    seed: int,
) -> None:
    (spans,), count = codec_jobs.flat_spans([shapes])
    values = draw_values(kind, count, dtype, seed)
    blocks, totals = codec_jobs.make_blocks([spans])
    books = Books.of([SMALL_BOOK] * len(shapes), [9] * len(shapes)) if with_book else None
    asked: dict[str, Any] = {"bound": BOUND, "request": requests[: len(shapes)], "kind": bound_kind}
    (frame,) = codec_jobs.run_encode(backend, values, blocks, totals, books=books, **asked)
    assert check_alike(backend, frame, spans, dtype)
    for number, (offset, rows, _, dim) in enumerate(spans):
        (bound,) = struct.unpack_from("<f", frame, 32 + 24 * number)
        bits = independent.decode_frame(frame, expected_of(spans), NAMES[dtype])[number]
        y = codec_jobs.from_bits(bits.reshape(-1), dtype)
        adversarial.check_bound(values[offset : offset + rows * dim], y, bound)


ROWS, DIM = 24, 32
(TABLES,), _ = codec_jobs.flat_spans([[(ROWS, DIM)] * len(Request)])
"""One table for each request, all with the same values."""


def extreme_values(kind: str, dtype: torch.dtype, bound: float) -> torch.Tensor:
    return adversarial.GENERATORS[kind](ROWS * DIM, dtype, bound, torch.Generator().manual_seed(5))


@functools.cache
def extreme_frame(backend: ModuleType, kind: str, dtype: torch.dtype, bound: float) -> bytes:
    values = extreme_values(kind, dtype, bound).repeat(len(Request))
    blocks, totals = codec_jobs.make_blocks([TABLES])
    books = Books.of([SMALL_BOOK] * len(Request), [3] * len(Request))
    asked: dict[str, Any] = {"bound": bound, "request": list(Request), "books": books}
    (frame,) = codec_jobs.run_encode(backend, values, blocks, totals, **asked)
    return frame


@over_backends
@pytest.mark.parametrize("dtype", list(NAMES), ids=list(NAMES.values()))
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_values_keeps_every_bound(backend: ModuleType, dtype: torch.dtype, kind: str) -> None:
    blocks, totals = codec_jobs.make_blocks([TABLES])
    for bound in EXTREME_BOUNDS:
        x = extreme_values(kind, dtype, bound)
        frame = extreme_frame(backend, kind, dtype, bound)
        assert frame == extreme_frame(reference, kind, dtype, bound)
        decoded = codec_jobs.run_decode(backend, [frame], blocks, totals, dtype)
        assert decoded.status == 0
        for request, (offset, _, _, _) in zip(Request, TABLES, strict=True):
            y = decoded.values[offset : offset + ROWS * DIM]
            adversarial.check_bound(x, y, bound)
            if request == Request.RAW:
                assert np.array_equal(codec_jobs.to_bits(y), codec_jobs.to_bits(x))


def seed_frame(request: Request, kind: str, dtype: torch.dtype, seed: int) -> tuple[bytes, list[Span]]:
    """A frame of three blocks, the first empty or not, to damage."""
    (spans,), count = codec_jobs.flat_spans([[(5 * (seed % 2), 3), (40, 9), (67, 16)]])
    values = draw_values(kind, count, dtype, seed)
    blocks, totals = codec_jobs.make_blocks([spans])
    (frame,) = codec_jobs.run_encode(
        reference,
        values,
        blocks,
        totals,
        bound=BOUND,
        request=request,
        books=Books.of([SMALL_BOOK] * 3, [1, 2, 1]),
    )
    return frame, spans


@over_backends
@pytest.mark.parametrize("dtype", list(NAMES), ids=list(NAMES.values()))
@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (Request.RAW, "uniform"),
        (Request.HALF, "zeros"),
        (Request.PACKED, "non_finite"),
        (Request.DEDUP, "zipf_rows"),
        (Request.ENTROPY, "gradients"),
        (Request.ENTROPY, "zipf_rows"),
    ],
)
def test_damaged_frames_are_judged_alike(
    backend: ModuleType, dtype: torch.dtype, request_: Request, kind: str
) -> None:
    frame, spans = seed_frame(request_, kind, dtype, 1)
    other, _ = seed_frame(Request.AUTO, "uniform", dtype, 1)
    generator = np.random.default_rng([int(request_), list(NAMES).index(dtype)])
    count, past_headers, legal = MUTATIONS[backend], 0, 0
    for number, damaged in enumerate(mutations.mutations(frame, generator, count, other)):
        books = Books.of([SMALL_BOOK] * 3, [1, 0, 5])
        books = Books(books.lengths[None], books.ids[None])
        try:
            legal += check_alike(backend, damaged, spans, dtype, books)
        except AssertionError as error:
            raise AssertionError(f"mutation {number}: {error}") from error
        try:
            independent.read_headers(damaged, expected_of(spans), NAMES[dtype], False)
            past_headers += 1
        except independent.Rejected:
            pass
    assert past_headers >= count / 2, "too few mutations reach the payloads"
    assert 0 < legal < count
