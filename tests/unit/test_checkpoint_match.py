"""Which leaves of a checkpoint fit a job, which are converted, and the words for those that do not."""

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata

from tightrec.trainer.checkpoint_match import (
    Conversion,
    Shapes,
    convert,
    mismatches,
    plan_conversions,
    stored_shapes,
)

WEIGHT = "model.ebc.embedding_bags.t.weight"
STATE = "optimizer.state.ebc.embedding_bags.t.weight."
ROWS, DIM = 6, 8


def _metadata(shapes: Shapes, columns: tuple[int, ...] = (DIM,)) -> Metadata:
    entries = {}
    for name, shape in shapes.items():
        assert shape is not None
        chunks = [ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))]
        if name == WEIGHT:
            starts = [sum(columns[:i]) for i in range(len(columns))]
            chunks = [
                ChunkStorageMetadata(torch.Size([0, start]), torch.Size([shape[0], width]))
                for start, width in zip(starts, columns, strict=True)
            ]
        entries[name] = TensorStorageMetadata(torch.empty(0), torch.Size(shape), chunks)  # type: ignore[arg-type]
    return Metadata(state_dict_metadata=entries)


def _told(stored: Shapes, wanted: Shapes, columns: tuple[int, ...] = (DIM,)) -> tuple[set[str], list[str]]:
    metadata = _metadata(stored, columns)
    conversions = plan_conversions(metadata, wanted)
    return set(conversions), mismatches(stored_shapes(metadata), wanted, conversions)


def test_equal_shapes_need_nothing() -> None:
    shapes = {WEIGHT: (ROWS, DIM), STATE + "t.momentum1": (ROWS,), "model.bias": ()}
    assert _told(shapes, shapes) == (set(), [])


@pytest.mark.parametrize(("stored", "wanted"), [(2 * ROWS, ROWS), (ROWS, 2 * ROWS), (2 * ROWS, 4 * ROWS)])
def test_rowwise_state_of_other_column_shards_is_converted(stored: int, wanted: int) -> None:
    key = STATE + "t.momentum1"
    columns = (DIM // (stored // ROWS),) * (stored // ROWS)
    one, other = {WEIGHT: (ROWS, DIM), key: (stored,)}, {WEIGHT: (ROWS, DIM), key: (wanted,)}
    assert _told(one, other, columns) == ({key}, [])


def test_rowwise_state_that_does_not_follow_its_column_shards_is_refused() -> None:
    key = STATE + "t.momentum1"
    one, other = {WEIGHT: (ROWS, DIM), key: (3 * ROWS,)}, {WEIGHT: (ROWS, DIM), key: (ROWS,)}
    converted, told = _told(one, other, (4, 4))
    assert not converted
    assert told == ["optimizer state 'momentum1' of table 't' is 18 in the checkpoint and 6 in this job"]


def test_dense_adagrad_and_fused_adagrad_convert_both_ways_but_adam_does_not() -> None:
    table = {WEIGHT: (ROWS, DIM)}
    fused = {**table, STATE + "t.momentum1": (ROWS,)}
    dense = {**table, STATE + "sum": (ROWS, DIM), STATE + "step": ()}
    adam = {**table, STATE + "exp_avg": (ROWS, DIM), STATE + "exp_avg_sq": (ROWS, DIM), STATE + "step": ()}
    assert _told(fused, dense) == ({STATE + "sum", STATE + "step"}, [])
    assert _told(dense, fused) == ({STATE + "t.momentum1"}, [])
    converted, told = _told(adam, fused)
    assert not converted
    assert "optimizer state 'exp_avg' of table 't' (6 x 8) is in the checkpoint but not in this job" in told
    assert "optimizer state 'momentum1' of table 't' (6) is not in the checkpoint" in told


def test_a_table_that_differs_is_told_once_without_its_optimizer_state_and_long_lists_are_cut() -> None:
    key = STATE + "t.momentum1"
    one, other = {WEIGHT: (ROWS, DIM), key: (ROWS,)}, {WEIGHT: (7, DIM), key: (7,)}
    assert _told(one, other)[1] == ["table 't' is 6 x 8 in the checkpoint and 7 x 8 in this job"]
    many = {f"model.x{i}": (1,) for i in range(20)}
    told = mismatches({}, many, {})
    assert (len(told), told[-1]) == (9, "and 12 more")


def test_values_from_uneven_column_shards_repeat_each_row_over_its_columns() -> None:
    conversion = Conversion(source="s", weight="w", rows=2, columns=[(0, 3), (3, 4)])
    target = torch.zeros(2, 4)
    convert(torch.tensor([1.0, 2.0, 10.0, 20.0]), target, None, conversion)
    assert target.tolist() == [[1, 1, 1, 10], [2, 2, 2, 20]]
