"""Ids counted and chosen by how often they occur, in bounded memory.

A *run* is a pair of arrays, ids [K] uint32 in ascending order without repetition, and their counts [K].
Runs of a column are merged as in a log-structured merge tree, and written to the disk when all columns'
together exceed their share of memory; the runs on the disk are merged by ranges of ids that fit.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tightrec.trainer.data.prepare.work import written

ENTRY_BYTES = 12
"""Memory of an id and its count."""

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
        with written(folder / f"{index:05d}.ids.npy") as file:
            np.save(file, np.concatenate([run.ids for run in whole]))
        with written(folder / f"{index:05d}.counts.npy") as file:
            np.save(file, np.concatenate([run.counts for run in whole]))
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


class Choice:
    """The ids of one column that occur at least ``min_count`` times, of these the ``max_ids`` most frequent.

    Between equally frequent ids the smaller one is kept. At most ``hold`` are held: beyond, they are
    counted only, and ``ids`` stays empty.
    """

    def __init__(self, *, min_count: int, max_ids: int | None, hold: int) -> None:
        self._min_count = min_count
        self._max_ids = max_ids
        self._hold = hold
        self.count = 0
        self.ids: Ids = np.empty(0, np.uint32)
        self.histogram: Counts = np.zeros(MOST_COUNTED + 1, np.int64)
        """[MOST_COUNTED + 1], ids by how often they occur; the last entry is for that often or more."""

    def take(self, runs: Iterable[Run]) -> "Choice":
        """Choose from ``runs``, which follow each other in ascending order."""
        held = Run(self.ids, np.empty(0, np.int64))
        for run in runs:
            self.histogram += np.bincount(np.minimum(run.counts, MOST_COUNTED), minlength=MOST_COUNTED + 1)
            enough = run.counts >= self._min_count
            self.count += int(enough.sum())
            if self._max_ids is not None:
                self.count = min(self.count, self._max_ids)
            if self.count <= self._hold:
                ids = np.concatenate([held.ids, run.ids[enough]])
                held = self._most_frequent(Run(ids, np.concatenate([held.counts, run.counts[enough]])))
        if self.count <= self._hold:
            self.ids = held.ids
        return self

    def _most_frequent(self, run: Run) -> Run:
        if self._max_ids is None or len(run.ids) <= self._max_ids:
            return run
        kept = np.sort(np.argsort(-run.counts, kind="stable")[: self._max_ids])
        return Run(run.ids[kept], run.counts[kept])


def least_count(histogram: Counts, most: int) -> int | None:
    """The smallest count such that at most ``most`` ids of a :class:`Choice`'s histogram occur that often."""
    as_often = np.cumsum(histogram[::-1])[::-1]
    fitting = np.flatnonzero(as_often <= most)
    return int(fitting[0]) if len(fitting) else None


@njit(nogil=True, cache=True)
def _run_lengths(ordered):  # type: ignore[no-untyped-def]
    """Distinct values of ``ordered`` [N] and how often each occurs."""
    ids = np.empty_like(ordered)
    counts = np.empty(ordered.size, np.int64)
    found = 0
    start = 0
    for at in range(1, ordered.size + 1):
        if at == ordered.size or ordered[at] != ordered[start]:
            ids[found] = ordered[start]
            counts[found] = at - start
            found += 1
            start = at
    return ids[:found].copy(), counts[:found].copy()


@njit(nogil=True, cache=True)
def _merge(a_ids, a_counts, b_ids, b_counts):  # type: ignore[no-untyped-def]
    """Merge two runs into one, adding up the counts of equal ids."""
    ids = np.empty(a_ids.size + b_ids.size, np.uint32)
    counts = np.empty(ids.size, np.int64)
    a = b = found = 0
    while a < a_ids.size or b < b_ids.size:
        if b == b_ids.size or (a < a_ids.size and a_ids[a] < b_ids[b]):
            ids[found], counts[found] = a_ids[a], a_counts[a]
            a += 1
        elif a == a_ids.size or b_ids[b] < a_ids[a]:
            ids[found], counts[found] = b_ids[b], b_counts[b]
            b += 1
        else:
            ids[found], counts[found] = a_ids[a], a_counts[a] + b_counts[b]
            a += 1
            b += 1
        found += 1
    return ids[:found].copy(), counts[:found].copy()
