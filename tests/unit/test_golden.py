"""Frames that are kept for good: each decoder reads the good ones alike and rejects the bad ones, and the
encoders write again, bit by bit, those that have an input."""

import functools
import json
from pathlib import Path
from typing import Any

import codec_jobs
import independent_decoder as independent
import numpy as np
import pytest
import torch
from codec_jobs import Books

from tightrec.kernels import cpu, reference
from tightrec.kernels.format import Fault

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NAN = {"float32": 0x7FC00000, "float16": 0x7E00, "bfloat16": 0x7FC0}
BACKENDS = [reference, cpu]
ASKED = [case for case in INDEX["good"] if "asked" in case]

over_backends = pytest.mark.parametrize("backend", BACKENDS, ids=lambda m: m.__name__.rsplit(".", 1)[-1])


def over(cases: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


@functools.cache
def frame_of(name: str) -> bytes:
    (path,) = GOLDEN.glob(f"*/{name}.hex")
    return bytes.fromhex(path.read_text())


def bits_of(text: str, dtype: str) -> np.ndarray:
    """Values from the index: hex bits, ``hex*count`` for repeated ones."""
    bits: list[int] = []
    for part in text.split():
        value, _, count = part.partition("*")
        bits += [int(value, 16)] * int(count or 1)
    return np.array(bits, np.uint32 if dtype == "float32" else np.uint16)


def shapes_of(case: dict[str, Any]) -> list[tuple[int, int]]:
    return [(rows, dim) for rows, dim in case["shapes"]]


def decode(backend: Any, case: dict[str, Any], frame: bytes, books: Books) -> tuple[np.ndarray, int]:
    (spans,), count = codec_jobs.flat_spans([shapes_of(case)])
    blocks, totals = codec_jobs.make_blocks([spans])
    dtype = TORCH[case["dtype"]]
    decoded = codec_jobs.run_decode(backend, [frame], blocks, totals, dtype, count=count, books=books)
    return codec_jobs.to_bits(decoded.values), decoded.status


def decode_after(backend: Any, case: dict[str, Any]) -> tuple[np.ndarray, int]:
    """Decode the frames before a case, then the case."""
    books = Books.none(1, len(case["shapes"]))
    for name in case.get("after", ()):
        (earlier,) = (other for other in INDEX["good"] if other["name"] == name)
        assert decode(backend, earlier, frame_of(name), books)[1] == 0
    return decode(backend, case, frame_of(case["name"]), books)


def decode_independently(case: dict[str, Any]) -> list[int]:
    books: independent.Books = {}
    for name in case.get("after", ()):
        (earlier,) = (other for other in INDEX["good"] if other["name"] == name)
        independent.decode_frame(frame_of(name), shapes_of(earlier), case["dtype"], books)
    arrays = independent.decode_frame(frame_of(case["name"]), shapes_of(case), case["dtype"], books)
    return [x for array in arrays for x in array.reshape(-1).tolist()]


def test_the_index_and_the_files_belong_together() -> None:
    for folder in ("good", "bad"):
        names = [case["name"] for case in INDEX[folder]]
        assert len(set(names)) == len(names)
        assert sorted(names) == sorted(path.stem for path in (GOLDEN / folder).iterdir())
    assert {case["fault"] for case in INDEX["bad"]} == {fault.name for fault in Fault} - {"NONE"}
    modes = {frame_of(case["name"])[24] for case in INDEX["good"]}
    assert modes == set(range(7))


@over(INDEX["good"])
def test_the_independent_decoder_reads_good_frames(case: dict[str, Any]) -> None:
    assert decode_independently(case) == bits_of(case["values"], case["dtype"]).tolist()


@over(INDEX["bad"])
def test_the_independent_decoder_names_what_is_wrong(case: dict[str, Any]) -> None:
    with pytest.raises(independent.Rejected) as rejected:
        decode_independently(case)
    assert rejected.value.fault == case["fault"]


@over_backends
@over(INDEX["good"])
def test_backends_read_good_frames(backend: Any, case: dict[str, Any]) -> None:
    bits, status = decode_after(backend, case)
    assert status == 0
    assert np.array_equal(bits, bits_of(case["values"], case["dtype"]))


@over_backends
@over([case for case in INDEX["bad"] if case["name"] != "checksum_wrong"])
def test_backends_reject_bad_frames(backend: Any, case: dict[str, Any]) -> None:
    """A wrong checksum is left out: backends need not compare it."""
    bits, status = decode_after(backend, case)
    assert status != 0, f"accepted; the rule broken is {case['fault']}"
    assert status >> 8 == 0
    assert (bits == NAN[case["dtype"]]).all()


@over_backends
@over(ASKED)
def test_backends_write_the_same_frame_again(backend: Any, case: dict[str, Any]) -> None:
    asked, dtype = case["asked"], TORCH[case["dtype"]]
    (spans,), _ = codec_jobs.flat_spans([shapes_of(case)])
    blocks, totals = codec_jobs.make_blocks([spans])
    values = codec_jobs.from_bits(bits_of(asked["input"], case["dtype"]), dtype)
    tables = len(spans)
    books = sent = histogram = None
    if "books" in asked:
        lengths = [[int(digit, 16) for digit in book] for book in asked["books"]]
        books = Books.of(lengths, asked["book_ids"])
        sent = torch.tensor([asked["sent"]], dtype=torch.int32)
    if "histogram" in asked:
        histogram = torch.full((tables, 256), 5, dtype=torch.int64)
    (frame,) = codec_jobs.run_encode(
        backend,
        values,
        blocks,
        totals,
        bound=asked["bound"],
        request=asked["request"],
        kind=asked["kind"],
        books=books,
        sent=sent,
        histogram=histogram,
    )
    assert frame.hex(" ", 4) == frame_of(case["name"]).hex(" ", 4)
    if books is not None and sent is not None:
        assert sent.tolist() == [asked["book_ids"]]
    if histogram is not None:
        expected = torch.full((tables, 256), 5, dtype=torch.int64)
        for table, counts in enumerate(asked["histogram"]):
            for symbol, count in counts.items():
                expected[table, int(symbol)] += count
        assert torch.equal(histogram, expected)
