"""Held-out rows: which ones are taken, their layout, and data of other columns."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from tightrec.formats.columns import Bags, Columns
from tightrec.formats.schema import Schema, SparseColumn
from tightrec.snapshot.rows import BLOCK_ROWS, feature_major, read_rows, replay
from tightrec.trainer.data.batch import to_batch

SCHEMA = Schema(
    dense=("place", "other"),
    sparse=(
        SparseColumn(name="one", cardinality=7),
        SparseColumn(name="many", cardinality=5, multi_hot=True),
    ),
    label="y",
    rows={"valid": 10_000, "test": 0},
    source="a test",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10,000 rows whose first dense value is their place, in two files with uneven row groups."""
    folder = tmp_path_factory.mktemp("prepared")
    places = np.arange(10_000)
    lists = [list(range(place % 4)) for place in places]
    table = pa.table(
        {
            "y": pa.array((places // 50 % 2).astype(np.float32)),
            "place": pa.array(places.astype(np.float32)),
            "other": pa.array((places / 7).astype(np.float32)),
            "one": pa.array(places % 7),
            "many": pa.array(lists, pa.list_(pa.int64())),
        }
    )
    for split, parts in {"valid": [(0, 3_100), (3_100, 6_900)], "test": [(0, 0)]}.items():
        (folder / split).mkdir()
        for number, (start, count) in enumerate(parts):
            part = table.slice(start, count)
            parquet.write_table(part, folder / split / f"part-{number}.parquet", row_group_size=999)
    SCHEMA.save(folder)
    return folder


def places(columns: Columns) -> np.ndarray:
    return columns.dense[:, 0].astype(np.int64)


def test_windows_share_no_row_and_together_are_the_whole_split(folder: Path) -> None:
    windows = [read_rows(folder, "valid", 1_300, start=start) for start in range(0, 10_400, 1_300)]
    assert [len(window) for window in windows] == [1_300] * 7 + [900]
    together = np.concatenate([places(window) for window in windows])
    assert np.array_equal(np.sort(together), np.arange(10_000))
    assert np.array_equal(places(read_rows(folder, "valid", None)), np.arange(10_000))
    assert len(read_rows(folder, "valid", None, start=9_000)) == 1_000


@pytest.mark.parametrize("start", [0, 700, 5_000])
def test_a_window_is_the_same_each_time_in_file_order_and_spread_evenly(folder: Path, start: int) -> None:
    rows = read_rows(folder, "valid", 2_500, start=start)
    assert np.array_equal(places(rows), places(read_rows(folder, "valid", 2_500, start=start)))
    assert (np.diff(places(rows)) > 0).all()
    # A quarter of all rows, so a quarter of every fifth, but for the blocks at its ends.
    counts, _ = np.histogram(places(rows), bins=5, range=(0, 10_000))
    assert all(abs(count - 500) <= BLOCK_ROWS for count in counts), counts


def test_values_of_a_row_stay_together(folder: Path) -> None:
    rows = read_rows(folder, "valid", 777)
    where = places(rows)
    assert np.array_equal(rows.labels, where // 50 % 2)
    assert np.array_equal(rows.dense[:, 1], (where / 7).astype(np.float32))
    assert np.array_equal(rows.sparse[0].ids, where % 7)
    assert np.array_equal(rows.sparse[1].sizes, where % 4)


def test_tensors_are_laid_out_as_the_trainers_batches(folder: Path) -> None:
    rows = read_rows(folder, "valid", 333)
    found, batch = feature_major(rows), to_batch(rows, SCHEMA, 333)
    assert torch.equal(found.dense, batch.dense)
    assert torch.equal(found.labels, batch.labels)
    assert torch.equal(found.ids, batch.sparse.values())
    assert torch.equal(found.offsets, batch.sparse.offsets().long())
    assert {tensor.dtype for tensor in (found.ids, found.offsets)} == {torch.int64}


def test_replay_yields_all_rows_in_order_the_last_batch_shorter(folder: Path) -> None:
    rows = read_rows(folder, "valid", 250)
    batches = list(replay(rows, 100))
    assert [len(batch.labels) for batch in batches] == [100, 100, 50]
    assert torch.equal(torch.cat([batch.dense for batch in batches]), torch.from_numpy(rows.dense))
    last = feature_major(rows.slice(200, 250))
    assert all(torch.equal(one, other) for one, other in zip(batches[-1], last, strict=True))


def test_no_rows_are_no_batches_and_empty_tensors(folder: Path) -> None:
    for rows in (
        read_rows(folder, "valid", 0),
        read_rows(folder, "test", 5),
        read_rows(folder, "test", None),
    ):
        found = feature_major(rows)
        assert found.dense.shape == (0, 2)
        assert found.offsets.tolist() == [0]
        assert (len(found.ids), len(found.labels)) == (0, 0)
        assert list(replay(rows, 8)) == []


def test_rows_that_cannot_be_written_to_become_tensors_of_their_own(recwarn: pytest.WarningsRecorder) -> None:
    dense = np.ones((2, 1), np.float32)
    dense.flags.writeable = False
    found = feature_major(Columns(dense, np.zeros(2, np.float32), (Bags(np.array([1, 0])),)))
    found.dense.add_(1)
    assert dense.tolist() == [[1.0], [1.0]]
    assert len(recwarn) == 0


MODEL = dataclasses.replace(SCHEMA, rows={})
ONE, MANY = SCHEMA.sparse


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            dataclasses.replace(MODEL, dense=("place",)),
            "dense column 2 is 'other', but the model has none there",
        ),
        (
            dataclasses.replace(MODEL, dense=("place", "other", "third")),
            "dense column 3 is missing, but the model reads 'third' there",
        ),
        (
            dataclasses.replace(MODEL, sparse=(MANY, ONE)),
            "sparse column 1 is 'one', but the model reads 'many' there",
        ),
        (
            dataclasses.replace(MODEL, sparse=(SparseColumn(name="one", cardinality=6), MANY)),
            "sparse column 'one' has 7 ids, but the model's table has 6 rows",
        ),
        (
            dataclasses.replace(MODEL, sparse=(ONE, SparseColumn(name="many", cardinality=5))),
            "sparse column 'many' holds lists of ids",
        ),
    ],
)
def test_data_of_other_columns_is_refused_by_the_first_that_differs(
    folder: Path, model: Schema, told: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{folder}: {told}")):
        read_rows(folder, "valid", 10, model)


def test_smaller_data_fits_a_larger_model(folder: Path) -> None:
    sparse = (SparseColumn(name="one", cardinality=9, multi_hot=True), MANY)
    assert (
        len(read_rows(folder, "valid", 10, dataclasses.replace(MODEL, sparse=sparse, label="other label")))
        == 10
    )


def test_a_folder_that_is_gone_is_told_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone with the rows does not exist.*data=FOLDER"):
        read_rows(tmp_path / "gone", "valid", 10)
