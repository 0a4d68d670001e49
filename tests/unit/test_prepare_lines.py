"""The compiled parser agrees with a line-by-line one, on good lines and on every kind of bad one."""

import random

import numpy as np
import pytest
from criteo_files import make_line, make_text, take_apart
from hypothesis import given, settings
from hypothesis import strategies as st

from tightrec.trainer.data.prepare.lines import Rows, parse
from tightrec.trainer.data.prepare.rejects import Faults

GOOD = make_line(random.Random(1)).split("\t")


def parsed(text: bytes, first_line: int = 1) -> tuple[Rows, Faults]:
    return parse(np.frombuffer(text, np.uint8), text.count(b"\n"), "in.tsv", first_line)


def with_field(column: int, value: str) -> bytes:
    return "\t".join([*GOOD[:column], value, *GOOD[column + 1 :]]).encode() + b"\n"


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_good_lines_become_the_columns_they_hold(line_end: bytes) -> None:
    text = make_text(300)
    rows, faults = parsed(text.replace(b"\n", line_end))
    expected = take_apart(text)
    assert not faults.kinds
    assert rows.line.tolist() == list(range(1, 301))
    assert rows.label.tolist() == [line.label for line in expected]
    logs = np.log1p(np.array([line.integers for line in expected], np.float64)).astype(np.float32)
    np.testing.assert_array_equal(rows.dense, logs.T)
    ids = np.array([[key or 0 for key in line.ids] for line in expected], np.uint32)
    np.testing.assert_array_equal(rows.ids, ids.T)
    missing = [sum(1 << c for c, key in enumerate(line.ids) if key is None) for line in expected]
    assert rows.missing.tolist() == missing


@pytest.mark.parametrize(
    ("line", "kind", "value"),
    [
        (b"\n", "column count", ""),
        (b"0\t1\n", "column count", "0\\t1"),
        (with_field(39, "0a\t0b"), "column count", None),
        (with_field(0, "2"), "label", "2"),
        (with_field(0, ""), "label", ""),
        (with_field(0, "01"), "label", "01"),
        (with_field(1, "1.5"), "integer", "1.5"),
        (with_field(13, "-"), "integer", "-"),
        (with_field(5, "1" * 19), "integer", "1" * 19),
        (with_field(5, "+1"), "integer", "+1"),
        (with_field(5, " 1"), "integer", " 1"),
        (with_field(14, "0000000g"), "hex id", "0000000g"),
        (with_field(39, "012345678"), "hex id", "012345678"),
        (with_field(39, "0a\r\r"), "hex id", "0a\\r"),
        (with_field(20, "ab cd"), "hex id", "ab cd"),
        (with_field(20, "caf\u00e9"), "encoding", None),
        (with_field(20, "\0"), "NUL byte", None),
    ],
)
def test_each_kind_of_bad_line_is_told_apart_with_line_and_value(
    line: bytes, kind: str, value: str | None
) -> None:
    good = "\t".join(GOOD).encode() + b"\n"
    rows, faults = parsed(good * 2 + line + good, first_line=11)
    assert rows.line.tolist() == [11, 12, 14]
    (reject,) = faults.samples
    assert (reject.file, reject.line, reject.kind) == ("in.tsv", 13, kind)
    if value is not None:
        assert reject.value.replace("\t", "\\t").replace("\r", "\\r") == value
    assert np.array_equal(rows.ids[:, 0], rows.ids[:, 2])


@pytest.mark.parametrize("value", ["0", "-7", "4095", "4096", "9" * 18, "-" + "9" * 18, "007"])
def test_integers_of_any_size_are_read(value: str) -> None:
    rows, faults = parsed(with_field(3, value))
    assert not faults.kinds
    assert rows.dense[2, 0] == np.float32(np.log1p(max(int(value), 0)))


@pytest.mark.parametrize("value", ["0", "ABCDEF01", "ffffffff", "00000000", "abc"])
def test_ids_are_up_to_eight_hex_digits_in_either_case(value: str) -> None:
    rows, faults = parsed(with_field(39, value))
    assert not faults.kinds
    assert rows.ids[25, 0] == int(value, 16)
    assert not rows.missing[0] >> 25


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=60) | st.just("\t".join(GOOD).encode()), max_size=30))
def test_no_bytes_are_misread_or_lost(lines: list[bytes]) -> None:
    text = b"".join(line + b"\n" for line in lines)
    rows, faults = parsed(text)
    assert len(rows.line) + faults.kinds.total() == text.count(b"\n")
    all_lines = text.split(b"\n")
    assert [all_lines[at - 1] for at in rows.line.tolist()] == ["\t".join(GOOD).encode()] * len(rows.line)


def test_many_bad_lines_are_counted_but_few_are_kept() -> None:
    rows, faults = parsed(b"bad\n" * 1_000 + make_text(1) + b"3" + make_text(1))
    assert faults.kinds == {"column count": 1_000, "label": 1}
    assert [reject.line for reject in faults.samples] == [*range(1, 11), 1_002]
    assert rows.line.tolist() == [1_001]
