"""Ids of one column counted, thresholded and numbered, in bounded memory.

A *run* is a pair of arrays, ids [K] uint32 in ascending order without repetition, and their counts [K].
Runs of a column are merged as in a log-structured merge tree, and written to the disk when all columns'
together exceed their share of memory; the runs on the disk are merged by ranges of ids that fit.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

ENTRY_BYTES = 12
LOOKUP_BYTES = 8
"""Memory per id of a numbered column: the id, and its share of the directory."""

MISSING, RARE, FIRST = 0, 1, 2
"""Numbers of a missing value and of an id that is not in the vocabulary, and the first number within it."""

MOST_COUNTED = 1_000
"""Largest min_count that a refusal can propose."""

Ids = NDArray[np.uint32]
Counts = NDArray[np.int64]


class Run(NamedTuple):
    """Distinct ids in ascending order, and how often each occurred."""

    ids: Ids
    counts: Counts


def count_run(values: Ids) -> Run:
    """The run of ``values``, in any order and with repetitions."""
    return Run(*_run_lengths(np.sort(values)))


class RunCounter:
    """Counts of the ids of several columns, as a few runs for each."""

    def __init__(self, columns: int) -> None:
        self._runs: list[list[Run]] = [[] for _ in range(columns)]

    @property
    def used_bytes(self) -> int:
        """Memory held by the runs."""
        return sum(len(run.ids) * ENTRY_BYTES for runs in self._runs for run in runs)

    def add(self, runs: Sequence[Run]) -> None:
        """Take in one run for each column."""
        for held, run in zip(self._runs, runs, strict=True):
            held.append(run)
            while len(held) > 1 and len(held[-2].ids) < 2 * len(held[-1].ids):
                held.append(Run(*_merge(*held.pop(), *held.pop())))

    def spill(self, folder: Path, index: int) -> list[int]:
        """Write everything to the two files numbered ``index``, and forget it; returns where columns end."""
        whole = []
        for held in self._runs:
            while len(held) > 1:
                held.append(Run(*_merge(*held.pop(), *held.pop())))
            whole.append(held.pop() if held else Run(np.empty(0, np.uint32), np.empty(0, np.int64)))
        np.save(folder / f"{index:05d}.ids.npy", np.concatenate([run.ids for run in whole]))
        np.save(folder / f"{index:05d}.counts.npy", np.concatenate([run.counts for run in whole]))
        return np.cumsum([len(run.ids) for run in whole]).tolist()


def spilled_runs(folder: Path, ends: Sequence[Sequence[int]], column: int) -> list[Run]:
    """The runs of one ``column`` in all the files that :meth:`RunCounter.spill` wrote, left on the disk."""
    runs = []
    for index, end in enumerate(ends):
        part = slice(end[column - 1] if column else 0, end[column])
        ids = np.load(folder / f"{index:05d}.ids.npy", mmap_mode="r")
        counts = np.load(folder / f"{index:05d}.counts.npy", mmap_mode="r")
        runs.append(Run(ids[part], counts[part]))
    return runs


def merged(runs: Sequence[Run], most: int) -> Iterator[Run]:
    """Merge ``runs`` into consecutive ones, by ranges of ids with at most about ``most`` entries in all."""
    ranges = [(0, 1 << 32)]
    while ranges:
        low, high = ranges.pop()
        slices = []
        for ids, counts in runs:
            first, last = np.searchsorted(ids, np.array([low, high - 1], np.uint32), side="left")
            last += last < len(ids) and ids[last] == high - 1
            slices.append((ids[first:last], counts[first:last]))
        if sum(len(ids) for ids, _ in slices) > most and high - low > 1:
            middle = (low + high) // 2
            ranges += [(middle, high), (low, middle)]
            continue
        held = Run(np.empty(0, np.uint32), np.empty(0, np.int64))
        for ids, counts in sorted(slices, key=lambda pair: len(pair[0])):
            if len(ids):
                held = Run(*_merge(*held, np.array(ids), np.array(counts)))
        if len(held.ids):
            yield held


def choose(runs: Iterator[Run], min_count: int, max_ids: int | None, histogram: Counts) -> Ids:
    """The ids that occur at least ``min_count`` times, of these the ``max_ids`` most frequent, ascending.

    Between equally frequent ids the smaller one is kept. ``histogram`` [MOST_COUNTED + 1] gains the number
    of ids by their count.
    """
    ids, counts = [], []
    for run in runs:
        histogram += np.bincount(np.minimum(run.counts, MOST_COUNTED), minlength=MOST_COUNTED + 1)
        enough = run.counts >= min_count
        ids.append(run.ids[enough])
        counts.append(run.counts[enough] if max_ids is not None else np.empty(0, np.int64))
    if not ids:
        return np.empty(0, np.uint32)
    chosen = np.concatenate(ids)
    if max_ids is not None and len(chosen) > max_ids:
        order = np.argsort(-np.concatenate(counts), kind="stable")[:max_ids]
        chosen = np.sort(chosen[order])
    return chosen


class Numbering:
    """Numbers of the ids of one column: 0 missing, 1 rare or unknown, from 2 on those chosen, ascending.

    A directory by the ids' leading bits narrows the search to a few neighbours; Criteo's ids are hashes
    and spread evenly.
    """

    def __init__(self, ids: Ids) -> None:
        bits = max(len(ids) - 1, 1).bit_length()
        self._ids = ids
        self._shift = 32 - bits
        steps = np.arange((1 << bits) + 1, dtype=np.uint64) << np.uint64(self._shift)
        # The last step, 2**32, does not fit an id: everything lies before it.
        self._directory = np.append(np.searchsorted(ids, steps[:-1].astype(np.uint32)), len(ids)).astype(
            np.uint32
        )

    @property
    def cardinality(self) -> int:
        """Number of numbers, the two reserved ones included."""
        return FIRST + len(self._ids)

    def numbers(self, ids: Ids, missing: NDArray[np.uint32], column: int, rows: NDArray[np.int64]) -> NDArray:
        """Numbers [len(rows)] of the ``rows`` of ``ids`` [R], where bit ``column`` of ``missing`` [R] is clear."""
        return _number(ids, missing, column, rows, self._ids, self._directory, self._shift)


class Hashing:
    """Numbers by hashing: 0 missing, else 1 + floor(h * (size - 1) / 2**64).

    h is the splitmix64 finaliser (Steele, Lea and Flood 2014) of the id plus the column's salt, which is the
    finaliser of seed * 64 + column + 1.
    """

    def __init__(self, size: int, seed: int, column: int) -> None:
        self.cardinality = size
        self._salt = mix(np.uint64((seed * 64 + column + 1) % (1 << 64)))

    def numbers(self, ids: Ids, missing: NDArray[np.uint32], column: int, rows: NDArray[np.int64]) -> NDArray:
        """Numbers [len(rows)] of the ``rows`` of ``ids`` [R], where bit ``column`` of ``missing`` [R] is clear."""
        return _hash(ids, missing, column, rows, np.uint64(self.cardinality - 1), self._salt)
