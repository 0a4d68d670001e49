"""The encode kernels, run on the CPU through the shim, write the reference's bytes.

Every comparison is of whole frames, the codebooks sent and the histogram, whatever the order in which blocks,
warps and lanes run; a smaller set runs under the address and undefined-behaviour sanitizers.
"""

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import codec_jobs
import cuda_shim
import numpy as np
import pytest
import torch
from codec_jobs import Books
from cuda_shim import Recorder, ShimExecutor, kernel_sources
from torch import Tensor

from tightrec.kernels import format as frame_format
from tightrec.kernels import reference
from tightrec.kernels.cuda import encode as cuda_encode
from tightrec.kernels.cuda.executor import Argument
from tightrec.kernels.format import SYMBOLS, BoundKind, Mode, Request
from tightrec.kernels.job import EncodeJob

needs_compiler = cuda_shim.requires_compiler
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [
    [(1, 1), (0, 64), (511, 2), (33, 3)],
    [(32, 31), (31, 32), (2049, 1), (0, 7)],
    [(70, 128), (3, 2048), (65, 33), (33, 64)],
]


def shim_backend(seed: int = 0) -> SimpleNamespace:
    executor = ShimExecutor(kernel_sources("encode"), seed)
    return SimpleNamespace(
        encode=lambda job: cuda_encode.encode(job, executor),
        encode_scratch_bytes=cuda_encode.encode_scratch_bytes,
        executor=executor,
    )


def sanitized_backend(folder: Path) -> SimpleNamespace:
    def encode(job: EncodeJob) -> None:
        recorder = Recorder(kernel_sources("encode"))
        cuda_encode.encode(job, recorder)
        recorder.run(folder)

    return SimpleNamespace(encode=encode, encode_scratch_bytes=cuda_encode.encode_scratch_bytes)


def normal(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def repeated(count: int, seed: int) -> Tensor:
    """Few values, so that rows repeat; signed zeros differ in bits but not in what they decode to."""
    choice = torch.tensor([0.0, -0.0, 1.0, -2.5])
    picked = torch.randint(0, 4, (-(-count // 64),), generator=torch.Generator().manual_seed(seed))
    return choice[picked].repeat_interleave(64)[:count]


def awkward(count: int, seed: int) -> Tensor:
    """Groups of every kind: exceptions alone and in numbers, NaN, infinities, denormals, huge values."""
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-40, -0.0, 3e38, 6e4, 1e-7])
    scale = (
        10.0 ** torch.randint(-4, 5, (-(-count // 32),), generator=generator).repeat_interleave(32)[:count]
    )
    values = torch.randn(count, generator=generator) * scale
    rare = torch.rand(count, generator=generator)
    often = torch.rand(-(-count // 32), generator=generator).repeat_interleave(32)[:count] ** 6
    picked = special[torch.randint(0, len(special), (count,), generator=generator)]
    return torch.where(rare < often, picked, values)


VALUES: dict[str, Callable[[int, int], Tensor]] = {"normal": normal, "repeated": repeated, "awkward": awkward}


def book(seed: int) -> list[int]:
    """Code lengths (Huffman's) for 64 small symbols, of which two are missing, and the escapes."""
    present = np.random.default_rng(seed).choice(np.arange(16, 64), 46, replace=False).tolist()
    trees = [(math.exp(-symbol / 12), [symbol]) for symbol in [*range(16), *present]]
    trees += [(0.01, [254]), (0.01, [255])]
    lengths = [0] * SYMBOLS
    while len(trees) > 1:
        trees.sort(reverse=True)
        (one, left), (other, right) = trees.pop(), trees.pop()
        for symbol in left + right:
            lengths[symbol] += 1
        trees.append((one + other, left + right))
    assert max(lengths) <= frame_format.MAX_CODE_LENGTH
    return lengths


def assert_same(
    backend: SimpleNamespace,
    values: Tensor,
    spans: Sequence[Sequence[codec_jobs.Span]],
    *,
    request: int | Sequence[int],
    kind: int | Sequence[int] = BoundKind.ABSOLUTE,
    bound: float | Sequence[float] = 0.05,
    books: Books | None = None,
    sent: Tensor | None = None,
    histogram: bool = False,
) -> list[bytes]:
    blocks, totals = codec_jobs.make_blocks(spans)
    results = []
    for each in (reference, backend):
        book_sent = (
            torch.zeros(totals.peers, totals.tables, dtype=torch.int32) if sent is None else sent.clone()
        )
        counts = torch.full((totals.tables, SYMBOLS), 3, dtype=torch.int64) if histogram else None
        frames = codec_jobs.run_encode(
            each,
            values,
            blocks,
            totals,
            bound=bound,
            request=request,
            kind=kind,
            books=books,
            sent=book_sent,
            histogram=counts,
        )
        results.append((frames, book_sent, counts))
    (expected, expected_sent, expected_counts), (frames, book_sent, counts) = results
    assert frames == expected
    assert torch.equal(book_sent, expected_sent)
    assert counts is None or torch.equal(counts, expected_counts)
    return frames


def modes(frame: bytes, tables: int) -> list[Mode]:
    return [Mode(frame[24 + 24 * table]) for table in range(tables)]


def test_constants_are_the_formats() -> None:
    text = (cuda_shim.KERNELS / "common.cuh").read_text()
    found = re.findall(r"constexpr (?:u32|int|i64|float) ([A-Z_]+) = ([0-9.A-Fa-fx]+?)[uf]?;", text)
    names = {name: float(int(value, 0)) if "." not in value else float(value) for name, value in found}
    bits = {"MIN_BOUND_BITS": frame_format.MIN_BOUND, "MAX_BOUND_BITS": frame_format.MAX_BOUND}
    for name, bound in bits.items():
        assert names.pop(name) == torch.tensor(bound).view(torch.int32).item()
    assert len(names) > 25
    assert names == {name: float(getattr(frame_format, name)) for name in names}
    for enum in (Mode, Request, BoundKind, frame_format.Column):
        prefix = {"BoundKind": "BOUND"}.get(enum.__name__, enum.__name__.upper())
        listed = re.search(rf"enum {enum.__name__} {{(.*?)}};", text, re.S)
        assert listed is not None
        parts = [part.strip() for part in listed[1].split(",")]
        assert [part for part in parts if part != "COLUMNS"] == [f"{prefix}_{each.name}" for each in enum]


@needs_compiler
@pytest.mark.parametrize("request_", list(Request))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", VALUES)
def test_bytes_are_the_references(which: str, dtype: torch.dtype, request_: Request) -> None:
    spans, count = codec_jobs.flat_spans(SHAPES)
    values = VALUES[which](count, int(request_)).to(dtype)
    books = Books.of([book(1), None, book(2), book(3)], [7, 0, 8, 9])
    kind = list(BoundKind)[int(request_) % 3]
    bound = [each / (8 if kind == BoundKind.RANGE else 1) for each in (0.1, 0.4, 0.2, 0.05)]
    shim = shim_backend(int(request_))
    frames = assert_same(
        shim, values, spans, request=request_, bound=bound, kind=kind, books=books, histogram=True
    )
    if request_ == Request.ENTROPY and which != "awkward":
        coded = Mode.ENTROPY if which == "normal" else Mode.DEDUP_ENTROPY
        assert coded in [mode for frame in frames for mode in modes(frame, 4)]


@needs_compiler
@pytest.mark.parametrize("request_", [Request.ENTROPY, Request.AUTO])
def test_without_books_the_entropy_stage_is_left_out(request_: Request) -> None:
    spans, count = codec_jobs.flat_spans(SHAPES)
    shim = shim_backend()
    assert_same(shim, repeated(count, 1), spans, request=request_, bound=0.3)
    assert "encode_stream_f32" not in shim.executor.names


@needs_compiler
@pytest.mark.parametrize("seed", range(6))
def test_requests_kinds_and_books_may_differ_by_table(seed: int) -> None:
    generator = np.random.default_rng(seed)
    tables, peer_rows = 9, [int(rows) for rows in generator.integers(0, 200, 4)]
    dims = [int(dim) for dim in generator.choice([1, 2, 3, 16, 31, 33, 64, 128], tables)]
    spans, count = codec_jobs.column_spans(peer_rows, dims)
    parts = [VALUES[name](count, seed) for name in VALUES]
    picked = torch.randint(0, 3, (count // 64 + 1,), generator=torch.Generator().manual_seed(seed))
    values = torch.stack(parts).gather(0, picked.repeat_interleave(64)[:count][None])[0].to(DTYPES[seed % 3])
    ids = [int(number) for number in generator.integers(0, 3, tables)]
    books = Books.of([book(number) if number else None for number in ids], ids)
    sent = torch.from_numpy(generator.integers(0, 3, (4, tables)).astype(np.int32))
    assert_same(
        shim_backend(seed),
        values,
        spans,
        request=[int(each) for each in generator.integers(0, 6, tables)],
        kind=[int(each) for each in generator.integers(0, 3, tables)],
        bound=[float(2.0**power) for power in generator.integers(-12, 4, tables)],
        books=books,
        sent=sent,
        histogram=bool(seed % 2),
    )


@needs_compiler
def test_every_mode_is_reached_and_books_are_sent_once() -> None:
    spans, count = codec_jobs.flat_spans([[(100, 64)] * 7])
    each = count // 7
    rows = (normal(each // 4, 9) / 2).clamp(-1.5, 1.5).repeat(4)
    too_large_for_float16 = torch.cat([torch.tensor([2.0**100]), normal(each - 1, 4)])
    parts = [normal(each, 1), normal(each, 2), too_large_for_float16, normal(each, 3), repeated(each, 5)]
    values = torch.cat([*parts, normal(each, 6).clamp(-1.9, 1.9), rows])
    request = [
        Request.RAW,
        Request.HALF,
        Request.HALF,
        Request.PACKED,
        Request.DEDUP,
        Request.ENTROPY,
        Request.AUTO,
    ]
    # Codes up to 6 at a bound of 0.3, the small ones in few bits.
    lengths = [0] * SYMBOLS
    lengths[:8] = [2, 2, 3, 3, 4, 4, 5, 5]
    lengths[254] = lengths[255] = 5
    books = Books.of([lengths] * 7, [5] * 7)
    shim = shim_backend(3)
    frames = assert_same(shim, values, spans, request=request, bound=[0.3] * 7, books=books)
    expected = [
        Mode.RAW,
        Mode.FLOAT16,
        Mode.BFLOAT16,
        Mode.PACKED,
        Mode.DEDUP,
        Mode.ENTROPY,
        Mode.DEDUP_ENTROPY,
    ]
    assert modes(frames[0], 7) == expected
    sent = torch.full((1, 7), 5, dtype=torch.int32)
    again = assert_same(shim, values, spans, request=request, bound=[0.3] * 7, books=books, sent=sent)
    assert len(frames[0]) - len(again[0]) == 2 * frame_format.CODEBOOK_BYTES


@needs_compiler
def test_the_order_of_threads_does_not_matter() -> None:
    spans, count = codec_jobs.flat_spans([[(400, 8), (64, 96)], [(100, 33), (90, 64)]])
    values = repeated(count, 5) + (normal(count, 5) > 1.5) * 4.0
    books = Books.of([book(1), book(4)], [1, 2])
    for seed in range(8):
        shim = shim_backend(seed)
        assert_same(shim, values, spans, request=Request.ENTROPY, books=books, histogram=True, bound=0.5)
        assert_same(shim, values, spans, request=Request.DEDUP, bound=0.1, kind=BoundKind.RMS)


@needs_compiler
@pytest.mark.parametrize(("peers", "tables"), [(70, 3), (3, 70)])
def test_many_peers_and_tables(peers: int, tables: int) -> None:
    shapes = [[((peer * 7 + table) % 5, 1 + table % 9) for table in range(tables)] for peer in range(peers)]
    spans, count = codec_jobs.flat_spans(shapes)
    request = [(Request.PACKED, Request.DEDUP, Request.AUTO)[table % 3] for table in range(tables)]
    assert_same(shim_backend(), normal(count, 0), spans, request=request, books=Books.none(tables))


@needs_compiler
@pytest.mark.parametrize("request_", list(Request))
@pytest.mark.parametrize("shapes", [[[(0, 4), (0, 1)], [(0, 4), (0, 1)]], [[], []], [[(1, 1)]]], ids=str)
def test_hardly_any_values(shapes: list[list[tuple[int, int]]], request_: Request) -> None:
    spans, count = codec_jobs.flat_spans(shapes)
    books = Books.none(len(shapes[0]))
    assert_same(shim_backend(), normal(count, 0), spans, request=request_, kind=BoundKind.RANGE, books=books)


@needs_compiler
def test_squares_are_summed_in_the_one_order() -> None:
    """The exact RMS is a tie between two float32 numbers: which it becomes shows the rounding of each sum."""
    count, last = 3_000, 2**23 + np.arange(24) * 10_007
    spans, total = codec_jobs.flat_spans([[(count, 1)] * len(last)])
    values = normal(total, 1).view(len(last), count)
    for row, mantissa in zip(values.numpy(), last.tolist(), strict=True):
        target = count * Fraction(2 * mantissa + 1, 2**24) ** 2 * 2
        row[-4:] = 0.0
        for at in range(-4, 0):
            missing = target - sum(Fraction(float(x)) ** 2 for x in row)
            row[at] = np.float32(max(0.0, float(missing)) ** 0.5)
            row[at] = (
                row[at] if Fraction(float(row[at])) ** 2 <= missing else np.nextafter(row[at], np.float32(0))
            )
    assert_same(
        shim_backend(), values.flatten(), spans, request=Request.PACKED, kind=BoundKind.RMS, bound=1.0
    )


@needs_compiler
def test_no_peer_is_no_launch() -> None:
    shim = shim_backend()
    blocks, totals = codec_jobs.make_blocks([])
    assert codec_jobs.run_encode(shim, torch.zeros(0), blocks, totals, bound=1.0, request=2) == []
    assert shim.executor.names == []


@needs_compiler
@pytest.mark.parametrize("request_", [Request.PACKED, Request.DEDUP, Request.ENTROPY])
def test_segments_and_strips(request_: Request) -> None:
    spans, count = codec_jobs.flat_spans([[(530, 64), (33_001, 1)]])
    books = Books.of([book(1), book(2)], [1, 2])
    kind = BoundKind.RMS
    assert_same(shim_backend(), normal(count, 1), spans, request=request_, bound=0.01, books=books, kind=kind)


@pytest.mark.parametrize(
    ("request_", "kind", "launches"),
    [
        (Request.RAW, BoundKind.ABSOLUTE, "pack layout write"),
        (Request.PACKED, BoundKind.ABSOLUTE, "pack layout write"),
        (Request.PACKED, BoundKind.RMS, "stats bounds pack layout write"),
        (Request.HALF, BoundKind.ABSOLUTE, "halves pack layout write"),
        (Request.DEDUP, BoundKind.ABSOLUTE, "pack hash rank pack_rows layout write"),
        (Request.ENTROPY, BoundKind.ABSOLUTE, "pack hash rank pack_rows choose chunks layout write stream"),
    ],
)
def test_nothing_is_launched_that_nobody_needs(request_: Request, kind: BoundKind, launches: str) -> None:
    names: list[str] = []

    class Names:
        def launch(
            self, kernel_name: str, grid: int, block: int, args: Sequence[Argument], shared_bytes: int = 0
        ) -> None:
            assert grid > 0
            names.append(kernel_name.removeprefix("encode_").removesuffix("_f32"))

    def encode(job: EncodeJob) -> None:
        cuda_encode.encode(job, Names())
        job.offsets.fill_(0)
        job.sizes.fill_(16)

    backend = SimpleNamespace(encode=encode, encode_scratch_bytes=cuda_encode.encode_scratch_bytes)
    spans, count = codec_jobs.flat_spans([[(3, 4)]])
    blocks, totals = codec_jobs.make_blocks(spans)
    values, books = torch.zeros(count), Books.none(1)
    codec_jobs.run_encode(
        backend, values, blocks, totals, bound=1.0, request=request_, kind=kind, books=books
    )
    assert names == launches.split()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_touched_that_is_not_given(dtype: torch.dtype, tmp_path: Path) -> None:
    spans, count = codec_jobs.flat_spans([[(33, 31), (65, 128), (0, 3)], [(5, 2048), (1, 1), (129, 2)]])
    books = Books.of([book(1), book(2), None], [1, 2, 0])
    backend = sanitized_backend(tmp_path)
    for request_ in (Request.RAW, Request.HALF, Request.PACKED, Request.DEDUP, Request.AUTO):
        values, kind = awkward(count, int(request_)).to(dtype), list(BoundKind)[int(request_) % 3]
        assert_same(backend, values, spans, request=request_, kind=kind, books=books, histogram=True)
