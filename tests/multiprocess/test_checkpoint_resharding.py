"""Checkpoints loaded on other ranks, under other sharding, into other optimizers or models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_job import DIM, ROWS, Job, predictions_of, same_bits, unsharded
from ranks import run_ranks

from tightrec.formats import checkpoint_files as files
from tightrec.trainer.checkpoint import CheckpointConfig, Checkpointer, load_checkpoint

pytestmark = pytest.mark.multiprocess


def _checkpointer(folder: Path) -> Checkpointer:
    return Checkpointer(folder, CheckpointConfig())


def _close(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and all(abs(a - b) <= 1e-6 for a, b in zip(one, other, strict=True))


def _save(rank: int, world: int, folder: Path, sharding: str, tables: str = "rowwise", dim: int = DIM) -> Any:
    job = Job(rank, world, sharding, tables, dim=dim)
    job.train(0, 3)
    saver = _checkpointer(folder)
    saver.save(3, job.state, {}, wait=True)
    before, state = job.predict(), job.local()
    job.step(3)
    return before, job.predict(), state


def _load(
    rank: int, world: int, folder: Path, shardings: list[str], tables: str = "rowwise", dim: int = DIM
) -> list[Any]:
    found = []
    for sharding in shardings:
        job = Job(rank, world, sharding, tables, dim=dim, seed=5)
        _checkpointer(folder).load(files.path_of(folder, 3), job.state)
        before, state = job.predict(), job.local()
        job.step(3)
        found.append((before, job.predict(), state))
    return found


@pytest.mark.parametrize(
    ("saved", "loaded", "tables"),
    [
        ((2, "tur"), (1, ["t"]), "rowwise"),
        ((1, "t"), (2, ["r", "tur"]), "rowwise"),
        ((2, "tru"), (4, ["r", "u", "urt"]), "rowwise"),
        ((2, "t"), (2, ["r"]), "adagrad"),
        ((2, "r"), (2, ["t", "c"]), "adagrad"),
        ((2, "c"), (2, ["u"]), "adagrad"),
        ((2, "c"), (1, ["t"]), "sgd"),
    ],
)
def test_predictions_and_the_next_step_survive_resharding(
    tmp_path: Path, saved: tuple[int, str], loaded: tuple[int, list[str]], tables: str
) -> None:
    before, after, _ = run_ranks(saved[0], _save, tmp_path, saved[1], tables)[0]
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 1e-3, "a step must be visible"
    for found in run_ranks(loaded[0], _load, tmp_path, loaded[1], tables):
        for sharding, (again, next_step, _) in zip(loaded[1], found, strict=True):
            assert _close(before, again), sharding
            assert _close(after, next_step), sharding


def _accumulator(ranks: list[Any], table: str, key: str) -> torch.Tensor:
    """A table's whole accumulator, from the shards of all ranks."""
    shards = {n: t for _, _, state in ranks for n, t in state.items() if f".{table}.weight.{key}" in n}
    return torch.cat([shards[name] for name in sorted(shards, key=lambda n: (len(n), n))])


def test_rowwise_state_is_averaged_over_merged_column_shards_and_repeated_for_split_ones(
    tmp_path: Path,
) -> None:
    saved = run_ranks(2, _save, tmp_path, "c")
    merged = [(*one[0],) for one in run_ranks(2, _load, tmp_path, ["t"])]
    dense = [(*one[0],) for one in run_ranks(1, _load, tmp_path, ["d"])]
    for table, rows in ROWS.items():
        halves = _accumulator(saved, table, f"{table}.momentum1").view(2, rows)
        assert halves.any()
        torch.testing.assert_close(_accumulator(merged, table, f"{table}.momentum1"), halves.mean(0))
        wide = halves.repeat_interleave(DIM // 2, 0).T
        torch.testing.assert_close(_accumulator(dense, table, "sum"), wide, rtol=0, atol=0)
    assert _close(saved[0][0], merged[0][0])
    assert _close(saved[0][0], dense[0][0])


def test_grid_shards_merge_like_column_shards(tmp_path: Path) -> None:
    saved = run_ranks(4, _save, tmp_path, "g", "rowwise", 256)
    loaded = [(*one[0],) for one in run_ranks(2, _load, tmp_path, ["r"], "rowwise", 256)]
    assert _close(saved[0][0], loaded[0][0])
    for table, rows in ROWS.items():
        halves = _accumulator(saved, table, f"{table}.momentum1").view(2, rows)
        torch.testing.assert_close(_accumulator(loaded, table, f"{table}.momentum1"), halves.mean(0))


def test_state_of_tables_that_become_or_were_data_parallel_is_converted(tmp_path: Path) -> None:
    saved = run_ranks(2, _save, tmp_path, "dtt")
    loaded = [(*one[0],) for one in run_ranks(2, _load, tmp_path, ["tdc"])]
    assert _close(saved[0][0], loaded[0][0])
    bags = "optimizer.state.sparse_arch.embedding_bag_collection.embedding_bags"
    values = saved[0][2][f"{bags}.a.weight.sum"]
    torch.testing.assert_close(_accumulator(loaded, "a", "a.momentum1"), values.mean(1))
    per_row = _accumulator(saved, "b", "b.momentum1")
    torch.testing.assert_close(_accumulator(loaded[:1], "b", "sum"), per_row[:, None].expand(-1, DIM))
    assert loaded[0][2][f"{bags}.b.weight.step"] == 3
    torch.testing.assert_close(
        _accumulator(loaded, "c", "c.momentum1"), _accumulator(saved, "c", "c.momentum1").repeat(2)
    )


def _load_alone(rank: int, world: int, path: Path) -> list[float]:
    model = unsharded()
    load_checkpoint(path, {"model": model})
    return predictions_of(model)


def test_unsharded_model_without_process_group_predicts_the_same(tmp_path: Path) -> None:
    before, _, _ = run_ranks(2, _save, tmp_path, "trc")[0]
    assert _close(before, run_ranks(1, _load_alone, files.path_of(tmp_path, 3), connect=False)[0])


def _refused(rank: int, world: int, folder: Path, jobs: list[dict[str, Any]]) -> list[str]:
    texts = []
    for settings in jobs:
        job = Job(rank, world, **{"sharding": "u", **settings})
        before = job.local()
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            _checkpointer(folder).load(files.path_of(folder, 3), job.state)
        assert same_bits(before, job.local()) == []
        texts.append(str(caught.value))
    return texts


def test_another_model_or_optimizer_is_refused_by_table_with_both_shapes_before_loading(
    tmp_path: Path,
) -> None:
    run_ranks(2, _save, tmp_path, "tru")
    jobs: list[dict[str, Any]] = [
        {"rows": {**ROWS, "b": 11}},
        {"dim": 16},
        {"rows": {"a": 12, "b": 10}},
        {"rows": {**ROWS, "new": 4}},
        {"tables": "adagrad"},
        {"tables": "sgd"},
        {"dense": "sgd", "sharding": "d"},
    ]
    first, second = run_ranks(2, _refused, tmp_path, jobs)
    assert first == second
    expected = [
        ["table 'b' is 10 x 8 in the checkpoint and 11 x 8 in this job"],
        [f"table '{name}' is {rows} x 8 in the checkpoint and {rows} x 16 in" for name, rows in ROWS.items()],
        ["table 'c' (15 x 8) is in the checkpoint but not in this job"],
        ["table 'new' (4 x 8) is not in the checkpoint"],
        ["optimizer state 'momentum1' of table 'a' is 12 in the checkpoint and 12 x 8 in this job"],
        ["optimizer state 'momentum1' of table 'a' (12) is in the checkpoint but not in this job"],
        ["optimizer state 'momentum1' of table 'a' (12) is in the checkpoint but not in this job"],
    ]
    for text, parts in zip(first, expected, strict=True):
        assert str(files.path_of(tmp_path, 3)) in text
        for part in parts:
            assert part in text
