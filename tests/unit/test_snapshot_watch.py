"""The watcher: what becomes of each checkpoint, and what ``current`` points at."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import snapshot_run
from snapshot_run import LOOSE, Once, manifest_of, names, points_at, verdicts, watch_once

from tightrec.snapshot import current, export
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


def test_each_new_checkpoint_becomes_the_snapshot_that_an_export_of_it_would_be(
    run: Path, out: Path, once: Once, tmp_path: Path
) -> None:
    ranges = []
    for step in (5, 9):
        checkpoint = snapshot_run.save(run, step)
        status, lines = once(precision="int4")
        assert status == 0
        assert sum("verified on 300 test rows" in line for line in lines) == 1
        assert points_at(out) == f"step-{step:08d}"
        alone = tmp_path / f"alone{step}"
        export.export(
            ExportConfig(checkpoint=checkpoint, out=alone, precision="int4", budget_ne=LOOSE), lines.append
        )
        found, wanted = manifest_of(out / "current"), manifest_of(alone)
        assert (found.files, found.layers, found.plan) == (wanted.files, wanted.layers, wanted.plan)
        assert found.verification and found.verification["passed"] is True
        ranges.append({name: layer.activation for name, layer in found.layers.items()})
    assert ranges[0] != ranges[1], "ranges are of the checkpoint's own activations"
    assert f"types of step-{5:08d}" in lines[-1] or any(f"types of step-{5:08d}" in line for line in lines)
    assert names(out) == ["current", "step-00000005", "step-00000009"]


def test_where_the_budget_breaks_types_are_searched_and_carried_on(
    run: Path, out: Path, once: Once, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_run.save(run, 1)
    once(precision="int2", ranges="dynamic")
    snapshot_run.save(run, 2)
    verdicts(monkeypatch, False, True, True)
    # A budget this small takes types of more bits than the int2 that it began with.
    status, lines = once(precision="int2", ranges="dynamic", budget_ne=1e-9)
    assert status == 0
    refused, *_, last = [line for line in lines if line.startswith("step-")]
    assert "types of step-00000001: " in refused
    assert refused.endswith("other types are searched")
    assert "types searched: " in last
    plans = [manifest_of(out / f"step-0000000{step}").plan for step in (1, 2)]
    assert plans[0]["tables"] != plans[1]["tables"]
    assert "sensitivity.json" in manifest_of(out / "current").files
    snapshot_run.save(run, 3)
    status, lines = once(precision="int2", ranges="dynamic", budget_ne=1e-9)
    assert status == 0
    assert "types of step-00000002: " in lines[-1]
    assert manifest_of(out / "current").plan == plans[1]


def test_the_newest_goes_first_and_what_it_supersedes_is_said(run: Path, out: Path, once: Once) -> None:
    for step in (1, 2, 3):
        snapshot_run.save(run, step)
    status, lines = once()
    assert status == 0
    assert names(out) == ["current", "step-00000003"]
    skipped = [line for line in lines if "skipped" in line]
    assert skipped == [f"step-0000000{i} is skipped, since step-00000003 is newer" for i in (1, 2)]
    assert not any("skipped" in line for line in once()[1])


def test_old_snapshots_are_deleted_but_never_the_one_that_is_used(run: Path, out: Path, once: Once) -> None:
    for step in range(1, 5):
        snapshot_run.save(run, step)
        once(keep=2)
        assert points_at(out) == f"step-0000000{step}"
    assert names(out) == ["current", "step-00000003", "step-00000004"]
    current.point(out, out / "step-00000003")
    current.retire(out, 1)
    assert names(out) == ["current", "step-00000003", "step-00000004"]
    current.point(out, out / "step-00000004")
    current.retire(out, 1)
    assert names(out) == ["current", "step-00000004"]


def test_training_that_went_back_gets_snapshots_of_its_own(run: Path, out: Path, once: Once) -> None:
    snapshot_run.save(run, 5)
    once()
    held = (out / "current").resolve()
    # The same step again, then an earlier one: the trainer sets the later one aside.
    snapshot_run.save(run, 5, seed=99)
    assert once()[0] == 0
    assert points_at(out) == "step-00000005-2"
    manifest_of(held)
    snapshot_run.save(run, 3)
    assert once()[0] == 0
    assert points_at(out) == "step-00000003"
    (out / "current").unlink()
    assert once()[0] == 0
    assert points_at(out) == "step-00000003", "the one made last, not the one of most steps"


def test_other_settings_replace_the_types_that_were_carried_on(run: Path, out: Path, once: Once) -> None:
    for step, precision in ((1, "int8"), (2, "int4")):
        snapshot_run.save(run, step)
        assert once(precision=precision)[0] == 0
        assert set(manifest_of(out / "current").plan["tables"].values()) == {precision}


def test_it_waits_for_the_run_follows_it_and_ends_with_it(
    run: Path, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    link = tmp_path / "latest"
    happenings: list[Callable[[], Any]] = [
        lambda: None,
        lambda: (run.mkdir(), link.symlink_to("run")),
        lambda: (snapshot_run.set_status(run, "running"), snapshot_run.save(run, 1)),
        lambda: snapshot_run.set_status(run, "stopped", "stopped by SIGTERM"),
        lambda: (link.unlink(), link.symlink_to("elsewhere")),
        lambda: (snapshot_run.save(run, 2), snapshot_run.set_status(run, "finished")),
    ]
    left, slept, lines = iter(happenings), [], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        next(left)()

    monkeypatch.setattr(watch_module.time, "sleep", sleep)
    status = watch(WatchConfig(run=link, out=out, budget_ne=LOOSE, poll_s=7), lines.append)
    assert (status, points_at(out)) == (0, "step-00000002")
    assert slept == [7.0] * len(happenings)
    waiting, watching, first, stopped, second = lines
    assert waiting == f"waiting for {link}, which is not there yet"
    assert watching.startswith(f"watching {run}")
    assert stopped == "the run stopped (stopped by SIGTERM); waiting for it to be resumed"
    assert all("verified" in line for line in (first, second))


def test_follow_goes_on_after_the_run_has_finished(
    run: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_run.save(run, 1)
    snapshot_run.set_status(run, "finished")

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch_module.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        watch(WatchConfig(run=run, out=out, budget_ne=LOOSE, follow=True), lambda line: None)
    assert watch(WatchConfig(run=run, out=out, budget_ne=LOOSE), lambda line: None) == 0
