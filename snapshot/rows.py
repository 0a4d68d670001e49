"""Held-out rows for search and verification, in the layout that the served model reads.

Shapes: n rows, D dense columns, F sparse columns.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tightrec.formats.columns import Bags, Columns, Ids, Source, offsets_of
from tightrec.formats.parquet import ParquetSource
from tightrec.formats.schema import Schema

BLOCK_ROWS = 256
"""Rows that are taken side by side: fewer would spread better and read more row groups."""

_OTHER = "Give data=FOLDER with the columns that the model was trained on."


class _Block(NamedTuple):
    """Rows ``start`` to ``stop`` of a row group."""

    group: int
    start: int
    stop: int


class Rows(NamedTuple):
    """Rows as tensors; bag f * n + i is feature f of row i."""

    dense: Tensor
    """float32 [n, D]"""

    ids: Tensor
    """int64 [sum of bag sizes]"""

    offsets: Tensor
    """int64 [F * n + 1]"""

    labels: Tensor
    """float32 [n], 0 or 1"""


def read_rows(
    folder: Path | str, split: str, limit: int | None, features: Schema | None = None, *, start: int = 0
) -> Columns:
    """Rows ``start`` to ``start + limit`` of a fixed order of a prepared folder's split, fewer if it ends.

    The order goes through blocks of 256 rows in bit-reversed order (van der Corput 1935), so that every
    window of it is spread evenly over the split, and windows that do not overlap share no row. What is
    returned stands in the order of the files.

    Args:
        folder: a prepared folder (:mod:`tightrec.formats.schema`).
        limit: None: all rows from ``start`` on.
        features: what the model reads; a folder with other columns is refused. None: whatever there is.

    Raises:
        ValueError: no such folder or split, other columns than ``features`` (naming the first one that
            differs), or data that is not what its schema says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"The folder {folder} with the rows does not exist. Give one with data=FOLDER: a prepared "
            "folder with the model's columns."
        )
    source = ParquetSource(folder, split)
    if features is not None:
        require_features(source.schema, features, str(folder))
    return _read(source, _window(source.row_counts, start, limit))


def require_features(found: Schema, wanted: Schema, where: str) -> None:
    """Refuse data whose columns a model cannot read as those that it was trained on.

    The data's cardinalities may be smaller, and a column with one id a row fits a multi-hot feature.

    Raises:
        ValueError: naming the first column that differs.
    """
    _require_names(found.dense, wanted.dense, "dense column", where)
    _require_names(found.sparse_names, wanted.sparse_names, "sparse column", where)
    for have, want in zip(found.sparse, wanted.sparse, strict=True):
        if have.cardinality > want.cardinality:
            raise ValueError(
                f"{where}: sparse column {have.name!r} has {have.cardinality:,} ids, but the model's table "
                f"has {want.cardinality:,} rows. {_OTHER}"
            )
        if have.multi_hot and not want.multi_hot:
            raise ValueError(
                f"{where}: sparse column {have.name!r} holds lists of ids, but the model was trained with "
                f"one id a row. {_OTHER}"
            )


def feature_major(columns: Columns) -> Rows:
    """``columns`` as tensors, feature after feature; they may share memory with it."""
    n = len(columns)
    sizes = [bags.sizes for bags in columns.sparse]
    offsets = offsets_of(np.concatenate([np.empty(0, np.int64), *sizes]))
    ids = np.concatenate([np.empty(0, np.int64), *(bags.ids for bags in columns.sparse)])
    assert len(offsets) == len(columns.sparse) * n + 1, "a column of another number of rows"
    return Rows(
        dense=_tensor(columns.dense, np.float32),
        ids=_tensor(ids, np.int64),
        offsets=_tensor(offsets, np.int64),
        labels=_tensor(columns.labels, np.float32),
    )


def replay(columns: Columns, batch_size: int) -> Iterator[Rows]:
    """``columns`` in batches of ``batch_size`` rows, the last one shorter; none where there is no row."""
    assert batch_size > 0, "a batch holds at least one row"
    for start in range(0, len(columns), batch_size):
        yield feature_major(columns.slice(start, min(start + batch_size, len(columns))))


def _require_names(found: Sequence[str], wanted: Sequence[str], kind: str, where: str) -> None:
    for at in range(max(len(found), len(wanted))):
        have = found[at] if at < len(found) else None
        want = wanted[at] if at < len(wanted) else None
        if have != want:
            there = f"is {have!r}" if have else "is missing"
            raise ValueError(
                f"{where}: {kind} {at + 1} {there}, but the model "
                f"{f'reads {want!r} there' if want else 'has none there'}. {_OTHER}"
            )


def _window(counts: list[int], start: int, limit: int | None) -> list[_Block]:
    """The parts of blocks that make up rows ``start`` to ``start + limit`` of the order, in file order."""
    blocks = [
        _Block(group, first, min(first + BLOCK_ROWS, rows))
        for group, rows in enumerate(counts)
        for first in range(0, rows, BLOCK_ROWS)
    ]
    stop = sum(counts) if limit is None else start + limit
    chosen, passed = [], 0
    for index in _bit_reversed(len(blocks)):
        block = blocks[index]
        first, last = max(start - passed, 0), min(stop - passed, block.stop - block.start)
        if first < last:
            chosen.append(_Block(block.group, block.start + first, block.start + last))
        passed += block.stop - block.start
        if passed >= stop:
            break
    return sorted(chosen)


def _bit_reversed(count: int) -> Iterator[int]:
    """0 to ``count`` - 1, ordered by their bits read backwards: every stretch is spread evenly."""
    bits = max(count - 1, 0).bit_length()
    for number in range(1 << bits):
        index = int(f"{number:0{bits}b}"[::-1], 2) if bits else 0
        if index < count:
            yield index


def _read(source: Source, blocks: list[_Block]) -> Columns:
    parts, group, columns = [], -1, None
    for block in blocks:
        if block.group != group:
            group, columns = block.group, source.read(block.group)
        assert columns is not None
        # A copy: a view would keep the whole row group in memory.
        parts.append(columns.take(np.arange(block.start, block.stop)))
    return Columns.concat(parts) if parts else _nothing(source.schema)


def _nothing(schema: Schema) -> Columns:
    empty: Ids = np.empty(0, np.int64)
    return Columns(
        dense=np.empty((0, len(schema.dense)), np.float32),
        labels=np.empty(0, np.float32),
        sparse=tuple(Bags(empty, np.zeros(1, np.int64) if c.multi_hot else None) for c in schema.sparse),
    )


def _tensor(values: np.ndarray, kind: type) -> Tensor:
    array: np.ndarray = np.ascontiguousarray(values, kind)
    # Memory of pyarrow is read-only, which torch warns of.
    return torch.from_numpy(array if array.flags.writeable else array.copy())
