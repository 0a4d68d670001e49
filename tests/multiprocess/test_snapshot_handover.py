"""What a job hands over: checkpoints that say what they are, held-out rows, the link to the newest run."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from jobs import SMALL, job, records, run_job, summary
from ranks import run_ranks
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from tightrec.formats import checkpoint_files as files
from tightrec.formats.columns import Columns
from tightrec.formats.schema import Schema, SparseColumn, load_schema
from tightrec.snapshot.rows import feature_major, read_rows
from tightrec.snapshot.source import open_checkpoint
from tightrec.trainer import handover
from tightrec.trainer import job as job_module
from tightrec.trainer.checkpoint import Checkpointer
from tightrec.trainer.checkpoint_state import leaves_of
from tightrec.trainer.config import load
from tightrec.trainer.data.synthetic import SyntheticSource

pytestmark = pytest.mark.multiprocess

TWO = "t_C1: row_wise, t_C2: column_wise, t_C3: data_parallel, t_C4: table_row_wise, t_C20: row_wise"
FOUR = f"{TWO}, t_C5: grid_shard"
BF16 = ["model=dcnv2", "model.dense_precision=bf16", "model.cross_rank=4", "model.cross_layers=2"]
# torchrec's grid cuts columns in blocks of 128.
WIDE = ["model.embedding_dim=256", "model.pooling=mean", "data.synthetic.multi_hot=3", "train.steps=4"]

Piece = tuple[tuple[int, ...], Tensor]


def _held(rank: int, world: int, words: list[str], local_world: int) -> dict[str, list[Piece]]:
    """Run a job; returns the pieces of the model that this rank held when it saved, by name."""
    # torchrec tells nodes apart by it.
    os.environ["LOCAL_WORLD_SIZE"] = str(local_world)
    held: dict[str, list[Piece]] = {}
    save = Checkpointer.save

    def watched(self: Checkpointer, step: int, state: Any, *args: Any, **kwargs: Any) -> None:
        for name, leaf in leaves_of({"model": state["model"].state_dict()}).items():
            value = leaf.value
            if isinstance(value, ShardedTensor):
                shards = value.local_shards()
                held[name] = [(tuple(s.metadata.shard_offsets), s.tensor.clone()) for s in shards]
            else:
                held[name] = [((0,) * value.dim(), value.detach().clone())]
        save(self, step, state, *args, **kwargs)

    with mock.patch.object(Checkpointer, "save", watched):
        run_job(rank, world, words)
    return held


def _whole(pieces: list[Piece]) -> Tensor:
    """The pieces of all ranks put together."""
    shape = [max(at[d] + part.shape[d] for at, part in pieces) for d in range(pieces[0][1].dim())]
    whole = torch.full(shape, torch.nan)
    for at, part in pieces:
        whole[tuple(slice(a, a + n) for a, n in zip(at, part.shape, strict=True))] = part
    return whole


@pytest.mark.parametrize(
    ("world", "local_world", "tables", "words"),
    [(2, 2, TWO, []), (2, 2, TWO, BF16), (4, 2, FOUR, WIDE)],
)
def test_tables_and_layers_are_read_bit_by_bit_as_the_ranks_held_them(
    tmp_path: Path, world: int, local_world: int, tables: str, words: list[str]
) -> None:
    given = [*SMALL, *words, f"sharding.tables={{{tables}}}", f"run_folder={tmp_path}"]
    ranks = run_ranks(world, _held, given, local_world, connect=False, timeout=120)
    found = open_checkpoint(tmp_path)
    config, _ = load(given)
    assert found.model == config.model
    source = SyntheticSource(config.data.synthetic, "train").schema
    assert (found.schema.dense, found.schema.sparse) == (source.dense, source.sparse)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert {row["table"]: row["type"] for row in plan}.items() >= _types(tables).items()
    names = sorted({name for held in ranks for name in held})
    assert len(names) > 26 + 4
    for name in names:
        pieces = [piece for held in ranks for piece in held.get(name, [])]
        key = name.removeprefix("model.model.")
        table = key.removesuffix(".weight").rpartition(".")[2]
        read = found.table(table) if ".embedding_bags." in key else found.parameter(key)
        assert read.dtype == torch.float32
        assert torch.equal(read, _whole(pieces)), name


def _types(tables: str) -> dict[str, str]:
    return dict(pair.split(": ") for pair in tables.split(", "))


def test_a_synthetic_jobs_held_out_rows_are_those_it_was_evaluated_on(tmp_path: Path) -> None:
    words = ["data.synthetic.multi_hot=2", "train.steps=2"]
    assert job(2, tmp_path, *words) == [0, 0]
    found = open_checkpoint(tmp_path)
    assert found.data == str(tmp_path / "heldout")
    assert not list(tmp_path.glob("*.partial"))
    config, _ = load([*SMALL, *words])
    for split, count in (("valid", 100), ("test", 90)):
        source = SyntheticSource(config.data.synthetic, split)
        wanted = Columns.concat([source.read(group) for group in range(len(source.row_counts))])
        rows = read_rows(found.data, split, None, found.schema)
        assert len(rows) == count
        pairs = zip(feature_major(rows), feature_major(wanted), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_job_without_held_out_rows_says_so_and_one_that_cannot_write_them_goes_on(tmp_path: Path) -> None:
    none = ["data.synthetic.valid_rows=0", "data.synthetic.test_rows=0", "train.steps=1"]
    assert job(1, tmp_path / "none", *none) == [0]
    assert open_checkpoint(tmp_path / "none").data is None
    assert not (tmp_path / "none" / "heldout").exists()
    full = tmp_path / "full"
    full.mkdir()
    (full / "heldout.partial").write_text("a file where a folder belongs")
    assert job(2, full, "train.steps=1") == [0, 0]
    assert open_checkpoint(full).data is None
    (told,) = [r["text"] for r in records(full, "warning") if "held-out rows" in r["text"]]
    assert "checkpoints name none" in told


def test_a_run_from_before_snapshots_goes_on_and_then_describes_itself(tmp_path: Path) -> None:
    assert job(1, tmp_path, "train.checkpoint.every_steps=20") == [0]
    checkpoints = tmp_path / "checkpoints"
    manifest = files.read_manifest(files.path_of(checkpoints, 20))
    for part in ("model", "schema", "data"):
        del manifest.extra[part]
    files.path_of(checkpoints, 20).rename(files.partial_of(checkpoints, 20))
    files.publish(checkpoints, manifest)
    with pytest.raises(ValueError, match="resume=") as caught:
        open_checkpoint(tmp_path)
    advice = [word.strip(",.") for word in str(caught.value).split() if "=" in word]
    assert job(1, tmp_path, *advice, small=False) == [0]
    assert open_checkpoint(tmp_path).step == 20


# ---- without ranks


def _sources(rows: int, group: int = 64, **settings: Any) -> dict[str, SyntheticSource]:
    words = [f"data.synthetic.{split}_rows={rows}" for split in ("valid", "test")]
    words += [f"data.synthetic.{name}={value}" for name, value in settings.items()]
    config, _ = load([*SMALL, *words, f"data.synthetic.row_group_rows={group}"])
    return {s: SyntheticSource(config.data.synthetic, s) for s in ("train", "valid", "test")}


def test_held_out_rows_are_the_first_ones_up_to_a_limit(tmp_path: Path) -> None:
    with mock.patch.object(handover, "HELD_OUT_ROWS", 150):
        folder = handover.held_out(_sources(400), None, tmp_path)
    assert folder is not None
    first = _sources(400)["test"].read(0)
    rows = read_rows(folder, "test", None)
    assert len(rows) == 150
    assert np.array_equal(rows.dense[:64], first.dense)
    assert not (Path(folder) / "train").exists()


def test_held_out_rows_are_written_once_and_anew_only_for_other_data(tmp_path: Path) -> None:
    def written() -> list[int]:
        handover.held_out(_sources(80, seed=seed), None, tmp_path)
        return sorted(path.stat().st_ino for path in tmp_path.rglob("*.parquet"))

    seed = 1
    once = written()
    assert written() == once
    seed = 2
    rows = read_rows(tmp_path / "heldout", "valid", None)
    assert written() != once
    assert not np.array_equal(read_rows(tmp_path / "heldout", "valid", None).dense, rows.dense)
    # Killed between the two renames, or damaged.
    (tmp_path / "heldout" / "schema.json").write_text("{")
    written()
    assert len(read_rows(tmp_path / "heldout", "valid", None)) == 80


def test_prepared_data_is_named_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sources = _sources(10)
    assert handover.held_out(sources, "data/some", tmp_path) == str(tmp_path / "data" / "some")
    del sources["valid"], sources["test"]
    assert handover.held_out(sources, "data/some", tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_description_is_json_and_holds_columns_without_rows() -> None:
    schema = Schema(
        dense=("a",),
        sparse=(SparseColumn(name="b", cardinality=3, multi_hot=True),),
        label="y",
        rows={"train": 5},
        source="",
    )
    config, _ = load(["model=dcnv2"])
    said = handover.description(config.model, schema, None)
    assert said["schema"] == {
        "dense": ["a"],
        "sparse": [{"name": "b", "cardinality": 3, "multi_hot": True}],
        "label": "y",
    }
    assert (said["model"]["architecture"], said["data"]) == ("dcnv2", None)


def test_latest_moves_to_each_run_below_runs_and_to_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    handover.point_latest(outside)
    assert not (tmp_path / "runs").exists()
    for name in ("train/one", "other/two"):
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        handover.point_latest(folder)
        assert os.readlink("runs/latest") == name
        handover.point_latest(outside)
        assert Path("runs/latest").resolve() == folder.resolve()
    handover.point_latest(Path("runs/latest"))
    assert os.readlink("runs/latest") == "other/two", "resume=runs/latest"
    assert sorted(path.name for path in Path("runs").iterdir()) == ["latest", "other", "train"]


def test_a_folder_in_the_links_place_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/latest/mine", "runs/train/one"):
        Path(folder).mkdir(parents=True)
    with pytest.raises(OSError, match="latest"):
        handover.point_latest(Path("runs/train/one"))
    assert Path("runs/latest/mine").is_dir()
    assert sorted(path.name for path in Path("runs").iterdir()) == ["latest", "train"]


def _job_in(rank: int, world: int, working: Path, words: list[str]) -> int:
    os.chdir(working)
    return run_job(rank, world, words)


def test_a_job_links_its_run_folder_and_ends_well_where_it_cannot(tmp_path: Path) -> None:
    words = [*SMALL, "train.steps=1"]
    run_ranks(1, _job_in, tmp_path, [*words, "debug.dry_run=true"], connect=False, timeout=120)
    assert not (tmp_path / "runs" / "latest").is_symlink(), "a dry run trains nothing"
    assert run_ranks(1, _job_in, tmp_path, words, connect=False, timeout=120) == [0]
    assert open_checkpoint(tmp_path / "runs" / "latest").step == 1
    blocked = tmp_path / "blocked"
    (blocked / "runs" / "latest" / "mine").mkdir(parents=True)
    assert run_ranks(1, _job_in, blocked, words, connect=False, timeout=120) == [0]
    (run,) = (blocked / "runs" / "train").iterdir()
    assert any("runs/latest could not be made" in record["text"] for record in records(run, "warning"))


# ---- the run folder, for a caller


def _handed(rank: int, world: int, working: Path, file: str, words: list[str]) -> int:
    os.environ["TIGHTREC_HANDOVER"] = file
    return _job_in(rank, world, working, words)


def _train(working: Path, file: Path | str, *words: str, world: int = 1, job: Any = _handed) -> list[int]:
    working.mkdir(exist_ok=True)
    given = [*SMALL, "train.steps=1", *words]
    return run_ranks(world, job, working, str(file), given, connect=False, timeout=120)


def test_a_finished_job_hands_its_run_folder_over_wherever_it_lies(tmp_path: Path) -> None:
    file, working = tmp_path / "file", tmp_path / "working"
    assert _train(working, file, world=2) == [0, 0]
    (run,) = (working / "runs" / "train").iterdir()
    assert file.read_text() == str(run)
    assert _train(working, file, "run_folder=../outside") == [0]
    assert file.read_text() == str(tmp_path / "outside")
    file.unlink()
    assert _train(working, file, "debug.dry_run=true") == [0]
    assert _train(working, "") == [0]
    assert not file.exists()
    with pytest.raises(Exception, match=r"TIGHTREC_HANDOVER=.*/gone/file cannot be written .*lies in runs/"):
        _train(working, tmp_path / "gone" / "file")


def _stopped(rank: int, world: int, working: Path, file: str, words: list[str]) -> int:
    """A job that is asked to end by a signal after its first step."""
    after = Checkpointer.save

    def stop(*args: Any, **kwargs: Any) -> None:
        after(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(Checkpointer, "save", stop):
        return _handed(
            rank, world, working, file, [*words, "train.checkpoint.every_steps=1", "train.steps=9"]
        )


def test_a_stopped_job_hands_nothing_over(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _train(tmp_path / "working", tmp_path / "file", f"run_folder={run}", job=_stopped) == [0]
    assert summary(run)["status"] == "stopped"
    assert not (tmp_path / "file").exists()


def _overtaken(rank: int, world: int, working: Path, file: str, words: list[str]) -> int:
    """A job while which another one starts, so that runs/latest moves there."""
    build = job_module.build_task

    def begin(*args: Any) -> Any:
        point_latest(Path("runs/other"))
        return build(*args)

    point_latest = handover.point_latest
    with mock.patch.object(job_module, "build_task", begin), mock.patch.object(job_module, "point_latest"):
        return _handed(rank, world, working, file, words)


def test_a_job_resumed_by_a_link_stays_with_its_run_when_the_link_moves(tmp_path: Path) -> None:
    runs, file = tmp_path / "runs", tmp_path / "file"
    (runs / "other").mkdir(parents=True)
    assert _train(tmp_path, file, "run_folder=runs/mine") == [0]
    for step, given in ((2, "runs/latest"), (3, "runs/latest/checkpoints/step-00000002")):
        assert _train(
            tmp_path, file, "run_folder=null", f"resume={given}", f"train.steps={step}", job=_overtaken
        ) == [0]
        assert open_checkpoint(runs / "mine").step == step
        assert file.read_text() == str(runs / "mine")
        assert list((runs / "other").iterdir()) == []
        (runs / "latest").unlink()
        (runs / "latest").symlink_to("mine")


def test_a_caller_takes_the_folder_over_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    for name in ("", str(file)):
        monkeypatch.setenv("TIGHTREC_HANDOVER", name)
        assert handover.take_over() is None
    handover.hand_over(tmp_path / "run")
    assert handover.take_over() == tmp_path / "run"
    assert list(tmp_path.iterdir()) == []
    assert handover.take_over() is None
    monkeypatch.delenv("TIGHTREC_HANDOVER")
    handover.hand_over(tmp_path / "run")
    assert handover.take_over() is None


def test_a_split_without_rows_is_none(tmp_path: Path) -> None:
    folder = handover.held_out(_sources(80), None, tmp_path)
    assert folder is not None
    files.make_partial(tmp_path / "checkpoints", 1)
    files.publish(tmp_path / "checkpoints", files.Manifest(step=1, world=1, files={}, extra={"data": folder}))
    assert handover.lacking(tmp_path) is None
    schema = load_schema(Path(folder))
    dataclasses.replace(schema, rows={**schema.rows, "test": 0}).save(Path(folder))
    assert handover.lacking(tmp_path) == "rows of the split test"
