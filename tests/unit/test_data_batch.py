"""Columns and batches: vectorised gathering equals a plain loop, padding counts for nothing."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numbered import Numbered, bag_of, rows_of
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from tightrec.formats.columns import Bags, Columns, offsets_of
from tightrec.trainer.data.batch import padding_batch, to_batch

BAGS = st.lists(st.lists(st.integers(0, 2**62), max_size=4), max_size=12)


def bags_of(rows: list[list[int]]) -> Bags:
    ids = np.array([i for row in rows for i in row], np.int64)
    return Bags(ids, offsets_of(np.array([len(row) for row in rows], np.int64)))


def lists_of(bags: Bags) -> list[list[int]]:
    ends = np.cumsum(bags.sizes)
    return [bags.ids[end - size : end].tolist() for size, end in zip(bags.sizes, ends, strict=True)]


@given(rows=BAGS, data=st.data())
def test_take_and_slice_are_python_indexing_for_bags_of_any_size(
    rows: list[list[int]], data: st.DataObject
) -> None:
    bags = bags_of(rows)
    if rows:
        order = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20))
        taken = bags.take(np.array(order, np.int64))
        assert lists_of(taken) == [rows[i] for i in order]
        assert len(taken) == len(order)
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    assert lists_of(bags.slice(start, stop)) == rows[start:stop]
    # A slice is a view whose ids do not start at 0: gathering from it must know.
    if stop > start:
        assert lists_of(bags.slice(start, stop).take(np.array([stop - start - 1]))) == [rows[stop - 1]]


@given(parts=st.lists(BAGS, min_size=1, max_size=4))
def test_concat_of_bags_is_list_addition(parts: list[list[list[int]]]) -> None:
    assert lists_of(Bags.concat([bags_of(part) for part in parts])) == [bag for part in parts for bag in part]


def test_concat_mixes_columns_with_and_without_offsets() -> None:
    single = Bags(np.array([7, 8]))
    assert lists_of(Bags.concat([single, bags_of([[], [1, 2]]), single])) == [[7], [8], [], [1, 2], [7], [8]]
    assert Bags.concat([single, single]).offsets is None


def test_columns_take_slice_and_concat_keep_every_column_of_a_row_together() -> None:
    source = Numbered([5, 4])
    columns = Columns.concat([source.read(0), source.read(1)])
    shuffled = columns.take(np.array([8, 0, 3, 3]))
    assert rows_of(to_batch(shuffled, source.schema, 4)) == [8, 0, 3, 3]
    assert rows_of(to_batch(columns.slice(4, 7), source.schema, 5)) == [4, 5, 6]


def test_batch_has_the_shapes_and_types_of_the_contract() -> None:
    source = Numbered([3])
    batch = to_batch(source.read(0), source.schema, 5)
    assert batch.sparse.keys() == ["one", "many"]
    assert batch.sparse.stride() == 5
    assert batch.sparse.values().tolist() == [0, 1, 2, *bag_of(1), *bag_of(2)]
    assert batch.sparse.lengths().tolist() == [1, 1, 1, 0, 0, 0, 1, 2, 0, 0]
    assert (batch.sparse.values().dtype, batch.sparse.lengths().dtype) == (torch.int64, torch.int32)
    assert batch.sparse.weights_or_none() is None
    for part in (batch.dense, batch.labels, batch.weights):
        assert part.dtype == torch.float32
    assert batch.dense.shape == (5, 2)


def test_padding_batch_is_a_whole_batch_of_nothing() -> None:
    batch = padding_batch(Numbered([1]).schema, 4)
    assert rows_of(batch) == []
    assert batch.dense.shape == (4, 2)
    assert batch.sparse.stride() == 4
    assert batch.sparse.values().dtype == torch.int64


def test_no_dense_column_gives_a_matrix_without_columns() -> None:
    source = Numbered([3])
    columns = Columns(np.empty((3, 0), np.float32), np.ones(3, np.float32), source.read(0).sparse)
    assert to_batch(columns, source.schema, 4).dense.shape == (4, 0)


def test_too_many_rows_are_refused() -> None:
    source = Numbered([3])
    with pytest.raises(AssertionError, match="3 rows"):
        to_batch(source.read(0), source.schema, 2)


def test_torchrec_pools_padding_rows_to_zero_and_accepts_the_types() -> None:
    source = Numbered([4])
    tables = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=f"t_{c}", embedding_dim=4, num_embeddings=100, feature_names=[c])
            for c in ("one", "many")
        ]
    )
    pooled = tables(to_batch(source.read(0), source.schema, 6).sparse)
    weight = tables.embedding_bags["t_many"].weight
    torch.testing.assert_close(pooled["many"][2], weight[20] + weight[21])
    assert pooled["one"][:4].count_nonzero()
    assert not pooled["one"][4:].count_nonzero()
    assert not pooled["many"][4:].count_nonzero()


def test_batch_moves_and_pickles_whole() -> None:
    source = Numbered([4])
    batch = to_batch(source.read(0), source.schema, 6)
    moved = batch.to(torch.device("meta"), non_blocking=True)
    for part in (moved.dense, moved.sparse.values(), moved.sparse.lengths(), moved.labels, moved.weights):
        assert part.device.type == "meta"
    assert rows_of(pickle.loads(pickle.dumps(batch))) == [0, 1, 2, 3]
    assert rows_of(batch.to(torch.device("cpu"))) == [0, 1, 2, 3]


def test_batch_does_not_keep_its_chunk_alive() -> None:
    source = Numbered([1000])
    batch = to_batch(source.read(0).slice(10, 20), source.schema, 10)
    assert batch.dense.untyped_storage().nbytes() == 10 * 2 * 4
    assert batch.sparse.values().untyped_storage().nbytes() == batch.sparse.values().numel() * 8
