"""Ids of a categorical column into numbers from 0 on, and rows into splits, each by a documented rule.

Hashes are the splitmix64 finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", 2014), written mix() here.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

MISSING, RARE, FIRST = 0, 1, 2
"""Numbers of a missing value and of an id outside the vocabulary, and the first number within it."""

BYTES_PER_ID = 12
"""Memory of a vocabulary: an id, and its share of the directory."""

TRAIN, VALID, TEST = 0, 1, 2
"""Codes of the splits, in the order of tightrec.formats.schema.SPLITS."""

Ids = NDArray[np.uint32]
Rows = NDArray[np.int64]


class Vocabulary:
    """Numbers of the ids of one column: 0 missing, 1 rare or unknown, from 2 on those chosen, ascending.

    A directory by the ids' leading bits narrows the search to a few neighbours; Criteo's ids are hashes
    and spread evenly.
    """

    def __init__(self, ids: Ids) -> None:
        bits = max(len(ids) - 1, 1).bit_length()
        self._ids = ids
        self._shift = np.uint32(32 - bits)
        starts = (np.arange(1 << bits, dtype=np.uint64) << np.uint64(self._shift)).astype(np.uint32)
        self._directory = np.append(np.searchsorted(ids, starts), len(ids)).astype(np.uint32)

    @property
    def cardinality(self) -> int:
        """One more than the largest number."""
        return FIRST + len(self._ids)

    def numbers(self, ids: Ids, missing: Ids, column: int, rows: Rows) -> NDArray[np.int64]:
        """Numbers [len(rows)] of ``ids[rows]``; bit ``column`` of ``missing`` is set where there is none."""
        return _look_up(ids, missing, np.uint32(column), rows, self._ids, self._directory, self._shift)


class Hashing:
    """Numbers by hashing into ``size``: 0 missing, else 1 + floor(h * (size - 1) / 2**32).

    h is the upper half of mix(id + salt), and the salt of a column mix(64 * seed + column), all modulo 2**64.
    """

    def __init__(self, size: int, seed: int, column: int) -> None:
        self.cardinality = size
        self._salt = _mix(np.uint64((64 * seed + column) % (1 << 64)))

    def numbers(self, ids: Ids, missing: Ids, column: int, rows: Rows) -> NDArray[np.int64]:
        """Numbers [len(rows)] of ``ids[rows]``; bit ``column`` of ``missing`` is set where there is none."""
        salt, span = np.uint64(self._salt), np.uint64(self.cardinality - 1)
        return _hash(ids, missing, np.uint32(column), rows, salt, span)


def draw_splits(
    lines: Rows, file: int, seed: int, valid_share: float, test_share: float
) -> NDArray[np.uint8]:
    """Split [R] of the rows at ``lines`` of the file with index ``file``, whatever else is read.

    u = mix(line + mix(file + mix(seed))) / 2**64 puts a row into test where u < test_share, into valid where
    u < test_share + valid_share, else into train.
    """
    salt = _mix(np.uint64((file + int(_mix(np.uint64(seed)))) % (1 << 64)))
    return _draw(lines, np.uint64(salt), test_share, test_share + valid_share)


@njit(nogil=True, cache=True)
def _mix(x):  # type: ignore[no-untyped-def]
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(nogil=True, cache=True)
def _draw(lines, salt, below_test, below_valid):  # type: ignore[no-untyped-def]
    splits = np.empty(lines.size, np.uint8)
    for at in range(lines.size):
        u = np.float64(_mix(np.uint64(lines[at]) + salt) >> np.uint64(11)) * 2.0**-53
        splits[at] = TEST if u < below_test else VALID if u < below_valid else TRAIN
    return splits


@njit(nogil=True, cache=True)
def _look_up(ids, missing, column, rows, vocabulary, directory, shift):  # type: ignore[no-untyped-def]
    numbers = np.empty(rows.size, np.int64)
    for at in range(rows.size):
        row = rows[at]
        if (missing[row] >> column) & np.uint32(1):
            numbers[at] = MISSING
            continue
        wanted = ids[row]
        bucket = wanted >> shift
        low, high = np.int64(directory[bucket]), np.int64(directory[bucket + 1])
        end = high
        while low < high:
            middle = (low + high) >> 1
            if vocabulary[middle] < wanted:
                low = middle + 1
            else:
                high = middle
        numbers[at] = low + FIRST if low < end and vocabulary[low] == wanted else RARE
    return numbers


@njit(nogil=True, cache=True)
def _hash(ids, missing, column, rows, salt, span):  # type: ignore[no-untyped-def]
    numbers = np.empty(rows.size, np.int64)
    for at in range(rows.size):
        row = rows[at]
        if (missing[row] >> column) & np.uint32(1):
            numbers[at] = MISSING
        else:
            h = _mix(np.uint64(ids[row]) + salt) >> np.uint64(32)
            numbers[at] = np.int64((h * span) >> np.uint64(32)) + 1
    return numbers
