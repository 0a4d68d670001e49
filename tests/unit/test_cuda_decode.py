"""The CUDA decode kernels, run on the CPU by the shim, give what the reference gives, bit by bit.

Good frames decode to the same values, bad ones are rejected alike and fill the same places with NaN, and no
frame makes a kernel read or write where it may not (that part runs under sanitizers).
"""

import re
from collections.abc import Iterator
from pathlib import Path

import cuda_shim
import numpy as np
import pytest
import torch
from codec_jobs import (
    Books,
    flat_spans,
    from_bits,
    make_blocks,
    run_decode,
    run_encode,
    to_bits,
)
from cuda_decode_cases import (
    BOOKS,
    Case,
    ShimBackend,
    assert_same,
    decoded,
    encoded,
    may_differ,
    small_case,
    values_of,
)
from cuda_shim import Recorder, kernel_sources
from mutations import mutations

from tightrec.kernels import reference
from tightrec.kernels.cuda.decode import decode as cuda_decode
from tightrec.kernels.cuda.decode import decode_scratch_bytes as cuda_scratch_bytes
from tightrec.kernels.format import DTYPES, Column, Fault, Mode, Request
from tightrec.kernels.job import DecodeJob, Totals

pytestmark = cuda_shim.requires_compiler


@pytest.fixture(scope="module")
def shim() -> ShimBackend:
    return ShimBackend(1)


def test_the_faults_are_those_of_the_format() -> None:
    text = (cuda_shim.KERNELS / "decode_common.cuh").read_text()
    names = re.findall(r"FAULT_(\w+)", text[text.index("enum Fault {") : text.index("};")])
    assert names == [fault.name for fault in Fault]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("request_", list(Request))
def test_values_equal_the_reference(shim: ShimBackend, dtype: torch.dtype, request_: Request) -> None:
    for seed in range(2):
        assert assert_same(small_case(dtype, request_, seed), shim).status == 0


def test_the_cases_show_every_mode() -> None:
    modes = {
        mode for r in Request for d in DTYPES for seed in (0, 1) for mode in small_case(d, r, seed).modes()
    }
    assert modes == set(Mode) - {Mode.BFLOAT16}


@pytest.mark.parametrize("dtype", DTYPES)
def test_modes_of_all_kinds_stand_side_by_side(shim: ShimBackend, dtype: torch.dtype) -> None:
    """Every shape once as a block of one frame, each with another mode."""
    dims = [1, 2, 3, 31, 32, 33, 64, 128, 2048, 5, 4, 12]
    for rows in (1, 33):
        spans, count = flat_spans([[(rows, dim) for dim in dims], [(rows % 3, dim) for dim in dims]])
        blocks, totals = make_blocks(spans)
        request = [table % len(Request) for table in range(len(dims))]
        books = Books.of([BOOKS[0]] * len(dims), list(range(1, len(dims) + 1)))
        values = values_of(count, dtype, rows)
        frames = run_encode(reference, values, blocks, totals, bound=0.02, request=request, books=books)
        assert assert_same(Case(frames, blocks, totals, dtype, count), shim).status == 0


@pytest.mark.parametrize("request_", [Request.PACKED, Request.DEDUP, Request.ENTROPY])
def test_blocks_of_several_segments_and_strips(shim: ShimBackend, request_: Request) -> None:
    spans, count = flat_spans([[(1700, 20), (140, 64)]])
    case = encoded(spans, count, torch.float32, request_, seed=1, bound=0.5)
    assert assert_same(case, shim).status == 0


@pytest.mark.parametrize("request_", [Request.RAW, Request.PACKED, Request.DEDUP, Request.AUTO])
def test_frames_may_start_anywhere(shim: ShimBackend, request_: Request) -> None:
    case = small_case(torch.float16, request_, 1)
    expected = decoded(reference, case)
    for shift in (1, 2, 3):
        frames = [bytes([0xFF]) * shift + frame for frame in case.frames]
        starts, at = [], 0
        for frame in frames:
            starts.append(at + shift)
            at += len(frame) + -len(frame) % 16 + 16
        got = run_decode(
            shim, frames, case.blocks, case.totals, case.dtype, count=case.count, offsets=starts,
            sizes=[len(frame) for frame in case.frames],
        )  # fmt: skip
        assert got.status == 0
        assert np.array_equal(to_bits(got.values), to_bits(expected.values))


@pytest.mark.parametrize("tables", [0, 1])
def test_nothing_to_decode_still_tells_its_status(shim: ShimBackend, tables: int) -> None:
    blocks, totals = make_blocks([[(0, 0, 4, 4)] * tables] * 2)
    frames = run_encode(
        reference, torch.empty(0), blocks, totals, bound=[1.0] * tables, request=[Request.AUTO] * tables
    )
    case = Case(frames, blocks, totals, torch.float32, 0)
    assert assert_same(case, shim).status == 0
    got = assert_same(case.with_frame(1, b"X" + frames[1][1:]), shim)
    assert (got.peer, got.table, got.fault) == (1, 0, Fault.MAGIC)
    none = Case([], *make_blocks([]), torch.float32, 0)
    assert decoded(shim, none).status == 0


def test_a_codebook_is_kept_until_the_next(shim: ShimBackend) -> None:
    spans, count = flat_spans([[(300, 16)]])
    sent = torch.zeros(1, 1, dtype=torch.int32)
    first, second = (
        encoded(spans, count, torch.float32, Request.ENTROPY, seed=2, bound=bound, sent=sent)
        for bound in (0.5, 0.4)
    )
    assert (first.frames[0][25], second.frames[0][25]) == (1, 0)
    books = Books.none(1, 1)
    assert decoded(shim, second).fault == Fault.CODEBOOK_MISSING
    assert assert_same(first, shim, books).status == 0
    assert books.ids.item() == 5
    assert assert_same(second, shim, books).status == 0
    books.ids.fill_(6)
    assert assert_same(second, shim, books).fault == Fault.CODEBOOK_MISSING


def test_an_unused_distinct_row_is_found_whatever_scratch_holds() -> None:
    """Owners of an earlier call still lie in scratch, where this call should have written its own."""
    shim = ShimBackend(3, kept_scratch=True)
    values = torch.arange(4.0).repeat_interleave(8)[:, None].expand(32, 8).contiguous()
    blocks, totals = make_blocks([[(0, 32, 8, 8)]])
    frames = run_encode(reference, values, blocks, totals, bound=0.01, request=Request.DEDUP)
    case = Case(frames, blocks, totals, torch.float32, 256)
    assert assert_same(case, shim).status == 0
    # Two planes of indices follow the headers and the count; without the upper one, two rows are unused.
    damaged = bytearray(frames[0])
    damaged[24 + 24 + 4 + 4 : 24 + 24 + 4 + 8] = bytes(4)
    got = assert_same(case.with_frame(0, bytes(damaged)), shim)
    assert got.fault == Fault.DISTINCT
    assert bool(torch.isnan(got.values).all())


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (-1, None),
        (-(2**63), None),
        (2**63 - 1, None),
        (16, None),
        (0, -1),
        (0, -(2**63)),
        (0, 2**63 - 1),
        (0, 2**40),
        (0, 0),
        (0, 23),
        (8, 2**63 - 8),
        (2**63 - 16, None),
    ],
)
def test_offsets_and_sizes_are_not_trusted(shim: ShimBackend, offset: int, size: int | None) -> None:
    spans, count = flat_spans([[(40, 8), (3, 5)]])
    case = encoded(spans, count, torch.float32, Request.PACKED)
    for backend in (shim, reference):
        got = run_decode(
            backend, case.frames, case.blocks, case.totals, case.dtype,
            offsets=[offset], sizes=[len(case.frames[0]) if size is None else size],
        )  # fmt: skip
        assert got.status != 0
        assert bool(torch.isnan(got.values).all())


def damaged(dtype: torch.dtype, count: int, seed: int) -> Iterator[Case]:
    generator = np.random.default_rng(seed)
    for request in Request:
        case = small_case(dtype, request, seed % 2)
        for peer in (0, 2):
            for frame in mutations(case.frames[peer], generator, count):
                yield case.with_frame(peer, frame)


@pytest.mark.parametrize("dtype", DTYPES)
def test_damaged_frames_are_judged_like_by_the_reference(shim: ShimBackend, dtype: torch.dtype) -> None:
    faults = [assert_same(case, shim).fault for case in damaged(dtype, 8, DTYPES.index(dtype))]
    assert len(set(faults)) > 8
    assert 0.05 < np.mean([fault == 0 for fault in faults]) < 0.8


def test_a_fault_poisons_its_block_and_no_other(shim: ShimBackend) -> None:
    spans, count = flat_spans([[(40, 8), (40, 8), (40, 8)]])
    case = encoded(spans, count, torch.float32, Request.PACKED)
    frame = bytearray(case.frames[0])
    (size,) = np.frombuffer(frame[24 + 16 : 24 + 24], np.uint64)
    frame[24 * 4 + int(size)] ^= 1
    got = assert_same(case.with_frame(0, bytes(frame)), shim)
    assert (got.table, got.fault) == (1, Fault.DIRECTORY)
    nan = torch.isnan(got.values.view(3, 320))
    assert bool(nan[1].all())
    assert nan.sum() == 320 + torch.isnan(values_of(count, torch.float32, 0)).view(3, 320)[::2].sum()


def exact_job(case: Case, shift: int = 0) -> DecodeJob:
    """A job whose tensors end where they may no longer be read or written; the frames start at ``shift``."""
    totals = case.totals
    books = Books.none(totals.peers, totals.tables)
    sizes = torch.tensor([len(frame) for frame in case.frames])
    value_bytes = torch.empty(0, dtype=case.dtype).element_size()
    return DecodeJob(
        buffer=torch.frombuffer(bytearray(bytes(shift) + b"".join(case.frames)), dtype=torch.uint8).clone(),
        offsets=sizes.cumsum(0) - sizes + shift,
        sizes=sizes,
        blocks=case.blocks,
        totals=totals,
        book_lengths=books.lengths,
        book_ids=books.ids,
        out=from_bits(np.zeros(case.count, np.uint32 if value_bytes == 4 else np.uint16), case.dtype),
        status=torch.full((1,), -1),
        scratch=torch.full((cuda_scratch_bytes(totals, value_bytes),), 0xA5, dtype=torch.uint8),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_frame_leads_kernels_astray(dtype: torch.dtype, tmp_path: Path) -> None:
    """Good and damaged frames under the address and undefined-behaviour sanitizers."""
    recorder = Recorder(kernel_sources("decode"), 4)
    cases = [small_case(dtype, request, seed) for request in Request for seed in (0, 1)]
    cases += damaged(dtype, 2, 10 + DTYPES.index(dtype))
    jobs = []
    for case in cases:
        # One peer's frame alone, so that the buffer ends with it.
        for peer in (0, 2):
            tables = case.totals.tables
            blocks = case.blocks[peer * tables : (peer + 1) * tables + 1].clone()
            blocks[:, Column.FIRST_TILE :] -= blocks[0, Column.FIRST_TILE :].clone()
            tiles, strips, rows, values = blocks[-1, Column.FIRST_TILE :].tolist()
            totals = Totals(peers=1, tables=tables, tiles=tiles, strips=strips, rows=rows, values=values)
            alone = case._replace(frames=[case.frames[peer]], blocks=blocks, totals=totals)
            jobs.append((alone, exact_job(alone, shift=len(jobs) % 4)))
            cuda_decode(jobs[-1][1], recorder)
    recorder.run(tmp_path)
    rejected = 0
    for case, job in jobs:
        expected = exact_job(case)
        reference.decode(expected)
        assert (job.status != 0) == (expected.status != 0)
        same = to_bits(job.out) == to_bits(expected.out)
        both_nan = (torch.isnan(job.out) & torch.isnan(expected.out)).numpy()
        assert (same | (both_nan & may_differ(case))).all()
        rejected += int(job.status != 0)
    assert 10 < rejected < len(jobs) - 10


def test_a_stream_that_does_not_end_is_left_with_the_payload(tmp_path: Path) -> None:
    """All ones are the escape for own bits, of which a chunk's symbols would read far past the buffer."""
    spans, count = flat_spans([[(60, 16)]])
    blocks, totals = make_blocks(spans)
    values = torch.randn(count, generator=torch.Generator().manual_seed(8)) * 0.03
    books = Books.of([BOOKS[0]], [5])
    (frame,) = run_encode(reference, values, blocks, totals, bound=0.02, request=Request.ENTROPY, books=books)
    assert frame[24] == Mode.ENTROPY
    (size,) = np.frombuffer(frame[40:48], np.uint64)
    ones = bytearray(frame)
    ones[48 + int(size) - 60 : 48 + int(size)] = b"\xff" * 60
    case = Case([bytes(ones)], blocks, totals, torch.float32, count)
    job, recorder = exact_job(case), Recorder(kernel_sources("decode"), 5)
    cuda_decode(job, recorder)
    recorder.run(tmp_path)
    assert job.status.item() == Fault.STREAM
    assert bool(torch.isnan(job.out).all())
