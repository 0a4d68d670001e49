"""``make train`` ends with a snapshot: in a copy of the Makefile with stubs for torchrun and the exporter."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tightrec.formats.checkpoint_files import Manifest, make_partial, publish
from tightrec.formats.schema import Schema

ROOT = Path(__file__).resolve().parents[2]

# Trains nothing: hands over the run that lies in ./trained, if there is one, as a job that finished does.
TORCHRUN = """#!/bin/sh
echo "${TIGHTREC_HANDOVER:-none}" >> handovers
if test -d trained && test -n "$TIGHTREC_HANDOVER"; then printf %s "$PWD/trained" > "$TIGHTREC_HANDOVER"; fi
exit ${TORCHRUN_STATUS:-0}
"""
# Writes its words down; what only looks at a checkpoint runs.
PYTHON = f"""#!/bin/sh
if test "$*" = "-m tightrec.trainer.handover"; then exec "{sys.executable}" "$@"; fi
echo "$*" >> calls
exit ${{EXPORT_STATUS:-0}}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the Makefile that looks set up, and another run as the latest: never exported."""
    folder = tmp_path / "project"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / "requirements").mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name, text in (("torchrun", TORCHRUN), ("python", PYTHON)):
        (folder / ".venv" / "bin" / name).write_text(text)
        (folder / ".venv" / "bin" / name).chmod(0o755)
    for stack in ("cpu", "cuda13"):
        (folder / ".venv" / f".ready-{stack}").touch()
    run(folder / "runs" / "other", ["valid", "test"])
    (folder / "runs" / "latest").symlink_to("other")
    (folder / "tmp").mkdir()
    return folder


def run(folder: Path, splits: list[str] | None) -> None:
    """A run folder with a checkpoint of data with ``splits``; None: the job saved none."""
    (folder / "checkpoints").mkdir(parents=True)
    if splits is None:
        return
    schema = Schema(dense=("a",), sparse=(), label="y", rows=dict.fromkeys(splits, 1), source="")
    schema.save(folder)
    make_partial(folder / "checkpoints", 1)
    extra = {"data": str(folder) if splits else None}
    publish(folder / "checkpoints", Manifest(step=1, world=1, files={}, extra=extra))


def train(folder: Path, *words: str, **environment: str) -> tuple[int, str, list[str]]:
    """Status and all output of ``make train``, and the calls of the exporter."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "train", *words],
        cwd=folder,
        env=inherited | {"TMPDIR": str(folder / "tmp")} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert list((folder / "tmp").iterdir()) == [], "left behind"
    assert os.readlink(folder / "runs" / "latest") == "other"
    calls = folder / "calls"
    return done.returncode, done.stdout, calls.read_text().splitlines() if calls.exists() else []


def test_the_run_that_was_trained_is_exported_beside_its_checkpoints(project: Path) -> None:
    trained = project / "trained"
    run(trained, ["train", "valid", "test"])
    status, told, calls = train(project)
    assert status == 0, told
    words = f"-m tightrec.snapshot export checkpoint={trained} out={trained}/snapshot replace=true"
    assert calls == [f"{words} precision=int8"]
    _, _, calls = train(project, "EXPORT=precision=auto budget_ne=0.001")
    assert calls[1:] == [f"{words} precision=auto budget_ne=0.001"]
    first, second = (project / "handovers").read_text().split()
    assert first != second, "two trainings at once"


def test_export_none_leaves_it_out(project: Path) -> None:
    run(project / "trained", ["valid", "test"])
    status, told, calls = train(project, "EXPORT=none", TIGHTREC_HANDOVER=str(project / "mine"))
    assert (status, calls) == (0, []), told
    assert (project / "handovers").read_text() == "none\n"
    assert "no snapshot" not in told


def test_a_failing_export_fails_make(project: Path) -> None:
    run(project / "trained", ["valid", "test"])
    status, told, calls = train(project, EXPORT_STATUS="1")
    assert status != 0, told
    assert len(calls) == 1


def test_a_failing_job_ends_before_the_export(project: Path) -> None:
    status, told, calls = train(project, TORCHRUN_STATUS="1")
    assert status != 0, told
    assert calls == []


@pytest.mark.parametrize(
    ("splits", "missing"),
    [
        (None, "complete checkpoint"),
        ([], "held-out rows"),
        (["train", "valid"], "rows of the split test"),
        (["train", "test"], "rows of the split valid"),
    ],
)
def test_a_job_without_checkpoint_or_held_out_rows_is_told_and_ends_well(
    project: Path, splits: list[str] | None, missing: str
) -> None:
    run(project / "trained", splits)
    status, told, calls = train(project)
    assert (status, calls) == (0, []), told
    assert f"no snapshot is exported: {project / 'trained'} has no {missing}\n" in told


def test_a_job_that_finishes_no_run_exports_no_other_one(project: Path) -> None:
    status, told, calls = train(project, "ARGS=--help")
    assert (status, calls) == (0, []), told
    assert "no snapshot" not in told


def test_a_checkpoint_from_before_snapshots_is_told(project: Path) -> None:
    checkpoints = project / "trained" / "checkpoints"
    make_partial(checkpoints, 1)
    publish(checkpoints, Manifest(step=1, world=1, files={}))
    status, told, calls = train(project)
    assert (status, calls) == (0, []), told
    assert f"no snapshot is exported: {project / 'trained'} has no held-out rows" in told


def test_a_damaged_checkpoint_fails_make(project: Path) -> None:
    run(project / "trained", ["valid", "test"])
    (project / "trained" / "schema.json").write_text("{")
    status, told, calls = train(project)
    assert status != 0
    assert "not valid JSON" in told
    assert calls == []
