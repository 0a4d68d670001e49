"""The folder that a watcher keeps: its notes and reports are on the disk before a name says so."""

import os
from pathlib import Path

import pytest
from snapshot_made import make_snapshot

from tightrec.snapshot import current
from tightrec.snapshot.publish import partial_of


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed, and ``-> NAME`` of what is renamed, in order."""
    taken: list[str] = []
    fsync, rename = os.fsync, os.rename

    def flushing(handle: int) -> None:
        taken.append(Path(f"/proc/self/fd/{handle}").readlink().relative_to(tmp_path).as_posix())
        fsync(handle)

    def renaming(source: Path, target: Path) -> None:
        taken.append(f"-> {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "rename", renaming)
    return taken


def test_the_note_and_its_folder_are_flushed_before_the_snapshot_gets_its_name(
    tmp_path: Path, steps: list[str]
) -> None:
    path = tmp_path / "step-00000001"
    partial = make_snapshot(partial_of(path))
    steps.clear()
    current.add(partial, path, {"number": 1})
    assert steps == [f"{partial.name}/watch.json", partial.name, f"-> {path.name}", "."]


def test_the_report_and_its_folder_are_flushed_before_it_is_set_aside(
    tmp_path: Path, steps: list[str]
) -> None:
    folder = tmp_path / "step-00000001.partial-1"
    folder.mkdir()
    current.set_aside(tmp_path, folder, "step-00000001", {"checkpoint": None, "why": []})
    assert steps == [f"{folder.name}/report.json", folder.name, "-> step-00000001", "rejected"]
