"""Whole jobs on gloo ranks: every configuration runs, resumes, ends together and says why it stopped."""

import math
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from jobs import SMALL, job, losses, records, run_job, summary
from ranks import RankFailure, run_ranks

from tightrec.trainer import help_text

pytestmark = pytest.mark.multiprocess


def _jobs(rank: int, world: int, folder: str, all_words: list[list[str]]) -> list[str]:
    """Several jobs in the same processes, to save their start; what each ended with."""
    ended = []
    for number, words in enumerate(all_words):
        try:
            run_job(rank, world, [*SMALL, "train.steps=2", f"run_folder={folder}/{number}", *words])
            ended.append("ran")
        except ValueError as error:
            ended.append(str(error))
    return ended


def test_every_choice_of_every_group_runs_or_is_refused_by_name(tmp_path: Path):
    expected_refusals = {
        ("codec", "fp8"): "codec.forward=fp8",
        ("optimizer", "adam"): "optimizer.tables.name=adam",
        ("sharding", "grid_shard"): "cannot be grid_shard",
    }
    skipped = {"data", "experiment", "debug", "logging", "train"}
    choices = [(g, c) for g, cs in help_text.groups().items() if g not in skipped for c in cs]
    words = [[f"{group}={choice}", "model.embedding_dim=8"] for group, choice in choices]
    # The MLPerf shape is a wide network: its smaller twin runs in the same code.
    words = [[*w, "model.cross_rank=4", "model.bottom_layers=[8]", "model.top_layers=[8]"] for w in words]
    ended = run_ranks(2, _jobs, str(tmp_path), words, connect=False, timeout=280)
    assert ended[0] == ended[1]
    for choice, outcome in zip(choices, ended[0], strict=True):
        assert expected_refusals.get(choice, "ran") in outcome, (choice, outcome)


def test_pipelines_and_switches_give_the_same_losses(tmp_path: Path):
    words = ["train.steps=6", "schedule.warmup_steps=3", "optimizer.dense.clip_norm=0.1"]
    job(2, tmp_path / "a", *words, "train.pipeline=sparse_dist")
    job(2, tmp_path / "b", *words, "train.pipeline=plain")
    job(2, tmp_path / "c", *words, "data.loader.workers=1", "train.eval_every=2")
    assert len(losses(tmp_path / "a")) == 6
    assert losses(tmp_path / "a") == losses(tmp_path / "b") == losses(tmp_path / "c")
    for number, other in enumerate(
        ["model.dense_precision=bf16", "optimizer.dense.clip_norm=null", "schedule.warmup_steps=0"]
    ):
        job(2, tmp_path / str(number), *words, other)
        assert losses(tmp_path / str(number)) != losses(tmp_path / "a"), other


@pytest.mark.parametrize("codec", ["fp16", "int8", "mx4"])
def test_a_codec_changes_the_losses_a_little_and_the_bytes_a_lot(tmp_path: Path, codec: str):
    job(2, tmp_path / "plain", "train.steps=6")
    job(2, tmp_path / codec, "train.steps=6", f"codec={codec}")
    plain, other = losses(tmp_path / "plain"), losses(tmp_path / codec)
    assert other != plain
    assert other[6] == pytest.approx(plain[6], rel=0.05)
    # What goes to one rank is filled up to whole groups of 32 values.
    ratio = {"fp16": 2, "int8": 3.1, "mx4": 4}[codec]
    for direction in ("forward", "backward"):
        sent = [summary(tmp_path / name)["bytes_per_step"][direction] for name in ("plain", codec)]
        assert sent[0] / sent[1] >= ratio


def test_resume_on_the_same_ranks_is_bit_identical_mid_epoch_and_across_epochs(tmp_path: Path):
    # 640 rows on 2 ranks of 32: 10 steps an epoch.
    job(2, tmp_path / "whole", "train.epochs=2")
    for stop in (4, 10, 13):
        folder = tmp_path / f"cut{stop}"
        job(2, folder, "train.epochs=2", f"train.steps={stop}")
        job(2, folder, f"resume={folder}", "train.steps=null")
        assert losses(folder) == losses(tmp_path / "whole"), f"cut after step {stop}"
        assert summary(folder)["scores"] == summary(tmp_path / "whole")["scores"]


def test_resume_on_other_ranks_and_sharding_reads_the_rest_and_predicts_the_same(tmp_path: Path):
    job(2, tmp_path / "saved", "train.steps=5")
    (before,) = [r for r in records(tmp_path / "saved", "eval") if r["split"] == "test"]
    checkpoint = tmp_path / "saved" / "checkpoints" / "step-00000005"
    for world, sharding in [(1, "table_wise"), (4, "table_wise"), (2, "row_wise"), (2, "column_wise")]:
        # train.steps is already reached: only the evaluation is left.
        job(world, tmp_path, f"resume={checkpoint}", f"sharding={sharding}", "train.steps=5")
        after = [r for r in records(tmp_path / "saved", "eval") if r["split"] == "test"][-1]
        assert after["log_loss"] == pytest.approx(before["log_loss"], rel=1e-6), (world, sharding)
        assert after["auc"] == pytest.approx(before["auc"], abs=1e-9), (world, sharding)
    job(3, tmp_path, f"resume={checkpoint}", "train.steps=null")
    # 320 rows are left for 3 ranks: 4 steps.
    assert max(losses(tmp_path / "saved")) == 9
    assert sum(r["rows"] for r in records(tmp_path / "saved")) == 640


@pytest.mark.parametrize(("world", "rows", "batch", "steps"), [(2, 65, 32, 2), (3, 100, 16, 3), (3, 2, 4, 1)])
def test_ranks_with_unequal_or_no_rows_end_together(tmp_path: Path, world, rows, batch, steps):
    words = [f"data.synthetic.train_rows={rows}", f"data.loader.batch_size={batch}"]
    for sharding in ("table_wise", "row_wise"):
        folder = tmp_path / sharding
        job(world, folder, *words, "data.synthetic.test_rows=1", f"sharding={sharding}")
        assert len(losses(folder)) == steps
        assert sum(r["rows"] for r in records(folder)) == rows
        assert summary(folder)["scores"]["test"]["rows"] == 1


def _stopped(rank: int, world: int, words: list[str], folder: str, kind: str) -> int:
    """The job, with a SIGTERM to rank 1 once the run has written a record of this ``kind``."""

    def tell() -> None:
        while not (path.is_file() and f'"{kind}"' in path.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    path = Path(folder) / "metrics.jsonl"
    if rank == 1:
        threading.Thread(target=tell, daemon=True).start()
    return run_job(rank, world, words)


def test_sigterm_on_one_rank_saves_exits_0_and_resumes(tmp_path: Path):
    # Endless for the test's purposes; a rank gets its SIGTERM in the middle.
    words = [*SMALL, "train.epochs=100000", f"run_folder={tmp_path}"]
    assert run_ranks(2, _stopped, words, str(tmp_path), "train", connect=False) == [0, 0]
    run = summary(tmp_path)
    assert run["status"] == "stopped"
    step = max(losses(tmp_path))
    assert run["checkpoint"].endswith(f"step-{step:08d}")
    job(2, tmp_path, f"resume={tmp_path}", f"train.steps={step + 3}")
    assert max(losses(tmp_path)) == step + 3
    assert summary(tmp_path)["status"] == "finished"


def test_sigterm_during_an_evaluation_stops_too_and_the_evaluation_comes_after_the_resume(tmp_path: Path):
    # The first records are of training; the evaluation that follows is the long part.
    long = ["data.synthetic.valid_rows=3000000", "train.steps=2", "train.eval_every=1", "train.epochs=9"]
    words = [*SMALL, *long, f"run_folder={tmp_path}"]
    assert run_ranks(2, _stopped, words, str(tmp_path), "train", connect=False, timeout=60) == [0, 0]
    assert summary(tmp_path)["status"] == "stopped"
    assert records(tmp_path, "eval") == []
    job(2, tmp_path, f"resume={tmp_path}", "train.eval_steps=2", "train.test=false")
    assert [r["step"] for r in records(tmp_path, "eval")] == [1, 2]


def test_a_loss_that_is_not_a_number_stops_with_step_batch_and_last_checkpoint(tmp_path: Path):
    words = ["train.checkpoint.every_steps=1", "optimizer.dense.name=sgd", "optimizer.dense.lr=1e30"]
    with pytest.raises(RankFailure) as failure:
        job(2, tmp_path, *words)
    told = str(failure.value)
    assert "on rank" in told and "is not a finite number; batch of 32 rows" in told
    assert "There is no good checkpoint yet" in told, "the weights after step 1 made the bad loss of step 2"
    assert summary(tmp_path)["status"] == "failed"
    assert "step 2" in summary(tmp_path)["reason"]


def test_the_checkpoint_named_after_a_nan_is_one_that_goes_on(tmp_path: Path):
    sane = ["optimizer.dense.name=sgd", "optimizer.dense.lr=0.01", "train.checkpoint.every_steps=1"]
    job(2, tmp_path, *sane, "train.steps=6")
    with pytest.raises(RankFailure) as failure:
        job(2, tmp_path, f"resume={tmp_path}", "optimizer.dense.lr=1e26", *sane[2:], "train.steps=9")
    # Its weights are numbers still, but too large for the next forward.
    assert (tmp_path / "checkpoints" / "step-00000007").is_dir()
    named = re.search(r"resume=(\S+step-\d+)", str(failure.value))
    assert named, str(failure.value)
    job(2, tmp_path, f"resume={named[1]}", "optimizer.dense.lr=0.01", "train.steps=9")
    assert max(losses(tmp_path)) == 9
    assert all(math.isfinite(loss) for loss in losses(tmp_path).values())


def test_resume_auto_starts_and_then_goes_on(tmp_path: Path):
    words = [*SMALL, f"run_folder={tmp_path}", "resume=auto"]
    for steps in (2, 5):
        assert run_ranks(2, run_job, [*words, f"train.steps={steps}"], connect=False) == [0, 0]
        assert list(losses(tmp_path)) == list(range(1, steps + 1))


def test_a_damaged_checkpoint_is_refused_by_file_and_the_one_before_is_offered(tmp_path: Path):
    job(2, tmp_path, "train.steps=4", "train.checkpoint.every_steps=2")
    newest = tmp_path / "checkpoints" / "step-00000004"
    victim = next(newest.glob("__1_*"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    with pytest.raises(RankFailure) as failure:
        job(2, tmp_path, f"resume={tmp_path}", "train.steps=6")
    assert victim.name in str(failure.value) and "step-00000002" in str(failure.value)
    job(2, tmp_path, f"resume={tmp_path}/checkpoints/step-00000002", "train.steps=6")
    assert max(losses(tmp_path)) == 6


def test_a_run_leaves_what_the_readme_lists(tmp_path: Path):
    job(2, tmp_path, "train.steps=4", "logging.tensorboard=true", "logging.split_every=2")
    left = {path.name for path in tmp_path.iterdir()}
    assert {"report.html", "metrics.jsonl", "run.json", ".hydra", "checkpoints", "plan.json"} <= left
    assert any("tfevents" in path.name for path in tmp_path.rglob("*"))
    run = summary(tmp_path)
    assert 0.5 < run["bayes_auc"]["test"] < 1
    predicted = sum(row["forward_bytes"] for row in run["plan"])
    assert 0 < run["bytes_per_step"]["forward"] < predicted, "dedup sent no less"
    job(2, tmp_path / "all", "train.steps=4", "codec.dedup=false")
    sent = summary(tmp_path / "all")["bytes_per_step"]["forward"]
    assert sent == predicted, "predicted bytes are not those sent"
    assert not list(tmp_path.rglob("error-rank*"))


def test_a_dry_run_stops_before_the_first_step(tmp_path: Path):
    job(2, tmp_path, "debug=dry_run")
    assert not (tmp_path / "checkpoints").exists()
    assert records(tmp_path) == []
    assert summary(tmp_path)["plan"]


def test_a_used_folder_is_not_written_over(tmp_path: Path):
    job(2, tmp_path, "train.steps=1")
    with pytest.raises(RankFailure, match="already holds the checkpoint"):
        job(2, tmp_path, "train.steps=1")
