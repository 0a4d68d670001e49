"""A small in-memory source for tests, in which every value of a row tells the row's number."""

from collections.abc import Iterable

import numpy as np

from tightrec.formats.columns import Bags, Columns, offsets_of
from tightrec.formats.schema import Schema, SparseColumn
from tightrec.trainer.data.batch import Batch


def bag_of(row: int) -> list[int]:
    """The multi-hot ids of a row; every third row has none."""
    return [row * 10 + i for i in range(row % 3)]


class Numbered:
    """Row i: dense (i, -i), label i % 2, ``one`` holds id i, ``many`` holds ``bag_of(i)``."""

    def __init__(self, row_counts: list[int], bad_group: int | None = None) -> None:
        self.row_counts = row_counts
        self.bad_group = bad_group
        self.schema = Schema(
            dense=("plus", "minus"),
            sparse=(
                SparseColumn(name="one", cardinality=10**6),
                SparseColumn(name="many", cardinality=10**7, multi_hot=True),
            ),
            label="label",
            rows={"train": sum(row_counts)},
            source="numbered",
        )

    def read(self, group: int) -> Columns:
        if group == self.bad_group:
            raise ValueError(f"row group {group} is rotten. Throw it away.")
        before = sum(self.row_counts[:group])
        rows = np.arange(before, before + self.row_counts[group])
        bags = [bag_of(row) for row in rows.tolist()]
        return Columns(
            dense=np.stack([rows, -rows], axis=1).astype(np.float32),
            labels=(rows % 2).astype(np.float32),
            sparse=(
                Bags(rows),
                Bags(
                    np.array([i for bag in bags for i in bag], np.int64),
                    offsets_of(np.array([len(b) for b in bags], np.int64)),
                ),
            ),
        )


def rows_of(batch: Batch) -> list[int]:
    """The rows in a batch of numbered rows, after checking that every column of every row fits it."""
    real = int(batch.weights.sum())
    rows = [round(value) for value in batch.dense[:real, 0].tolist()]
    parts = {key: batch.sparse[key].to_dense() for key in ("one", "many")}
    assert batch.weights.tolist() == [1.0] * real + [0.0] * (len(batch.weights) - real)
    for place, row in enumerate(rows):
        assert batch.dense[place].tolist() == [row, -row]
        assert batch.labels[place] == row % 2
        assert parts["one"][place].tolist() == [row]
        assert parts["many"][place].tolist() == bag_of(row)
    for place in range(real, len(batch.weights)):
        assert batch.dense[place].tolist() == [0, 0]
        assert batch.labels[place] == 0
        assert all(len(part[place]) == 0 for part in parts.values())
    return rows


def all_rows(batches: Iterable[Batch]) -> list[list[int]]:
    """Rows of each batch."""
    return [rows_of(batch) for batch in batches]
