"""Reads a prepared folder (see :mod:`tightrec.formats.schema`), one row group at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet as pq

from tightrec.formats.columns import Bags, Columns, Floats, Ids
from tightrec.formats.schema import Schema, SparseColumn, load_schema

_AGAIN = "Prepare the data again."


class _Group(NamedTuple):
    """Where a row group lies."""

    path: Path
    number: int
    rows: int

    def __str__(self) -> str:
        return f"{self.path}, row group {self.number}"


class ParquetSource:
    """One split of a prepared folder.

    Opening reads every file's footer and checks its columns and row counts against ``schema.json``; the
    values are checked as they are read. Holds no open file.

    Raises:
        ValueError: the folder, the split, a file or a column is not what the schema says.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.schema: Schema = load_schema(folder)
        if split not in self.schema.rows:
            raise ValueError(
                f"{folder} has no split {split!r}; its schema.json names: {', '.join(self.schema.rows)}."
            )
        self._groups: list[_Group] = []
        for path in sorted((folder / split).glob("*.parquet")):
            with _told_by_path(path), pq.ParquetFile(path) as file:
                _check_columns(path, file.schema_arrow, self.schema)
                counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                self._groups += [_Group(path, i, rows) for i, rows in enumerate(counts)]
        self.row_counts: list[int] = [group.rows for group in self._groups]
        if sum(self.row_counts) != self.schema.rows[split]:
            raise ValueError(
                f"{folder / split} holds {sum(self.row_counts)} rows, but schema.json says "
                f"{self.schema.rows[split]}: a file is missing or does not belong there. {_AGAIN}"
            )

    def read(self, group: int) -> Columns:
        """Row group ``group``.

        Raises:
            ValueError: the file is damaged, or a value is not allowed; names file, row group, row (counted
                from 0 within the row group), column and value.
        """
        where = self._groups[group]
        schema = self.schema
        names = [schema.label, *schema.dense, *schema.sparse_names]
        with (
            _told_by_path(where.path),
            pq.ParquetFile(where.path, page_checksum_verification=True) as file,
        ):
            # Ranks and loader workers already read side by side, each on a core of its own.
            table = file.read_row_group(where.number, columns=names, use_threads=False)
        if table.num_rows != where.rows:
            raise ValueError(f"{where.path} changed while it was being read. Start the job again.")
        dense = np.empty((where.rows, len(schema.dense)), np.float32)
        for column, name in enumerate(schema.dense):
            dense[:, column] = _dense(where, name, _array(where, table, name))
        return Columns(
            dense=dense,
            labels=_labels(where, schema.label, _array(where, table, schema.label)),
            sparse=tuple(_bags(where, column, _array(where, table, column.name)) for column in schema.sparse),
        )


@contextmanager
def _told_by_path(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{path} cannot be read as parquet ({reason}). "
            "If it is damaged or cut short, prepare the data again."
        ) from None


def _check_columns(path: Path, found: pa.Schema, schema: Schema) -> None:
    expected = dict.fromkeys((schema.label, *schema.dense), "float32")
    expected |= {c.name: "list<int64>" if c.multi_hot else "int64" for c in schema.sparse}
    for name, wanted in expected.items():
        if name not in found.names:
            raise ValueError(f"{path} has no column {name!r}, which schema.json names. {_AGAIN}")
        if found.names.count(name) > 1:
            raise ValueError(f"{path} has more than one column {name!r}. {_AGAIN}")
        actual = _type_name(found.field(name).type)
        if actual != wanted:
            raise ValueError(f"{path}: column {name!r} is {actual}, but must be {wanted}. {_AGAIN}")
    extra = [name for name in found.names if name not in expected]
    if extra:
        raise ValueError(f"{path} has columns that schema.json does not name: {', '.join(extra)}. {_AGAIN}")


def _type_name(kind: pa.DataType) -> str:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"list<{_type_name(kind.value_type)}>"
    return "float32" if pa.types.is_float32(kind) else str(kind)


def _array(where: _Group, table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    if array.null_count:
        row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        raise ValueError(f"{where}, row {row}: column {name!r} is null. {_AGAIN}")
    return array


def _dense(where: _Group, name: str, array: pa.Array) -> Floats:
    values: Floats = array.to_numpy()
    row = _first(~np.isfinite(values))
    if row is not None:
        value = values[row]
        raise ValueError(
            f"{where}, row {row}: column {name!r} is {value}, but must be a finite number. {_AGAIN}"
        )
    return values


def _labels(where: _Group, name: str, array: pa.Array) -> Floats:
    values: Floats = array.to_numpy()
    row = _first((values != 0) & (values != 1))
    if row is not None:
        raise ValueError(
            f"{where}, row {row}: label {name!r} is {values[row]:g}, but must be 0 or 1. {_AGAIN}"
        )
    return values


def _bags(where: _Group, column: SparseColumn, array: pa.Array) -> Bags:
    if not column.multi_hot:
        ids: Ids = array.to_numpy()
        offsets = None
    else:
        ends: Ids = array.offsets.to_numpy().astype(np.int64)
        offsets = ends - ends[0]
        inner = array.flatten()
        if inner.null_count:
            at = int(np.argmax(inner.is_null().to_numpy(zero_copy_only=False)))
            row = _row_of(at, offsets)
            raise ValueError(f"{where}, row {row}: a list of column {column.name!r} holds a null. {_AGAIN}")
        ids = inner.to_numpy()
    # As unsigned numbers, negative ids are far too large as well.
    at_fault = _first(ids.view(np.uint64) >= np.uint64(column.cardinality))
    if at_fault is not None:
        row = at_fault if offsets is None else _row_of(at_fault, offsets)
        raise ValueError(
            f"{where}, row {row}: column {column.name!r} holds id {ids[at_fault]}, but schema.json gives it "
            f"cardinality {column.cardinality} (ids 0 to {column.cardinality - 1}). {_AGAIN}"
        )
    return Bags(ids, offsets)


def _row_of(position: int, offsets: Ids) -> int:
    return int(np.searchsorted(offsets, position, side="right")) - 1


def _first(wrong: NDArray[np.bool_]) -> int | None:
    if not wrong.any():
        return None
    return int(wrong.argmax())
