"""The codec as torch.library operators: every schema and its shape-only fake.

``tightrec::encode_`` and ``tightrec::decode_`` write into what they are given: no allocation and no host
synchronisation. ``tightrec::encode`` and ``tightrec::decode`` return new tensors, without codebooks.
Shapes: P peers, T tables, see ``job``. ``totals`` are the fields of ``job.Totals`` in order, ``stages`` has a
bit for each field of ``job.Stages``, ``backend`` is a name of ``backends.NAMES`` or "" for the device's own.
Arguments are taken as they are: ``tightrec.compression.codec`` checks them; who calls directly must do so.
"""

from dataclasses import fields

import torch
from torch import Tensor

from tightrec.kernels.backends import backend as find
from tightrec.kernels.format import (
    BLOCK_HEADER_BYTES,
    DTYPES,
    FRAME_ALIGNMENT,
    FRAME_HEADER_BYTES,
    SYMBOLS,
)
from tightrec.kernels.job import DecodeJob, EncodeJob, Stages, Totals

_LIBRARY = torch.library.Library("tightrec", "FRAGMENT")
_LIBRARY.define(
    "encode_(Tensor values, Tensor blocks, int[] totals, int stages, Tensor bound, Tensor bound_kind, "
    "Tensor request, Tensor book_lengths, Tensor book_ids, Tensor(a!) book_sent, Tensor(b!)? histogram, "
    "Tensor(c!) out, Tensor(d!) offsets, Tensor(e!) sizes, Tensor(f!) scratch, str backend='') -> ()"
)
_LIBRARY.define(
    "decode_(Tensor buffer, Tensor offsets, Tensor sizes, Tensor blocks, int[] totals, "
    "Tensor(a!) book_lengths, Tensor(b!) book_ids, Tensor(c!) out, Tensor(d!) status, Tensor(e!) scratch, "
    "str backend='') -> ()"
)
_LIBRARY.define(
    "encode(Tensor values, Tensor blocks, int[] totals, int stages, Tensor bound, Tensor bound_kind, "
    "Tensor request, str backend='') -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "decode(Tensor buffer, Tensor offsets, Tensor sizes, Tensor blocks, int[] totals, SymInt[] shape, "
    "ScalarType dtype, str backend='') -> (Tensor, Tensor)"
)


def _stages(bits: int) -> Stages:
    return Stages(**{field.name: bool(bits >> place & 1) for place, field in enumerate(fields(Stages))})


def _totals(totals: list[int]) -> Totals:
    return Totals(**dict(zip((field.name for field in fields(Totals)), totals, strict=True)))


def frame_capacity(totals: Totals, value_bytes: int) -> int:
    """Bytes that frames with these totals never exceed, from the totals alone."""
    payload = totals.values * value_bytes + 3 * totals.peers * totals.tables
    headers = totals.peers * (FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * totals.tables + FRAME_ALIGNMENT)
    return -(-(payload + headers) // FRAME_ALIGNMENT) * FRAME_ALIGNMENT


def _encode_(
    values: Tensor,
    blocks: Tensor,
    totals: list[int],
    stages: int,
    bound: Tensor,
    bound_kind: Tensor,
    request: Tensor,
    book_lengths: Tensor,
    book_ids: Tensor,
    book_sent: Tensor,
    histogram: Tensor | None,
    out: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    scratch: Tensor,
    backend: str = "",
) -> None:
    job = EncodeJob(
        values=values,
        blocks=blocks,
        totals=_totals(totals),
        stages=_stages(stages),
        bound=bound,
        bound_kind=bound_kind,
        request=request,
        book_lengths=book_lengths,
        book_ids=book_ids,
        book_sent=book_sent,
        histogram=histogram,
        out=out,
        offsets=offsets,
        sizes=sizes,
        scratch=scratch,
    )
    find(backend, values.device).encode(job)


def _decode_(
    buffer: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    blocks: Tensor,
    totals: list[int],
    book_lengths: Tensor,
    book_ids: Tensor,
    out: Tensor,
    status: Tensor,
    scratch: Tensor,
    backend: str = "",
) -> None:
    job = DecodeJob(
        buffer=buffer,
        offsets=offsets,
        sizes=sizes,
        blocks=blocks,
        totals=_totals(totals),
        book_lengths=book_lengths,
        book_ids=book_ids,
        out=out,
        status=status,
        scratch=scratch,
    )
    find(backend, out.device).decode(job)


def _encode(
    values: Tensor,
    blocks: Tensor,
    totals: list[int],
    stages: int,
    bound: Tensor,
    bound_kind: Tensor,
    request: Tensor,
    backend: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    known = _totals(totals)
    device = values.device
    scratch_bytes = find(backend, device).encode_scratch_bytes(known, _stages(stages), values.element_size())
    # Zeros, as an operator's outputs may not depend on what the memory held.
    out = torch.zeros(frame_capacity(known, values.element_size()), dtype=torch.uint8, device=device)
    offsets = torch.zeros(known.peers, dtype=torch.int64, device=device)
    sizes = torch.zeros_like(offsets)
    ids = torch.zeros(known.tables, dtype=torch.int32, device=device)
    lengths = torch.zeros(known.tables, SYMBOLS, dtype=torch.uint8, device=device)
    sent = torch.zeros(known.peers, known.tables, dtype=torch.int32, device=device)
    scratch = _bytes(scratch_bytes, device)
    settings = (bound, bound_kind, request, lengths, ids, sent, None)
    _encode_(values, blocks, totals, stages, *settings, out, offsets, sizes, scratch, backend)
    return out, offsets, sizes


def _decode(
    buffer: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    blocks: Tensor,
    totals: list[int],
    shape: list[int],
    dtype: torch.dtype,
    backend: str = "",
) -> tuple[Tensor, Tensor]:
    known = _totals(totals)
    device = buffer.device
    out = torch.zeros(shape, dtype=dtype, device=device)
    status = torch.zeros(1, dtype=torch.int64, device=device)
    ids = torch.zeros(known.peers, known.tables, dtype=torch.int32, device=device)
    lengths = torch.zeros(known.peers, known.tables, SYMBOLS, dtype=torch.uint8, device=device)
    scratch = _bytes(find(backend, device).decode_scratch_bytes(known, out.element_size()), device)
    _decode_(buffer, offsets, sizes, blocks, totals, lengths, ids, out, status, scratch, backend)
    return out, status


def _bytes(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device)


for _name, _run in {"encode_": _encode_, "decode_": _decode_, "encode": _encode, "decode": _decode}.items():
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _run, _key)


@torch.library.register_fake("tightrec::encode_", lib=_LIBRARY)
def _(*arguments: object, **named: object) -> None:
    return None


@torch.library.register_fake("tightrec::decode_", lib=_LIBRARY)
def _(*arguments: object, **named: object) -> None:
    return None


@torch.library.register_fake("tightrec::encode", lib=_LIBRARY)
def _(
    values: Tensor, blocks: Tensor, totals: list[int], *rest: object, **named: object
) -> tuple[Tensor, Tensor, Tensor]:
    known = _totals(totals)
    assert values.dtype in DTYPES
    out = values.new_empty(frame_capacity(known, values.element_size()), dtype=torch.uint8)
    return (
        out,
        values.new_empty(known.peers, dtype=torch.int64),
        values.new_empty(known.peers, dtype=torch.int64),
    )


@torch.library.register_fake("tightrec::decode", lib=_LIBRARY)
def _(
    buffer: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    blocks: Tensor,
    totals: list[int],
    shape: list[int],
    dtype: torch.dtype,
    backend: str = "",
) -> tuple[Tensor, Tensor]:
    return buffer.new_empty(shape, dtype=dtype), buffer.new_empty(1, dtype=torch.int64)
