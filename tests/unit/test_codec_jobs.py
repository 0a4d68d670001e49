"""The job helper catches a backend that writes where it must not."""

from collections.abc import Callable
from types import SimpleNamespace

import codec_jobs
import pytest
import torch
from codec_jobs import GUARD_BYTES

from tightrec.kernels.format import Request
from tightrec.kernels.job import DecodeJob, EncodeJob


def beyond(inner: torch.Tensor, at: int) -> None:
    """Write a byte of the storage behind a uint8 view, ``at`` bytes from the view's start."""
    whole = torch.empty(0, dtype=torch.uint8).set_(inner.untyped_storage())
    whole[GUARD_BYTES + at] = 1


def backend(encode: Callable[[EncodeJob], None], decode: Callable[[DecodeJob], None]) -> SimpleNamespace:
    return SimpleNamespace(
        encode=encode,
        decode=decode,
        encode_scratch_bytes=lambda totals, stages, value_bytes: 40,
        decode_scratch_bytes=lambda totals, value_bytes: 40,
    )


def honest_encode(job: EncodeJob) -> None:
    job.offsets.copy_(torch.tensor([0, 48]))
    job.sizes.copy_(torch.tensor([48, 64]))


def honest_decode(job: DecodeJob) -> None:
    job.out[: job.totals.values] = 1.0
    job.status.zero_()


SPANS, COUNT = codec_jobs.flat_spans([[(2, 3)], [(4, 3)]])
BLOCKS, TOTALS = codec_jobs.make_blocks(SPANS)


def encode(broken: Callable[[EncodeJob], None]) -> list[bytes]:
    fake = backend(broken, honest_decode)
    return codec_jobs.run_encode(fake, torch.ones(COUNT), BLOCKS, TOTALS, bound=1.0, request=Request.RAW)


def decode(broken: Callable[[DecodeJob], None]) -> codec_jobs.Decoded:
    fake, frames = backend(honest_encode, broken), [bytes(32), bytes(48)]
    return codec_jobs.run_decode(fake, frames, BLOCKS, TOTALS, torch.float32, count=COUNT + 2)


def test_honest_backends_pass() -> None:
    assert [len(frame) for frame in encode(honest_encode)] == [48, 64]
    decoded = decode(honest_decode)
    assert decoded.status == 0
    assert (decoded.values[:COUNT] == 1).all()


@pytest.mark.parametrize("name", ["out", "scratch"])
@pytest.mark.parametrize("before", [True, False])
def test_writes_around_out_and_scratch_are_caught(name: str, before: bool) -> None:
    def broken_encode(job: EncodeJob) -> None:
        honest_encode(job)
        inner = getattr(job, name)
        beyond(inner, -1 if before else inner.numel())

    def broken_decode(job: DecodeJob) -> None:
        honest_decode(job)
        inner = getattr(job, name)
        beyond(inner, -1 if before else inner.numel() * inner.element_size())

    message = f"bytes {'before' if before else 'after'} {name} were written"
    with pytest.raises(AssertionError, match=message):
        encode(broken_encode)
    with pytest.raises(AssertionError, match=message):
        decode(broken_decode)


def test_writes_outside_the_blocks_are_caught() -> None:
    def broken(job: DecodeJob) -> None:
        honest_decode(job)
        job.out[COUNT] = 0.0

    with pytest.raises(AssertionError, match="outside the blocks"):
        decode(broken)


def test_frames_must_lie_back_to_back() -> None:
    def broken(job: EncodeJob) -> None:
        honest_encode(job)
        job.offsets[1] += 16

    with pytest.raises(AssertionError):
        encode(broken)


def test_changed_values_are_caught() -> None:
    def broken(job: EncodeJob) -> None:
        honest_encode(job)
        job.values[3] = -0.0

    with pytest.raises(AssertionError, match="values were changed"):
        encode(broken)


def test_layouts() -> None:
    spans, count = codec_jobs.column_spans([2, 0, 3], [4, 8])
    assert count == 60
    assert spans == [
        [(0, 2, 12, 4), (4, 2, 12, 8)],
        [(24, 0, 12, 4), (28, 0, 12, 8)],
        [(24, 3, 12, 4), (28, 3, 12, 8)],
    ]
    blocks, totals = codec_jobs.make_blocks(spans)
    assert codec_jobs.spans_of(blocks) == [span for peer in spans for span in peer]
    assert blocks[-1].tolist() == [0, 0, 0, 0, 4, 4, 10, 60]
    assert (totals.tiles, totals.strips, totals.rows, totals.values) == (4, 4, 10, 60)
    assert codec_jobs.max_frame_bytes(blocks, totals, 2) == 128 + 80 + 144
