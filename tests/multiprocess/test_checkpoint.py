"""Checkpoints on gloo ranks: bit-identical resume, resharding, background saves, kills, refusals."""

import os
import random
import signal
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoint_job import Job, same_bits
from ranks import RankFailure, run_ranks

from tightrec.formats import checkpoint_files as files
from tightrec.trainer.checkpoint import CheckpointConfig, Checkpointer
from tightrec.trainer.checkpoint_state import _single_optimizers

pytestmark = pytest.mark.multiprocess
PAIRS = [("rowwise", "adagrad"), ("adagrad", "adam"), ("sgd", "sgd")]


def _checkpointer(folder: Path, **settings: Any) -> Checkpointer:
    return Checkpointer(folder, CheckpointConfig(**settings))


# ---- same ranks


def _resume(rank: int, world: int, folder: Path) -> list[Any]:
    found: list[Any] = []
    for number, (tables, dense) in enumerate(PAIRS):
        saver = _checkpointer(folder / tables)
        job = Job(rank, world, "trc", tables, dense)
        job.train(0, 5)
        saver.save(5, job.state, {"rows": 40})
        losses = job.train(5, 5)
        saver.close()
        again = Job(rank, world, "trc", tables, dense, seed=1 + number)
        extra = _checkpointer(folder / tables).load(files.path_of(folder / tables, 5), again.state)
        fused = [o for _, o in _single_optimizers(again.optimizer, "") if hasattr(o, "_emb_module")]
        counters = {int(optimizer._emb_module.iter) for optimizer in fused}
        same = losses == again.train(5, 5), same_bits(job.local(), again.local())
        found.append((extra, counters, *same))
    return found


def test_resume_on_the_same_ranks_is_bit_identical_for_every_optimizer(tmp_path: Path) -> None:
    for found in run_ranks(2, _resume, tmp_path):
        assert found == [({"rows": 40}, {5}, True, [])] * len(PAIRS)


# ---- no ranks


class _Counters:
    """A Stateful without a single tensor."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {"steps": [1, {"of": 2}], "name": "x"}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state


def _alone(rank: int, world: int, folder: Path) -> None:
    model, counters = torch.nn.Linear(3, 2), _Counters()
    saver = _checkpointer(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        saver.save(1, {"model": model, "counters": counters}, {})
        saver.close()
        again, counters.values = torch.nn.Linear(3, 2), {"steps": [], "name": ""}
        saver.load(files.path_of(folder, 1), {"model": again, "counters": counters})
    assert torch.equal(model.weight, again.weight)
    assert counters.values == _Counters().values
    with pytest.raises(ValueError, match="extra must hold JSON values only"):
        saver.save(2, {"model": model}, {"group": saver})


def test_one_process_without_a_group_saves_and_loads_tensors_and_other_values(tmp_path: Path) -> None:
    run_ranks(1, _alone, tmp_path, connect=False)


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"every_steps": -1}, {"timeout_s": 0.0}])
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"train.checkpoint.{next(iter(wrong))}="):
        CheckpointConfig(**wrong)


# ---- background saves


def _train_while_saving(rank: int, world: int, folder: Path) -> Any:
    job = Job(rank, world, "trc")
    job.train(0, 2)
    at_save = job.local()
    saver = _checkpointer(folder)
    go = threading.Event()
    save = torch.distributed.checkpoint.save

    def late(*args: Any, **kwargs: Any) -> Any:
        assert go.wait(20)
        return save(*args, **kwargs)

    with mock.patch("torch.distributed.checkpoint.save", late):
        saver.save(2, job.state, {})
        job.train(2, 3)
        running = files.find_checkpoints(folder)
        go.set()
        saver.wait()
    moved = same_bits(at_save, job.local())
    saver.load(files.path_of(folder, 2), job.state)
    return running, len(moved) > 0, same_bits(at_save, job.local())


def test_background_save_holds_the_state_of_its_moment_whatever_training_does_meanwhile(
    tmp_path: Path,
) -> None:
    assert run_ranks(2, _train_while_saving, tmp_path) == [([], True, [])] * 2


def _fail_once(rank: int, world: int, folder: Path) -> list[str]:
    job = Job(rank, world, "t")
    saver = _checkpointer(folder)
    saver.save(1, job.state, {}, wait=True)
    told = []
    broken = OSError(28, "No space left on device")
    full = mock.patch("torch.distributed.checkpoint.FileSystemWriter.write_data", side_effect=broken)
    with full if rank == 1 else nullcontext():
        saver.save(2, job.state, {})
        with pytest.raises(RuntimeError) as caught:
            saver.save(3, job.state, {})
        told.append(str(caught.value))
    saver.save(4, job.state, {})
    saver.close()
    with mock.patch.object(files, "record_of", side_effect=OSError(5, "Input/output error")):
        saver.save(5, job.state, {})
        with pytest.raises(RuntimeError) as caught:
            saver.close()
        told.append(str(caught.value))
    saver.close()
    return told


def test_failure_in_the_background_is_told_once_on_all_ranks_at_the_next_call(tmp_path: Path) -> None:
    first, second = run_ranks(2, _fail_once, tmp_path)
    assert first == second
    assert "step 2" in first[0]
    assert "rank 1: OSError: [Errno 28] No space left" in first[0]
    assert f"newest complete one is {files.path_of(tmp_path, 1)}" in first[0]
    assert "rank 0: OSError: [Errno 5]" in first[1]
    assert "rank 1: OSError: [Errno 5]" in first[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000004"]


def _save_many(rank: int, world: int, folder: Path) -> None:
    job = Job(rank, world, "t")
    (folder / "step-00000009.partial").mkdir(parents=True, exist_ok=True)
    saver = _checkpointer(folder, keep=2, every_steps=2)
    assert [step for step in range(1, 7) if saver.due(step)] == [2, 4, 6]
    for step in (1, 2, 3, 4, 4):
        saver.save(step, job.state, {"step": step})
    saver.close()


def test_last_k_are_kept_and_stale_partial_ones_removed(tmp_path: Path) -> None:
    run_ranks(2, _save_many, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    manifest = files.verify(files.path_of(tmp_path, 4))
    assert (manifest.world, manifest.step, manifest.extra) == (2, 4, {"step": 4})


# ---- kills


def _save_until_killed(rank: int, world: int, folder: Path, delay_ms: float, victim: int) -> None:
    job = Job(rank, world, "trc")
    saver = _checkpointer(folder, keep=2)
    saver.save(1, job.state, {}, wait=True)
    if rank == victim:
        threading.Timer(delay_ms / 1e3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    for step in range(2, 10_000):
        job.step(step)
        saver.save(step, job.state, {})


def _load_newest(rank: int, world: int, folder: Path) -> int:
    newest = files.latest_complete(folder)
    assert newest is not None
    job = Job(rank, world, "r")
    saver = _checkpointer(folder)
    saver.load(newest, job.state)
    assert rank > 0 or all(path.suffix == "" for path in folder.iterdir())
    saver.save(20_000, job.state, {}, wait=True)
    return files.step_of(newest)


def test_after_sigkill_at_a_random_moment_the_last_complete_one_loads(tmp_path: Path) -> None:
    moments = random.Random(4)
    reached = []
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        # Later and later, so that a busy machine has saved something more by the last one.
        delay_ms = moments.uniform(5, 300) * 4**attempt
        with pytest.raises(RankFailure, match="exit code -9"):
            run_ranks(2, _save_until_killed, folder, delay_ms, attempt % 2)
        for path in files.find_checkpoints(folder):
            files.verify(path)
        reached.append(run_ranks(2, _load_newest, folder)[0])
    assert max(reached) > 1, reached


# ---- refusals


def _load_damaged(rank: int, world: int, folder: Path) -> tuple[str, Path | None]:
    job = Job(rank, world, "u")
    before = job.local()
    with pytest.raises(files.DamagedCheckpoint) as caught:
        _checkpointer(folder).load(files.find_checkpoints(folder)[-1], job.state)
    assert same_bits(before, job.local()) == []
    assert caught.value.before is not None
    _checkpointer(folder).load(caught.value.before, job.state)
    return str(caught.value), caught.value.before


def test_damaged_checkpoint_is_refused_by_file_on_all_ranks_and_the_one_before_loads(tmp_path: Path) -> None:
    run_ranks(2, _save_many, tmp_path)
    newest, before = files.path_of(tmp_path, 4), files.path_of(tmp_path, 3)
    file = newest / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for text, offered in run_ranks(2, _load_damaged, tmp_path):
        assert f"{newest} is damaged: __1_0.distcp has checksum" in text
        assert str(before) in text
        assert offered == before


def _local_state(rank: int, world: int, folder: Path) -> None:
    job = Job(rank, world, "r", kernel="dense")
    with pytest.raises(ValueError, match=r"bags\.a\.weight is sharded but .* compute_kernel='fused'"):
        _checkpointer(folder).save(1, job.state, {})


def test_sharded_table_with_a_dense_optimizer_is_refused_at_save(tmp_path: Path) -> None:
    run_ranks(2, _local_state, tmp_path)
