"""1e5 damaged frames: the reference and the CPU backend never leave their buffers and agree on every bit."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from codec_jobs import flat_spans, make_blocks, run_decode
from fuzz_rounds import SHAPES, cases, fuzz, received_books

from tightrec.kernels import cpu, reference
from tightrec.kernels.format import Mode

FRAMES = 100_000


def fuzz_share(part: int, parts: int) -> tuple[int, list[str]]:
    """Every ``parts``-th case: (damaged frames decoded, cases of which no damage was noticed)."""
    torch.set_num_threads(1)
    found = cases(reference, 0)
    # The largest shape and long coded streams cost the reference most: they get a smaller share.
    coded = {Mode.ENTROPY, Mode.DEDUP_ENTROPY}
    slow = [case.shape == SHAPES[-1] or (case.frame[24] in coded and len(case.frame) > 200) for case in found]
    weights = np.where(slow, 0.2, 1.0)
    shares = np.ceil(FRAMES * weights / weights.sum()).astype(int)
    total, unnoticed = 0, []
    for number in range(part, len(found), parts):
        case = found[number]
        calls = list(fuzz(case, found[number - 1], int(shares[number]), number, (reference, cpu)))
        if not any(calls):
            unnoticed.append(f"{case.shape}, {case.dtype}")
        total += int(shares[number])
    return total, unnoticed


def test_1e5_damaged_frames_are_read_alike_by_both_backends() -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(fuzz_share, (0, 1), (2, 2)))
    assert sum(total for total, _ in results) >= FRAMES
    assert [case for _, unnoticed in results for case in unnoticed] == []


@pytest.mark.parametrize("backend", [reference, cpu])
def test_every_truncation_of_a_frame_is_refused(backend: object) -> None:
    for case in cases(reference, 1):
        if len(case.frame) > 800:
            continue
        lengths = range(len(case.frame))
        spans, size = flat_spans([case.shape])
        blocks, totals = make_blocks(spans)
        for length in lengths:
            cut = run_decode(
                backend,
                [case.frame[:length]],
                blocks,
                totals,
                case.dtype,
                books=received_books(1, case),
                count=size,
            )
            assert cut.status and bool(cut.values.isnan().all()), length


@pytest.mark.parametrize("backend", [reference, cpu])
@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (-16, None),
        (2**62, None),
        (0, -1),
        (0, 2**62),
        (2**63 - 1, 2**63 - 1),
        (-(2**63), 64),
        (16, None),
        (0, 0),
    ],
)
def test_frames_said_to_lie_outside_the_buffer_are_refused(
    backend: object, offset: int, size: int | None
) -> None:
    case = cases(reference, 2)[2]
    spans, count = flat_spans([case.shape])
    blocks, totals = make_blocks(spans)
    size = len(case.frame) if size is None else size
    decoded = run_decode(
        backend,
        [case.frame],
        blocks,
        totals,
        case.dtype,
        books=received_books(1, case),
        offsets=[offset],
        sizes=[size],
        count=count,
    )
    assert decoded.status and bool(decoded.values.isnan().all())


def test_an_undamaged_frame_is_read() -> None:
    for case in cases(reference, 3):
        spans, count = flat_spans([case.shape])
        blocks, totals = make_blocks(spans)
        books = received_books(1, case)
        decoded = run_decode(cpu, [case.frame], blocks, totals, case.dtype, books=books, count=count)
        assert decoded.status == 0
        assert torch.isfinite(decoded.values).any()
