"""The watcher in trouble: what does not verify, damage, a full disk, restarts, and a second watcher."""

import errno
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import snapshot_run
from snapshot_run import LOOSE, Once, manifest_of, names, points_at, verdicts, watch_once

from tightrec.formats import checkpoint_files as files
from tightrec.snapshot import current, export, store
from tightrec.snapshot import watch as watch_module
from tightrec.snapshot.config import ExportConfig
from tightrec.snapshot.watch import WatchConfig, watch


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def once(run: Path, out: Path) -> Once:
    return partial(watch_once, run, out)


def test_one_that_fails_searched_too_is_kept_aside_with_its_report_and_not_tried_again(
    run: Path, out: Path, once: Once, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_run.save(run, 1)
    once()
    snapshot_run.save(run, 2)
    verdicts(monkeypatch, False, False, True)
    status, lines = once(budget_ne=1e-9)
    assert status == 1
    assert lines[-2].endswith("current stays at step-00000001")
    assert lines[-1] == "step-00000002, the newest checkpoint, has no verified snapshot"
    assert points_at(out) == "step-00000001"
    assert names(out) == ["current", "rejected", "step-00000001"]
    aside = out / "rejected" / "step-00000002"
    report = json.loads((aside / current.REPORT).read_text())
    assert [attempt["verification"]["passed"] for attempt in report["attempts"]] == [False, False]
    assert [why.partition(":")[0] for why in report["why"]] == ["types of step-00000001", "types searched"]
    rejected = manifest_of(aside).verification
    assert rejected and rejected["passed"] is False
    again = once(budget_ne=1e-9)
    assert again[0] == 1
    assert not any("REFUSED" in line for line in again[1]), "the same settings reject it again, unseen"
    status, lines = once(budget_ne=LOOSE)
    assert (status, points_at(out)) == (0, "step-00000002")


def test_a_search_that_finds_the_plan_that_broke_is_not_built_again(
    run: Path, out: Path, once: Once, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_run.save(run, 1)
    verdicts(monkeypatch, False)
    plans = []

    def choose(*args: Any) -> Any:
        plans.append(export.choose(*args))
        return plans[0]

    monkeypatch.setattr(watch_module, "choose", choose)
    status, lines = once()
    assert (status, len(plans)) == (1, 2)
    report = json.loads((out / "rejected" / "step-00000001" / current.REPORT).read_text())
    assert len(report["attempts"]) == 1
    assert lines[-2].endswith("there is no " + str(out / "current"))
    assert not (out / "current").is_symlink()


def test_as_many_rejected_ones_are_kept(run: Path, out: Path, once: Once) -> None:
    for step in range(1, 5):
        snapshot_run.save(run, step, broken=True, keep=1)
        assert once(keep=2)[0] == 1
    assert names(out / "rejected") == ["step-00000003", "step-00000004"]


def test_a_restart_tidies_repairs_the_link_and_redoes_nothing(
    run: Path, out: Path, once: Once, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        snapshot_run.save(run, step)
        once()
    for left in (f"step-00000003.partial-{os.getpid()}", "rejected/step-00000001.partial-1"):
        (out / left / "tables").mkdir(parents=True)
    (out / ".current.77").symlink_to("step-00000001")
    (out / "current").unlink()
    (out / "current").symlink_to("step-00000003")
    monkeypatch.setattr(watch_module, "build", None)
    status, lines = once()
    assert status == 0
    assert names(out) == ["current", "rejected", "step-00000001", "step-00000002"]
    assert names(out / "rejected") == []
    assert points_at(out) == "step-00000002"
    assert sum("points at step-00000002" in line for line in lines) == 1


def test_a_link_to_nothing_goes_where_nothing_is_verified(run: Path, out: Path, once: Once) -> None:
    out.mkdir()
    (out / "current").symlink_to("step-00000003")
    status, lines = once()
    assert status == 1
    assert not (out / "current").is_symlink()
    assert any("pointed nowhere" in line for line in lines)


def test_a_snapshot_damaged_on_disk_is_set_aside_and_made_again(run: Path, out: Path, once: Once) -> None:
    snapshot_run.save(run, 1)
    once()
    weights = out / "step-00000001" / store.DENSE_FILE
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    status, lines = once()
    assert status == 0
    assert "dense.safetensors" in lines[0]
    manifest_of(out / "current")
    (out / "step-00000001-2").mkdir()
    assert once()[0] == 0
    assert names(out / "rejected") == ["step-00000001", "step-00000001-2"]
    assert names(out) == ["current", "rejected", "step-00000001"]


def test_an_unverified_snapshot_is_never_pointed_at(
    run: Path, out: Path, once: Once, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExportConfig(checkpoint=snapshot_run.save(run, 7), out=out / "step-00000007", verify=False)
    export.export(config, lambda line: None)
    verdicts(monkeypatch, False, False)
    once(precision="auto")
    # As by somebody who thinks it good enough.
    (out / "rejected" / "step-00000007").rename(out / "step-00000008")
    shutil.rmtree(run)
    assert once()[0] == 1
    assert not (out / "current").is_symlink()
    assert names(out) == ["rejected", "step-00000007", "step-00000008"]


def test_a_damaged_checkpoint_is_passed_over_in_one_line(run: Path, out: Path, once: Once) -> None:
    snapshot_run.save(run, 1)
    newest = snapshot_run.save(run, 2)
    piece = next(newest.glob("*.distcp"))
    data = bytearray(piece.read_bytes())
    data[len(data) // 2] ^= 1
    piece.write_bytes(bytes(data))
    status, lines = once()
    warnings = [line for line in lines if line.startswith("warning")]
    assert len(warnings) == 1
    assert re.search(rf"step-00000002 is passed over.*{piece.name} has checksum", warnings[0])
    assert (status, points_at(out)) == (1, "step-00000001")
    (newest / files.MANIFEST).unlink()
    status, lines = once()
    assert [line for line in lines if line.startswith("warning")] == [
        "warning: step-00000002 is passed over: its manifest cannot be read"
    ]


@pytest.mark.parametrize("reader", ["open_checkpoint", "gather", "build"])
def test_a_checkpoint_deleted_while_it_is_read_stops_nothing(
    run: Path, out: Path, once: Once, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    gone, stays = snapshot_run.save(run, 2), snapshot_run.save(run, 1, seed=5)
    (run / "checkpoints" / "step-00000002.abandoned").rename(gone)
    real = getattr(watch_module, reader)

    def deleting(*args: Any, **settings: Any) -> Any:
        shutil.rmtree(gone, ignore_errors=True)
        return real(*args, **settings)

    monkeypatch.setattr(watch_module, reader, deleting)
    status, lines = once()
    assert stays.is_dir()
    warnings = [line for line in lines if line.startswith("warning")]
    assert len(warnings) == 1
    assert "step-00000002 was deleted while it was read" in warnings[0]
    assert (status, names(out)) == (0, ["current", "step-00000001"])


def test_a_full_disk_is_told_and_the_next_checkpoint_tried(
    run: Path, out: Path, once: Once, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        snapshot_run.save(run, step)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_: Any) -> None:
        raise full

    lines: list[str] = []
    looks = iter([None, None, KeyboardInterrupt()])

    def sleep(seconds: float) -> None:
        if end := next(looks):
            raise end

    with monkeypatch.context() as patch:
        patch.setattr(store.SnapshotWriter, "write_dense", refuse)
        patch.setattr(watch_module.time, "sleep", sleep)
        with pytest.raises(KeyboardInterrupt):
            watch(WatchConfig(run=run, out=out), lines.append)
    assert sum("No space left on device" in line for line in lines) == 1, "older ones would not fit either"
    assert names(out) == []
    snapshot_run.save(run, 3)
    assert once()[0] == 0
    assert names(out) == ["current", "step-00000003"]


def test_values_that_no_model_has_are_reported_and_an_older_checkpoint_serves(
    run: Path, out: Path, once: Once
) -> None:
    snapshot_run.save(run, 1)
    snapshot_run.save(run, 2, broken=True)
    status, lines = once()
    assert (status, points_at(out)) == (1, "step-00000001")
    report = json.loads((out / "rejected" / "step-00000002" / current.REPORT).read_text())
    assert "NaN" in report["why"][0]
    assert report["attempts"] == []
    assert sum("step-00000002 became no snapshot" in line for line in lines) == 1
    once()
    assert names(out / "rejected") == ["step-00000002"], "one report a checkpoint"


def test_one_folder_has_one_watcher(out: Path, once: Once) -> None:
    with (
        current.locked(out),
        pytest.raises(ValueError, match=rf"Another watcher \(process {os.getpid()}\) keeps"),
    ):
        once()
    assert once()[0] == 1, "and the lock is free afterwards"


def test_an_interrupted_build_leaves_nothing(
    run: Path, out: Path, once: Once, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_run.save(run, 1)

    def interrupt(*_: Any) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(store.SnapshotWriter, "write_dense", interrupt)
    with pytest.raises(SystemExit):
        once()
    assert names(out) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"poll_s": 0}, "poll_s=0 must be above 0"),
        ({"keep": 0}, "keep=0 must be at least 1"),
        ({"precision": "int3"}, "precision=int3 is neither a file nor one of auto, int8"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_watched(
    once: Once, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        once(**settings)


def test_something_else_called_current_is_not_touched(out: Path, once: Once) -> None:
    (out / "current").mkdir(parents=True)
    with pytest.raises(ValueError, match="current is not a link"):
        once()
