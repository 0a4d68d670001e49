"""Frames to decode by the CUDA kernels in the shim, and the comparison with the reference."""

import random
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from codec_jobs import (
    Backend,
    Books,
    Decoded,
    column_spans,
    make_blocks,
    run_decode,
    run_encode,
    spans_of,
    to_bits,
)
from cuda_shim import ShimExecutor, kernel_sources

from tightrec.kernels import reference
from tightrec.kernels.cuda.decode import decode as cuda_decode
from tightrec.kernels.cuda.decode import decode_scratch_bytes as cuda_scratch_bytes
from tightrec.kernels.format import Fault, Mode
from tightrec.kernels.job import DecodeJob, EncodeJob, Stages, Totals

HALF_MODES = (Mode.FLOAT16, Mode.BFLOAT16)
BOOKS = (
    [1, 2, 3, 4] + [11] * 4 + [12] * 248,
    [1 if symbol == 0 else 2 if symbol >= 254 else 0 for symbol in range(256)],
    [8] * 256,
)


class ShimBackend:
    """The CUDA decoder on the CPU. Scratch holds noise at first, or what the last call left."""

    def __init__(self, seed: int = 0, kept_scratch: bool = False) -> None:
        self.executor = ShimExecutor(kernel_sources("decode"), seed)
        self.random = random.Random(seed)
        self.kept = torch.zeros(1 << 20, dtype=torch.uint8) if kept_scratch else None

    def decode(self, job: DecodeJob, /) -> None:
        size = job.scratch.numel()
        if self.kept is not None:
            job = replace(job, scratch=self.kept[:size])
        elif size:
            job.scratch.copy_(torch.frombuffer(bytearray(self.random.randbytes(size)), dtype=torch.uint8))
        cuda_decode(job, self.executor)

    def encode(self, job: EncodeJob, /) -> None:
        raise NotImplementedError

    def encode_scratch_bytes(self, totals: Totals, stages: Stages, value_bytes: int, /) -> int:
        raise NotImplementedError

    def decode_scratch_bytes(self, totals: Totals, value_bytes: int, /) -> int:
        return cuda_scratch_bytes(totals, value_bytes)


class Case(NamedTuple):
    """Frames of all peers and what a receiver must know to read them."""

    frames: list[bytes]
    blocks: torch.Tensor
    totals: Totals
    dtype: torch.dtype
    count: int

    def with_frame(self, peer: int, frame: bytes) -> "Case":
        return self._replace(frames=[*self.frames[:peer], frame, *self.frames[peer + 1 :]])

    def modes(self) -> set[int]:
        return {frame[24 + 24 * table] for frame in self.frames for table in range(self.totals.tables)}


def values_of(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Values of all sizes: most near zero, some runs the same, some outliers, NaN and Inf."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * 0.03
    values[count // 3 : count // 2] *= 40
    values[count // 2 :: 97] = 3e4
    values[count // 2 + 1 :: 389] = float("inf")
    if count > 7:
        values[7] = float("nan")
    return values.to(dtype)


def encoded(
    spans: list[list[tuple[int, int, int, int]]],
    count: int,
    dtype: torch.dtype,
    request: int,
    *,
    seed: int = 0,
    bound: float = 0.02,
    sent: torch.Tensor | None = None,
) -> Case:
    blocks, totals = make_blocks(spans)
    values = values_of(count, dtype, seed)
    for offset, rows, stride, dim in spans_of(blocks):
        if rows > 3 and seed % 2:
            rows_of = values.as_strided((rows, dim), (stride, 1), offset)
            rows_of[rows // 2 :] = rows_of[: rows - rows // 2].clone()
    books = Books.of([BOOKS[t % 3] for t in range(totals.tables)], [t + 5 for t in range(totals.tables)])
    frames = run_encode(
        reference, values, blocks, totals, bound=bound, request=request, books=books, sent=sent
    )
    return Case(frames, blocks, totals, dtype, count)


@lru_cache
def small_case(dtype: torch.dtype, request: int, seed: int) -> Case:
    spans, count = column_spans([37, 0, 90], [16, 1, 33])
    return encoded(spans, count, dtype, request, seed=seed)


def decoded(backend: Backend, case: Case, books: Books | None = None) -> Decoded:
    return run_decode(
        backend, case.frames, case.blocks, case.totals, case.dtype, count=case.count, books=books
    )


def may_differ(case: Case) -> np.ndarray:
    """Where NaNs may differ in their bits: in half blocks, which hold none when our encoders write them."""
    loose = np.zeros(case.count, dtype=bool)
    for number, (offset, rows, stride, dim) in enumerate(spans_of(case.blocks)):
        peer, table = divmod(number, case.totals.tables)
        frame = case.frames[peer]
        if len(frame) > 24 + 24 * table and frame[24 + 24 * table] in HALF_MODES:
            loose[offset + np.arange(rows)[:, None] * stride + np.arange(dim)] = True
    return loose


def assert_same(case: Case, backend: Backend, books: Books | None = None) -> Decoded:
    """The backend and the reference agree on the values' bits, the fault's place and the codebooks."""
    mine = books or Books.none(case.totals.peers, case.totals.tables)
    theirs = Books(mine.lengths.clone(), mine.ids.clone())
    expected, got = decoded(reference, case, theirs), decoded(backend, case, mine)
    same = to_bits(expected.values) == to_bits(got.values)
    both_nan = (torch.isnan(expected.values) & torch.isnan(got.values)).numpy()
    assert (same | (both_nan & may_differ(case))).all()
    assert (expected.status == 0) == (got.status == 0), (Fault(expected.fault), Fault(got.fault))
    assert torch.equal(mine.lengths, theirs.lengths)
    assert torch.equal(mine.ids, theirs.ids)
    return got
