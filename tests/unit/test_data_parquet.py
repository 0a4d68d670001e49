"""The parquet reader: what was written comes back, and whatever is wrong is told with its place."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from tightrec.formats.parquet import ParquetSource
from tightrec.formats.schema import Schema, SparseColumn

SCHEMA = Schema(
    dense=("d1", "d2"),
    sparse=(
        SparseColumn(name="one", cardinality=100),
        SparseColumn(name="many", cardinality=50, multi_hot=True),
    ),
    label="click",
    rows={"train": 10},
    source="a test",
)
TYPES = {
    "click": pa.float32(),
    "d1": pa.float32(),
    "d2": pa.float32(),
    "one": pa.int64(),
    "many": pa.list_(pa.int64()),
}
Values = dict[str, list[Any]]


def values(first: int, rows: int) -> Values:
    numbers = range(first, first + rows)
    return {
        "click": [float(i % 2) for i in numbers],
        "d1": [i + 0.5 for i in numbers],
        "d2": [-float(i) for i in numbers],
        "one": [i * 3 for i in numbers],
        "many": [[i] * (i % 3) for i in numbers],
    }


def write(folder: Path, change: Callable[[Values], None] | None = None, **types: pa.DataType) -> Path:
    """Ten rows in train/: part-0 with row groups of 3 and 2, part-1 with one of 5, which ``change`` edits."""
    train = folder / "train"
    train.mkdir()
    SCHEMA.save(folder)
    second = values(5, 5)
    if change:
        change(second)
    for part, (columns, size) in enumerate([(values(0, 5), 3), (second, 5)]):
        kinds = TYPES | types if part else TYPES
        table = pa.table({name: pa.array(column, kinds.get(name)) for name, column in columns.items()})
        pq.write_table(table, train / f"part-{part}.parquet", row_group_size=size, write_page_checksum=True)
    return train / "part-1.parquet"


def test_every_value_comes_back_by_row_group(tmp_path: Path) -> None:
    write(tmp_path)
    source = ParquetSource(tmp_path, "train")
    assert source.row_counts == [3, 2, 5]
    assert source.schema == SCHEMA
    first = 0
    for group, rows in enumerate(source.row_counts):
        columns, expected = source.read(group), values(first, rows)
        assert columns.labels.tolist() == expected["click"]
        assert columns.dense.T.tolist() == [expected["d1"], expected["d2"]]
        assert columns.sparse[0].offsets is None
        assert columns.sparse[0].ids.tolist() == expected["one"]
        assert columns.sparse[1].ids.tolist() == [i for bag in expected["many"] for i in bag]
        assert columns.sparse[1].sizes.tolist() == [len(bag) for bag in expected["many"]]
        first += rows


def test_a_source_pickles_for_workers(tmp_path: Path) -> None:
    write(tmp_path)
    copy = pickle.loads(pickle.dumps(ParquetSource(tmp_path, "train")))
    assert copy.read(2).labels.tolist() == values(5, 5)["click"]


def test_lists_with_large_offsets_are_lists_too(tmp_path: Path) -> None:
    write(tmp_path, many=pa.large_list(pa.int64()))
    assert ParquetSource(tmp_path, "train").read(2).sparse[1].sizes.tolist() == [2, 0, 1, 2, 0]


def put(column: str, row: int, value: Any) -> Callable[[Values], None]:
    def change(columns: Values) -> None:
        columns[column][row] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("one", 2, 100), "row group 0, row 2: column 'one' holds id 100.*cardinality 100.*0 to 99"),
        (put("one", 4, -1), "row group 0, row 4: column 'one' holds id -1"),
        (put("many", 3, [1, 50]), "row group 0, row 3: column 'many' holds id 50.*cardinality 50"),
        (put("many", 0, [-7]), "row group 0, row 0: column 'many' holds id -7"),
        (put("many", 2, [1, None]), "row group 0, row 2: a list of column 'many' holds a null"),
        (put("many", 1, None), "row group 0, row 1: column 'many' is null"),
        (put("one", 1, None), "row group 0, row 1: column 'one' is null"),
        (put("d1", 3, None), "row group 0, row 3: column 'd1' is null"),
        (put("d2", 0, float("nan")), "row group 0, row 0: column 'd2' is nan, but must be a finite number"),
        (put("d2", 1, float("inf")), "row group 0, row 1: column 'd2' is inf, but must be a finite"),
        (put("click", 4, 2.0), "row group 0, row 4: label 'click' is 2, but must be 0 or 1"),
        (put("click", 4, 0.5), "row group 0, row 4: label 'click' is 0.5"),
        (put("click", 0, float("nan")), "row group 0, row 0: label 'click' is nan"),
    ],
)
def test_a_bad_value_is_told_with_file_row_group_row_and_column(
    tmp_path: Path, change: Callable[[Values], None], words: str
) -> None:
    path = write(tmp_path, change)
    source = ParquetSource(tmp_path, "train")
    source.read(0)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, {words}"):
        source.read(2)


def without_one(columns: Values) -> None:
    del columns["one"]


def with_extra(columns: Values) -> None:
    columns["extra"] = columns["d1"]


@pytest.mark.parametrize(
    ("change", "types", "words"),
    [
        (without_one, {}, "has no column 'one'"),
        (with_extra, {"extra": pa.float32()}, "columns that schema.json does not name: extra"),
        (None, {"one": pa.int32()}, "column 'one' is int32, but must be int64"),
        (None, {"d1": pa.float64()}, "column 'd1' is double, but must be float32"),
        (None, {"many": pa.list_(pa.int32())}, "column 'many' is list<int32>, but must be list<int64>"),
        (None, {"click": pa.float16()}, "column 'click' is halffloat, but must be float32"),
    ],
)
def test_columns_unlike_the_schema_are_refused_on_opening(
    tmp_path: Path, change: Callable[[Values], None] | None, types: dict[str, pa.DataType], words: str
) -> None:
    path = write(tmp_path, change, **types)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{words}"):
        ParquetSource(tmp_path, "train")


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_file_cut_short_is_refused_by_name(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} cannot be read as parquet"):
        ParquetSource(tmp_path, "train")


def test_damage_inside_a_page_is_noticed_by_its_checksum(tmp_path: Path) -> None:
    path = write(tmp_path)
    source = ParquetSource(tmp_path, "train")
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(0).column(0)
        last = column.data_page_offset + column.total_compressed_size - 1
    data = bytearray(path.read_bytes())
    data[last] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} cannot be read as parquet"):
        source.read(2)


def test_a_file_that_vanishes_or_is_replaced_later_is_told_by_name(tmp_path: Path) -> None:
    path = write(tmp_path)
    source = ParquetSource(tmp_path, "train")
    other = pa.table({name: pa.array(column, TYPES[name]) for name, column in values(0, 4).items()})
    pq.write_table(other, path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} changed"):
        source.read(2)
    path.unlink()
    with pytest.raises(ValueError, match=re.escape(str(path))):
        source.read(2)


def test_rows_that_differ_from_the_schema_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"train holds 5 rows, but schema.json says 10"):
        ParquetSource(tmp_path, "train")


def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=r"no split 'test'; its schema.json names: train"):
        ParquetSource(tmp_path, "test")


def test_a_folder_that_is_not_prepared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"schema.json does not exist"):
        ParquetSource(tmp_path, "train")
