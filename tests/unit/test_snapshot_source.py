"""Checkpoints as the exporter reads them: what a path means, what is refused, how much memory it takes."""

import dataclasses
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tightrec.formats import checkpoint_files as files
from tightrec.formats.schema import Schema, SparseColumn
from tightrec.models.config import ModelConfig
from tightrec.models.dlrm import DLRM, build_tables
from tightrec.snapshot.model import extra_keys, layer_specs
from tightrec.snapshot.source import open_checkpoint
from tightrec.trainer.checkpoint import CheckpointConfig, Checkpointer
from tightrec.trainer.handover import description
from tightrec.trainer.task import ClickTask

CPU = torch.device("cpu")
SMALL = {"embedding_dim": 4, "bottom_layers": (6,), "top_layers": (5,)}


def schema_of(dense: int, rows: Mapping[str, int]) -> Schema:
    sparse = tuple(SparseColumn(name=n, cardinality=r, multi_hot=r > 8) for n, r in rows.items())
    return Schema(dense=tuple(f"d{i}" for i in range(dense)), sparse=sparse, label="y", rows={}, source="")


class Saved(nn.Module):
    """Where the task stands in what the trainer saves."""

    def __init__(self, config: ModelConfig, schema: Schema) -> None:
        super().__init__()
        tables = build_tables([(c.name, c.cardinality) for c in schema.sparse], config, CPU)
        self.task = ClickTask(DLRM(tables, len(schema.dense), config, CPU))


def write(
    run: Path, step: int, data: str | None = None, dense: int = 3, without: str = "", **settings: Any
) -> ClickTask:
    """A checkpoint of a fresh model in the run folder ``run``, as the trainer writes them."""
    config = ModelConfig(**{**SMALL, **settings})
    schema = schema_of(dense, {"user": 9, "item": 7})
    torch.manual_seed(step)
    saved = Saved(config, schema)
    about = description(config, schema, data)
    about.pop(without, None)
    saver = Checkpointer(run / "checkpoints", CheckpointConfig())
    saver.save(step, {"model": saved.task}, {"step": step, **about}, wait=True)
    return saved.task


@pytest.mark.parametrize("dense", [3, 0])
@pytest.mark.parametrize("architecture", ["dlrm", "dcnv2"])
def test_every_tensor_and_what_the_checkpoint_says_of_itself_come_back(
    tmp_path: Path, architecture: Any, dense: int
) -> None:
    settings = {"architecture": architecture, "pooling": "mean", "dense_precision": "bf16"}
    task = write(tmp_path, 12, data="/some/folder", dense=dense, **settings)
    found = open_checkpoint(tmp_path)
    assert found.model == ModelConfig(**SMALL, **settings)
    wanted = schema_of(dense, {"user": 9, "item": 7})
    assert dataclasses.replace(found.schema, source="") == wanted
    assert (found.step, found.data) == (12, "/some/folder")
    state = task.model.state_dict()
    specs = layer_specs(found.model, dense)
    keys = [key for spec in specs for key in (spec.weight, spec.bias) if key] + [*extra_keys(dense).values()]
    for key in keys:
        assert torch.equal(found.parameter(key), state.pop(key)), key
    for name in ("t_user", "t_item"):
        key = f"sparse_arch.embedding_bag_collection.embedding_bags.{name}.weight"
        assert torch.equal(found.table(name), state.pop(key)), name
    assert not state, "the exporter knows every parameter"


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/step-00000020"])
def test_a_run_its_checkpoints_one_of_them_and_links_are_understood(tmp_path: Path, below: str) -> None:
    run = tmp_path / "run"
    for step in (9, 20):
        write(run, step)
    link = tmp_path / "latest"
    link.symlink_to("run" if not below else f"run/{below}")
    newest = run / "checkpoints" / "step-00000020"
    assert open_checkpoint(run / below).path == newest
    assert open_checkpoint(str(link)).path == newest
    assert open_checkpoint(newest.with_name("step-00000009")).step == 9


def test_the_newest_complete_one_is_taken_and_one_set_aside_when_named(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-00000003").rename(checkpoints / "step-00000003.abandoned")
    (checkpoints / "step-00000002" / files.MANIFEST).unlink()
    assert open_checkpoint(tmp_path).step == 1
    assert open_checkpoint(checkpoints / "step-00000003.abandoned").step == 3


def test_fingerprints_tell_checkpoints_apart(tmp_path: Path) -> None:
    for run, step in (("a", 1), ("b", 2)):
        write(tmp_path / run, step)
    prints = [open_checkpoint(tmp_path / run).fingerprint for run in ("a", "a", "b")]
    assert prints[0] == prints[1] != prints[2]
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in prints)


def test_neither_warning_nor_process_group(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_checkpoint(tmp_path).table("t_user")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_an_altered_byte_is_refused_by_file_before_anything_is_read(tmp_path: Path, name: str) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    newest = tmp_path / "checkpoints" / "step-00000002"
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 4
    (newest / name).write_bytes(content)
    with pytest.raises(files.DamagedCheckpoint, match=re.escape(f"{name} has checksum")) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.before == newest.with_name("step-00000001")


def test_only_damaged_ones_are_refused_by_file(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-00000001" / "__0_0.distcp").unlink()
    with pytest.raises(files.DamagedCheckpoint, match=re.escape("__0_0.distcp is missing")):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("below", "told"),
    [
        ("nowhere", "There is no folder .*nowhere. Give a run folder"),
        ("empty", "There is no complete checkpoint in .*empty"),
        ("run/checkpoints/step-00000007", "no checkpoint .*step-00000007.*newest complete one .*00000001"),
    ],
)
def test_what_is_no_checkpoint_is_told_in_words(tmp_path: Path, below: str, told: str) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "run", 1)
    with pytest.raises(ValueError, match=told):
        open_checkpoint(tmp_path / below)


@pytest.mark.parametrize("part", ["model", "schema", "data"])
def test_a_checkpoint_from_before_snapshots_is_refused_with_the_way_out(tmp_path: Path, part: str) -> None:
    write(tmp_path, 1, without=part)
    with pytest.raises(ValueError, match=f"resume={tmp_path} train.checkpoint.every_steps=0"):
        open_checkpoint(tmp_path)


def test_tables_of_another_shape_than_the_columns_are_refused(tmp_path: Path) -> None:
    config = ModelConfig(**SMALL)
    saved = Saved(config, schema_of(1, {"user": 9}))
    for step, rows in ((1, {"user": 8}), (2, {"user": 9, "item": 7})):
        about = description(config, schema_of(1, rows), None)
        saver = Checkpointer(tmp_path / "checkpoints", CheckpointConfig())
        saver.save(step, {"model": saved.task}, about, wait=True)
        told = {1: r"t_user of shape \(8, 4\), but holds \(9, 4\)", 2: r"t_item of shape .* holds none"}[step]
        with pytest.raises(ValueError, match=told):
            open_checkpoint(tmp_path)


def test_an_unknown_tensor_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, 1)
    found = open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"no tensor .*t_users.weight.*nearest name is .*t_user.weight"):
        found.table("t_users")
    with pytest.raises(ValueError, match=r"nearest name is over_arch.model.1.bias"):
        found.parameter("over_arch.model.1.bia")


def test_a_checkpoint_that_the_trainer_deletes_meanwhile_is_told_so(tmp_path: Path) -> None:
    write(tmp_path, 1)
    found = open_checkpoint(tmp_path)
    shutil.rmtree(found.path)
    with pytest.raises(ValueError, match=r"__0_0.distcp cannot be read .*train.checkpoint.keep"):
        found.table("t_user")


def test_rows_beside_the_checkpoints_are_found_after_the_run_has_moved(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    write(before, 1, data=str(before / "heldout"))
    schema = dataclasses.replace(schema_of(1, {"user": 9}), rows={"test": 1})
    before.rename(after)
    assert open_checkpoint(after).data == str(before / "heldout"), "there are none beside it"
    (after / "heldout").mkdir()
    schema.save(after / "heldout")
    assert open_checkpoint(after).data == str(after / "heldout")
    write(after, 2, data="/elsewhere/prepared")
    assert open_checkpoint(after).data == "/elsewhere/prepared"
    write(after, 3, data=None)
    assert open_checkpoint(after).data is None


MEMORY = """
import sys
from tightrec.snapshot.source import open_checkpoint

def most_bytes():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024

checkpoint = open_checkpoint(sys.argv[1])
before = most_bytes()
table = checkpoint.table("t_large")
print((most_bytes() - before) / (table.numel() * 4))
assert not {"torchrec", "fbgemm_gpu", "hydra"} & sys.modules.keys(), "libraries that reading does not need"
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_table_is_in_memory_once_while_it_is_read(tmp_path: Path) -> None:
    config, schema = ModelConfig(embedding_dim=64), schema_of(1, {"large": 400_000})
    saver = Checkpointer(tmp_path / "checkpoints", CheckpointConfig())
    about = description(config, schema, None)
    saver.save(1, {"model": Saved(config, schema).task}, about, wait=True)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # 102 MB; what else is read and allocated is a few MB.
    assert 0.9 < float(done.stdout) < 1.2
