"""Rows in columns, and what hands them out one row group at a time.

Shapes: n rows, D dense columns, F sparse columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tightrec.formats.schema import Schema

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Bags:
    """One sparse column: a bag of ids per row."""

    ids: Ids
    """[sum of bag sizes], row after row."""

    offsets: Ids | None = None
    """[n + 1]: row i owns ids[offsets[i]:offsets[i + 1]]; None: every row has exactly one id."""

    def __len__(self) -> int:
        return len(self.ids) if self.offsets is None else len(self.offsets) - 1

    @property
    def sizes(self) -> Ids:
        """[n]: number of ids in each bag."""
        return np.ones(len(self.ids), np.int64) if self.offsets is None else np.diff(self.offsets)

    def take(self, rows: Ids) -> "Bags":
        """The bags of ``rows``, in that order."""
        if self.offsets is None:
            return Bags(self.ids[rows])
        starts = self.offsets[rows]
        sizes = self.offsets[rows + 1] - starts
        offsets = offsets_of(sizes)
        where = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], sizes)
        return Bags(self.ids[where], offsets)

    def slice(self, start: int, stop: int) -> "Bags":
        """The bags of rows ``start`` to ``stop``, without copying ids."""
        if self.offsets is None:
            return Bags(self.ids[start:stop])
        offsets = self.offsets[start : stop + 1]
        return Bags(self.ids[offsets[0] : offsets[-1]], offsets - offsets[0])

    @staticmethod
    def concat(parts: Sequence["Bags"]) -> "Bags":
        """The bags of all ``parts`` (at least one), one part after the other."""
        ids = np.concatenate([part.ids for part in parts])
        if all(part.offsets is None for part in parts):
            return Bags(ids)
        return Bags(ids, offsets_of(np.concatenate([part.sizes for part in parts])))


@dataclass(frozen=True)
class Columns:
    """Rows of a data set, column by column."""

    dense: Floats
    """[n, D]; D may be 0."""

    labels: Floats
    """[n], 0 or 1."""

    sparse: tuple[Bags, ...]
    """F columns in the schema's order."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Ids) -> "Columns":
        """The given ``rows``, in that order (a permutation shuffles)."""
        return Columns(self.dense[rows], self.labels[rows], tuple(bags.take(rows) for bags in self.sparse))

    def slice(self, start: int, stop: int) -> "Columns":
        """Rows ``start`` to ``stop``, without copying values."""
        sparse = tuple(bags.slice(start, stop) for bags in self.sparse)
        return Columns(self.dense[start:stop], self.labels[start:stop], sparse)

    @staticmethod
    def concat(parts: Sequence["Columns"]) -> "Columns":
        """The rows of all ``parts`` (at least one), one part after the other; a single part is not copied."""
        if len(parts) == 1:
            return parts[0]
        by_column: Any = zip(*(part.sparse for part in parts), strict=True)
        return Columns(
            np.concatenate([part.dense for part in parts]),
            np.concatenate([part.labels for part in parts]),
            tuple(Bags.concat(column) for column in by_column),
        )


def offsets_of(sizes: Ids) -> Ids:
    """[n + 1] offsets of bags of the given ``sizes`` [n]."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


class Source(Protocol):
    """One split of a data set, in row groups; picklable, so that loader workers can read it too."""

    @property
    def schema(self) -> Schema:
        """Names and cardinalities of the columns."""
        ...

    @property
    def row_counts(self) -> list[int]:
        """Rows in each row group."""
        ...

    def read(self, group: int) -> Columns:
        """Row group ``group``: the same rows in the same order, whoever reads it and whenever.

        Raises:
            ValueError: the data is not what the schema says; names the place.
        """
        ...


def read_groups(source: Source, groups: Sequence[int]) -> Columns:
    """The rows of several row groups, one group after the other."""
    return Columns.concat([source.read(group) for group in groups])
