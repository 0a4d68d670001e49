"""The CPU backend: the reference's bytes and verdicts, whatever the threads, layout and place of a frame."""

import multiprocessing
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from codec_jobs import (
    Books,
    Decoded,
    Span,
    column_spans,
    flat_spans,
    gather,
    make_blocks,
    run_decode,
    run_encode,
    spans_of,
    to_bits,
)

from tightrec.kernels import cpu, reference
from tightrec.kernels.cpu import pool
from tightrec.kernels.format import BLOCK_HEADER_BYTES, FRAME_HEADER_BYTES, Fault, Mode, Request
from tightrec.kernels.job import DecodeJob, EncodeJob, Totals

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIMS = (1, 2, 3, 31, 32, 33, 64, 128, 2048)
ROWS = (0, 1, 31, 32, 33, 511, 2049)
LARGEST = 34_000
"""Values in a block: a little more than a segment of 32,768, and five strips of 8,192."""
STEEP = [*range(1, 12), *[0] * 243, 12, 12]
FLAT = [*[3] * 7, *[0] * 247, 4, 4]
"""Code lengths: both codes are complete, and most codes of the test's values have no code word."""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Two threads while a test runs, whatever it sets."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make_values(spans: list[list[Span]], count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of which some repeat (exactly, or only after they are decoded), with outliers, NaN and Inf."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(count).astype(np.float32)
    values[rng.random(count) < 0.01] *= np.float32(1e6)
    for block, (offset, rows, stride, dim) in enumerate(span for peer in spans for span in peer):
        if rows == 0:
            continue
        place = offset + np.arange(rows)[:, None] * stride + np.arange(dim)
        if block % 3 == 0:
            values[place] = values[place][rng.integers(0, 1 + rows // 4, rows)]
            values[place] += rng.choice(np.float32([0, 0, 1e-6]), (rows, 1))
        elif block % 3 == 2:  # about half exceptions: raw groups
            values[place] *= rng.choice(np.float32([1, 1e9]), place.shape)
        else:
            special = np.float32([np.nan, np.inf, -np.inf, -0.0, 1e-40, 3e38])
            values[place[rng.integers(rows), rng.integers(dim)]] = rng.choice(special)
    return torch.from_numpy(values).to(dtype)


def encode(
    backend, values: torch.Tensor, blocks: torch.Tensor, totals: Totals, shift: int
) -> tuple[list[bytes], torch.Tensor, torch.Tensor]:
    """Frames, books sent and histogram, with requests and bounds of all kinds among the tables."""
    tables = range(totals.tables)
    sent = torch.tensor([[(table + peer) % 2 for table in tables] for peer in range(totals.peers)])
    sent = sent.to(torch.int32).view(totals.peers, totals.tables)
    histogram = torch.zeros(totals.tables, 256, dtype=torch.int64)
    frames = run_encode(
        backend,
        values,
        blocks,
        totals,
        bound=[(0.3, 0.01, 0.002)[(table + shift) % 3] for table in tables],
        request=[(table + shift) % len(Request) for table in tables],
        kind=[(table // 2 + shift) % 3 for table in tables],
        books=Books.of([(STEEP, FLAT)[table % 2] for table in tables], [1 - (t % 5 == 4) for t in tables]),
        sent=sent,
        histogram=histogram,
    )
    return frames, sent, histogram


def received_books(totals: Totals) -> Books:
    """What a receiver holds that got every table's book before."""
    lengths = torch.tensor([(STEEP, FLAT)[table % 2] for table in range(totals.tables)], dtype=torch.uint8)
    shape = (totals.peers, totals.tables)
    return Books(lengths.expand(totals.peers, -1, -1).clone(), torch.ones(shape, dtype=torch.int32))


def make_job(layout: str, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor, Totals]:
    """Values, block table and totals of a job with all of DIMS as tables and all of ROWS among its blocks."""
    if layout == "columns":
        spans, count = column_spans((33, 0), DIMS)
    else:
        shapes = [[(ROWS[(p + t + seed) % len(ROWS)], dim) for t, dim in enumerate(DIMS)] for p in range(2)]
        spans, count = flat_spans(
            [[(min(rows, LARGEST // dim), dim) for rows, dim in peer] for peer in shapes]
        )
    blocks, totals = make_blocks(spans)
    return make_values(spans, count, dtype, seed), blocks, totals


def assert_same(one: Decoded, other: Decoded) -> None:
    """Both decodes left the same bits (a NaN for a NaN), verdict and books."""
    assert (one.status == 0) == (other.status == 0), (hex(one.status), hex(other.status))
    assert one.status >> 8 == other.status >> 8
    both_nan = (one.values.isnan() & other.values.isnan()).numpy()
    assert ((to_bits(one.values) == to_bits(other.values)) | both_nan).all()
    assert torch.equal(one.books.ids, other.books.ids)
    assert torch.equal(one.books.lengths, other.books.lengths)


def both_decode(
    frames: list[bytes], values: torch.Tensor, blocks: torch.Tensor, totals: Totals, **places
) -> Decoded:
    """What the CPU backend decodes, after a comparison with the reference."""
    decoded = [
        run_decode(
            backend,
            frames,
            blocks,
            totals,
            values.dtype,
            count=values.numel(),
            books=received_books(totals),
            **places,
        )
        for backend in (cpu, reference)
    ]
    assert_same(*decoded)
    return decoded[0]


@pytest.mark.parametrize(
    ("dtype", "shift"),
    [*((torch.float32, s) for s in range(6)), *((t, s) for t in DTYPES[1:] for s in (0, 2, 5))],
)
def test_frames_are_the_references_and_decode_to_the_same_bits(dtype: torch.dtype, shift: int) -> None:
    values, blocks, totals = make_job("columns" if shift == 2 else "flat", dtype, seed=shift)
    frames, sent, histogram = encode(cpu, values, blocks, totals, shift)
    expected, expected_sent, expected_histogram = encode(reference, values, blocks, totals, shift)
    assert frames == expected
    assert torch.equal(sent, expected_sent)
    assert torch.equal(histogram, expected_histogram)
    assert both_decode(frames, values, blocks, totals).status == 0


def test_every_mode_occurs_in_these_jobs() -> None:
    modes = set()
    for shift in range(6):
        values, blocks, totals = make_job("flat", torch.float32, seed=shift)
        for frame in encode(cpu, values, blocks, totals, shift)[0]:
            headers = frame[FRAME_HEADER_BYTES:][: BLOCK_HEADER_BYTES * totals.tables]
            modes.update(headers[::BLOCK_HEADER_BYTES])
    assert modes >= {0, 1, 3, 4, 5, 6}


def test_a_due_codebook_does_not_count_against_float16() -> None:
    spans, _ = flat_spans([[(2, 32)]])
    blocks, totals = make_blocks(spans)
    values = torch.zeros(64)
    values[3] = values[40] = 250.0  # escaped: coded 28 bytes, with the book 156, packed 84, float16 128
    books = Books.of([STEEP], [1])
    frames = [
        run_encode(backend, values, blocks, totals, bound=0.25, request=Request.AUTO, books=books)
        for backend in (cpu, reference)
    ]
    assert frames[0] == frames[1]
    assert frames[0][0][FRAME_HEADER_BYTES] == Mode.ENTROPY


@pytest.mark.parametrize("bound", [0.0, 1e-40, float("nan"), float("inf"), 3e38, -1.0])
def test_bounds_out_of_range_are_the_references(bound: float) -> None:
    spans, count = flat_spans([[(31, 33)] * 3])
    blocks, totals = make_blocks(spans)
    values = make_values(spans, count, torch.float32, seed=0)
    frames = [
        run_encode(backend, values, blocks, totals, bound=bound, request=Request.PACKED, kind=[0, 1, 2])
        for backend in (cpu, reference)
    ]
    assert frames[0] == frames[1]


@pytest.mark.parametrize("request_", [r for r in Request if r != Request.HALF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_keeps_its_blocks_bound(dtype: torch.dtype, request_: Request) -> None:
    spans, count = flat_spans([[(511, 33), (33, 128)]])
    blocks, totals = make_blocks(spans)
    values = make_values(spans, count, dtype, seed=3)
    bounds = (0.05, 0.0013)
    books = Books.of([STEEP, FLAT], [1, 1])
    frames = run_encode(cpu, values, blocks, totals, bound=bounds, request=request_, books=books)
    decoded = run_decode(cpu, frames, blocks, totals, dtype, count=count)
    assert decoded.status == 0
    sent, got = values.to(torch.float64).numpy(), decoded.values.to(torch.float64).numpy()
    for span, bound in zip(spans_of(blocks), bounds, strict=True):
        x, y = gather(sent, span), gather(got, span)
        finite = np.isfinite(x)
        assert (np.abs(x[finite] - y[finite]) <= np.float32(bound)).all()
        assert np.array_equal(x[~finite], y[~finite], equal_nan=True)


def damaged(frames: list[bytes], tables: int, rng: np.random.Generator) -> list[bytes]:
    """Frames of which one has a few bytes changed, mostly in directories and headers of payloads."""
    peer = int(rng.integers(len(frames)))
    frame = bytearray(frames[peer])
    start = FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * tables
    for _ in range(rng.integers(1, 3)):
        stop = (start, min(start + 64, len(frame)), len(frame))[rng.integers(3)]
        at = int(rng.integers(0 if stop == start else start, stop)) if start < len(frame) else 0
        frame[at] = rng.choice([0, 1, 255, frame[at] ^ 1 << rng.integers(8)])
    return [*frames[:peer], bytes(frame), *frames[peer + 1 :]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_damaged_frames_get_the_references_verdict(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    rejected = 0
    for trial in range(90):
        shapes = [[(int(rng.choice([0, 1, 31, 33, 70])), dim) for dim in (1, 3, 33)] for _ in range(2)]
        spans, count = flat_spans(shapes)
        blocks, totals = make_blocks(spans)
        values = make_values(spans, count, dtype, seed=trial)
        frames, _, _ = encode(cpu, values, blocks, totals, shift=trial % 6)
        frames = damaged(frames, totals.tables, rng)
        rejected += both_decode(frames, values, blocks, totals).status != 0
    assert 15 < rejected < 90


@pytest.mark.parametrize("mode", Mode)
def test_words_behind_the_last_ones_are_rejected(mode: Mode) -> None:
    wanted = {Mode.FLOAT16: Request.HALF, Mode.BFLOAT16: Request.HALF, Mode.DEDUP_ENTROPY: Request.ENTROPY}
    request = wanted.get(mode) or Request[mode.name]
    spans, _ = flat_spans([[(1200, 33)]])
    blocks, totals = make_blocks(spans)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1200, 33)).astype(np.float32) * (1e9 if mode == Mode.BFLOAT16 else 1)
    if mode in (Mode.DEDUP, Mode.DEDUP_ENTROPY):
        rows = rows[rng.integers(0, 600, 1200)]
    values = torch.from_numpy(rows).flatten()
    bound = 1e7 if mode == Mode.BFLOAT16 else 0.3
    books = Books.of([STEEP], [1])
    frames = run_encode(cpu, values, blocks, totals, bound=bound, request=request, books=books)
    assert frames[0][FRAME_HEADER_BYTES] == mode
    assert both_decode(frames, values, blocks, totals).status == 0
    used = FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES
    size = int.from_bytes(frames[0][used - 8 : used], "little")
    frame = bytearray(frames[0][: used + size] + bytes(4))
    frame[used - 8 : used] = (size + 4).to_bytes(8, "little")
    frame += bytes(-len(frame) % 16)
    frame[FRAME_HEADER_BYTES - 8 : FRAME_HEADER_BYTES] = len(frame).to_bytes(8, "little")
    assert both_decode([bytes(frame)], values, blocks, totals).status != 0


RIGHT = 1
"""Stands for the frame's own size."""


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        *((o, s) for o in (0, -1, 5, 2**62, 2**63 - 1) for s in (0, 16, 24, -16, 2**62, -(2**63))),
        *((o, RIGHT) for o in (-1, -16, 2**20, 2**62, 2**63 - 1, -(2**63))),
    ],
)
def test_places_outside_the_buffer_are_rejected(offset: int, size: int) -> None:
    spans, count = flat_spans([[(33, 31), (70, 64)]] * 3)
    blocks, totals = make_blocks(spans)
    values = make_values(spans, count, torch.float32, seed=1)
    frames, _, _ = encode(cpu, values, blocks, totals, 0)
    sizes, offsets = [len(frame) for frame in frames], [0, 0, 0]
    offsets[1], offsets[2] = len(frames[0]) + 16, len(frames[0]) + len(frames[1]) + 32
    offsets[0], sizes[0] = offset, sizes[0] if size == RIGHT else size
    decoded = both_decode(frames, values, blocks, totals, offsets=offsets, sizes=sizes)
    assert (decoded.peer, decoded.fault) == (0, Fault.TRUNCATED)
    mine = spans_of(blocks)[: totals.tables]
    for span in mine:
        assert np.isnan(gather(decoded.values.numpy(), span)).all()


@pytest.mark.parametrize("shift", [1, 2, 3, 15])
def test_a_frame_may_start_at_any_byte(shift: int) -> None:
    spans, count = flat_spans([[(33, 31), (70, 64), (511, 3)]])
    blocks, totals = make_blocks(spans)
    values = make_values(spans, count, torch.float32, seed=1)
    frames, _, _ = encode(cpu, values, blocks, totals, shift=2)
    frame = [bytes(shift) + frames[0]]
    decoded = both_decode(frame, values, blocks, totals, offsets=[shift], sizes=[len(frames[0])])
    assert decoded.status == 0


def roundtrip(dtype: torch.dtype = torch.float32) -> tuple[list[bytes], np.ndarray]:
    """Frames of a job with every request, and the bits that they decode to."""
    values, blocks, totals = make_job("flat", dtype, seed=4)
    frames, _, _ = encode(cpu, values, blocks, totals, shift=4)
    decoded = run_decode(
        cpu, frames, blocks, totals, dtype, count=values.numel(), books=received_books(totals)
    )
    assert decoded.status == 0
    return frames, to_bits(decoded.values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    frames, bits = roundtrip(dtype)
    for count in (2, 5):
        torch.set_num_threads(count)
        again, same = roundtrip(dtype)
        assert again == frames
        assert np.array_equal(same, bits)


class Recorder:
    """The CPU backend, that keeps the last jobs: in a forked child torch's own loops may hang."""

    encode_scratch_bytes = staticmethod(cpu.encode_scratch_bytes)
    decode_scratch_bytes = staticmethod(cpu.decode_scratch_bytes)

    def encode(self, job: EncodeJob) -> None:
        self.encoded = job
        cpu.encode(job)

    def decode(self, job: DecodeJob) -> None:
        self.decoded = job
        cpu.decode(job)

    def again(self) -> tuple[bytes, bytes]:
        """The bytes of the frames and of the values, from running both jobs once more."""
        out, values = self.encoded.out.numpy(), to_bits(self.decoded.out)
        out[:] = 0
        cpu.encode(self.encoded)
        cpu.decode(self.decoded)
        return out.tobytes(), values.tobytes()


def test_a_fork_after_use_works() -> None:
    values, blocks, totals = make_job("flat", torch.float32, seed=4)
    recorder = Recorder()
    frames, _, _ = encode(recorder, values, blocks, totals, shift=4)
    run_decode(
        recorder, frames, blocks, totals, values.dtype, count=values.numel(), books=received_books(totals)
    )
    expected = recorder.again()
    assert any(expected[0])

    def child(answer) -> None:
        answer.send(recorder.again() == expected)

    context = multiprocessing.get_context("fork")
    answer, other = context.Pipe()
    process = context.Process(target=child, args=(other,), daemon=True)
    with pool._lock:  # a fork copies the lock as it is, held where another thread was at work
        process.start()
    try:
        assert answer.poll(60), "the child does not answer"
        assert answer.recv() is True
    finally:
        process.kill()
        process.join()


def test_calls_from_two_threads_at_once_are_right() -> None:
    expected, bits = roundtrip()
    wrong = []

    def work() -> None:
        for _ in range(3):
            frames, same = roundtrip()
            if frames != expected or not np.array_equal(same, bits):
                wrong.append(1)

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_too_little_scratch_is_refused() -> None:
    values, blocks, totals = make_job("flat", torch.float32, seed=0)
    recorder = Recorder()
    frames, _, _ = encode(recorder, values, blocks, totals, shift=0)
    run_decode(
        recorder, frames, blocks, totals, values.dtype, count=values.numel(), books=received_books(totals)
    )
    for run, job in ((cpu.encode, recorder.encoded), (cpu.decode, recorder.decoded)):
        with pytest.raises(ValueError, match="scratch has"):
            run(replace(job, scratch=job.scratch[:-1]))
