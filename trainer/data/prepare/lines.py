"""Bytes of the input into columns: the compiled parser of Criteo's lines.

Shapes: N = lines of one piece, R <= N = the good ones among them, F = 13 integers, C = 26 ids.
"""

import re
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tightrec.trainer.data.prepare.rejects import Faults, Reject

INTEGERS, CATEGORIES = 13, 26
COLUMNS = 1 + INTEGERS + CATEGORIES
NAMES = ("label", *(f"I{i + 1}" for i in range(INTEGERS)), *(f"C{i + 1}" for i in range(CATEGORIES)))

_COLUMN_COUNT, _LABEL, _INTEGER, _CATEGORY = 1, 2, 3, 4
_TAB, _NEWLINE, _RETURN, _MINUS, _ZERO, _ONE = 9, 10, 13, 45, 48, 49
_INTEGER_DIGITS = 18
"""Most digits that surely fit 64 bits."""

_SHORTEST_LINE_BYTES = COLUMNS + 1
"""A label, the tabs and the line end, with all else blank."""

_LOGS = np.log1p(np.arange(4096)).astype(np.float32)
"""log(x + 1) of the integers that make up nearly all of the data."""

_HEX = np.full(256, 255, dtype=np.uint8)
for _digit in range(16):
    _HEX[[ord(f"{_digit:x}"), ord(f"{_digit:X}")]] = _digit

_RULES = {
    _INTEGER: (re.compile(rb"(-?\d{1,18})?"), "integer", "is not an integer", range(1, 1 + INTEGERS)),
    _CATEGORY: (re.compile(rb"[0-9a-fA-F]{0,8}"), "hex id", "is not up to 8 hex digits", range(14, COLUMNS)),
}
"""What a field must look like, and the words for one that does not."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The good lines of one piece, column by column."""

    label: NDArray[np.float32]
    """[R], 0 or 1."""

    dense: NDArray[np.float32]
    """[F, R], log(x + 1) with blanks and negative integers taken as 0."""

    ids: NDArray[np.uint32]
    """[C, R], the eight hex digits as a number; 0 where missing."""

    missing: NDArray[np.uint32]
    """[R], bit c set where category c is blank."""

    line: NDArray[np.int64]
    """[R], line number within the file, from 1."""


def parse(data: NDArray[np.uint8], lines: int, file: str, first_line: int) -> tuple[Rows, Faults]:
    """Parse ``data``, ``lines`` whole lines of ``file`` of which the first has the number ``first_line``.

    A line may end in CR LF. An integer is a decimal number of up to 18 digits, possibly negative, or
    blank; a category is 1 to 8 hex digits, or blank.
    """
    most = min(lines, len(data) // _SHORTEST_LINE_BYTES)
    # The columns of a power-of-two length would all fall on the same few cache lines: hence the odd tail.
    stride = most + 331
    rows = Rows(
        label=np.empty(stride, dtype=np.float32),
        dense=np.empty((INTEGERS, stride), dtype=np.float32),
        ids=np.empty((CATEGORIES, stride), dtype=np.uint32),
        missing=np.empty(stride, dtype=np.uint32),
        line=np.empty(stride, dtype=np.int64),
    )
    found = np.empty((64, 4), dtype=np.int64)
    faults = Faults()
    row = start = 0
    line = first_line
    while start < len(data):
        row, line, start, count = _parse(
            data,
            start,
            row,
            line,
            rows.label,
            rows.dense,
            rows.ids,
            rows.missing,
            rows.line,
            found,
            _HEX,
            _LOGS,
        )
        for fault in found[:count].tolist():
            faults.add(_reject(file, data[fault[2] : fault[3]].tobytes(), *fault[:2]))
    good = Rows(
        label=rows.label[:row],
        dense=rows.dense[:, :row],
        ids=rows.ids[:, :row],
        missing=rows.missing[:row],
        line=rows.line[:row],
    )
    return good, faults


@njit(nogil=True, cache=True, boundscheck=False)
def _parse(  # type: ignore[no-untyped-def]
    data, start, row, line, labels, dense, ids, missing, lines, faults, hexadecimal, logs
):
    """Parse from ``start`` to the end of ``data`` or until ``faults`` is full.

    Returns the next free row, the next line number, where to go on, and the number of faults, each
    (line number, kind, start and end of the line).
    """
    found = 0
    size = data.size
    while start < size and found < faults.shape[0]:
        p = start
        fault = 0
        if p + 1 < size and (data[p] == _ZERO or data[p] == _ONE) and data[p + 1] == _TAB:
            labels[row] = data[p] - _ZERO
            p += 2
        else:
            fault = _LABEL
        if fault == 0:
            for column in range(INTEGERS):
                negative = data[p] == _MINUS
                if negative:
                    p += 1
                value = np.int64(0)
                first = p
                digit = np.uint8(data[p] - _ZERO)
                while digit < 10 and p - first < _INTEGER_DIGITS:
                    value = value * 10 + digit
                    p += 1
                    digit = np.uint8(data[p] - _ZERO)
                if data[p] != _TAB or (negative and p == first):
                    fault = _INTEGER
                    break
                if negative:
                    value = np.int64(0)
                dense[column, row] = logs[value] if value < logs.size else np.log1p(np.float64(value))
                p += 1
        if fault == 0:
            absent = np.uint32(0)
            for column in range(CATEGORIES):
                value32 = np.uint32(0)
                first = p
                nibble = hexadecimal[data[p]]
                while nibble < 16 and p - first < 8:
                    value32 = np.uint32((value32 << np.uint32(4)) | nibble)
                    p += 1
                    nibble = hexadecimal[data[p]]
                if p == first:
                    absent |= np.uint32(np.uint32(1) << np.uint32(column))
                ids[column, row] = value32
                if column < CATEGORIES - 1:
                    if data[p] != _TAB:
                        fault = _CATEGORY
                        break
                    p += 1
            missing[row] = absent
            if fault == 0:
                if data[p] == _RETURN and p + 1 < size:
                    p += 1
                if data[p] != _NEWLINE:
                    fault = _CATEGORY
        if fault == 0:
            lines[row] = line
            row += 1
            start = p + 1
        else:
            tabs = 0
            p = start
            while data[p] != _NEWLINE:
                tabs += data[p] == _TAB
                p += 1
            faults[found, 0] = line
            faults[found, 1] = fault if tabs == COLUMNS - 1 else _COLUMN_COUNT
            faults[found, 2] = start
            faults[found, 3] = p
            found += 1
            start = p + 1
        line += 1
    return row, line, start, found


def _reject(file: str, text: bytes, line: int, fault: int) -> Reject:
    text = text.removesuffix(b"\r")
    foreign = next((i for i, byte in enumerate(text) if byte == 0 or byte > 127), None)
    if foreign is not None:
        kind = "NUL byte" if text[foreign] == 0 else "encoding"
        return Reject.of(
            file, line, kind, f"byte 0x{text[foreign]:02x} at {foreign + 1} is not ASCII text", text
        )
    fields = text.split(b"\t")
    if fault == _COLUMN_COUNT:
        return Reject.of(file, line, "column count", f"{len(fields)} columns where {COLUMNS} belong", text)
    if fault == _LABEL:
        return Reject.of(file, line, "label", "the label is neither 0 nor 1", fields[0])
    pattern, kind, words, columns = _RULES[fault]
    column = next(c for c in columns if not pattern.fullmatch(fields[c]))
    return Reject.of(file, line, kind, f"{NAMES[column]} {words}", fields[column])
