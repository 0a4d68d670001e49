"""Checkpoint folders: publishing, verification, retention, and a crash at any point of them."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import pytest

from tightrec.formats import checkpoint_files as files
from tightrec.formats.checkpoint_files import DamagedCheckpoint, Manifest

CONTENT = {"__0_0.distcp": b"first rank's tensors", "__1_0.distcp": b"second's", ".metadata": b"where"}


def _write(folder: Path, step: int, note: str = "") -> Path:
    partial = files.make_partial(folder, step)
    for name, content in CONTENT.items():
        (partial / name).write_bytes(content + note.encode())
    records = {name: files.record_of(partial / name) for name in CONTENT}
    return files.publish(folder, Manifest(step=step, world=2, files=records, extra={"note": note}))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_published_checkpoint_is_found_verified_and_its_extra_comes_back(tmp_path: Path) -> None:
    assert files.find_checkpoints(tmp_path / "none") == []
    assert files.latest_complete(tmp_path) is None
    second, first = _write(tmp_path, 200, "b"), _write(tmp_path, 100, "a")
    assert files.find_checkpoints(tmp_path) == [first, second]
    assert files.latest_complete(tmp_path) == second == tmp_path / "step-00000200"
    manifest = files.verify(second)
    assert (manifest.step, manifest.world, manifest.extra) == (200, 2, {"note": "b"})
    assert set(manifest.files) == set(CONTENT)


def test_steps_of_any_length_sort_by_number(tmp_path: Path) -> None:
    paths = [_write(tmp_path, step) for step in (99_999_999, 100_000_000, 5)]
    assert files.find_checkpoints(tmp_path) == [paths[2], paths[0], paths[1]]
    assert files.step_of(paths[1]) == 100_000_000


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("__1_0.distcp", lambda p: p.unlink(), "__1_0.distcp is missing"),
        ("__0_0.distcp", lambda p: p.write_bytes(p.read_bytes()[:-1]), "__0_0.distcp has 19 bytes .* 20"),
        (".metadata", lambda p: p.write_bytes(b"wherf"), ".metadata has checksum .* where the manifest says"),
        ("manifest.json", lambda p: p.unlink(), "manifest.json is missing"),
        ("manifest.json", lambda p: p.write_text("{"), "manifest.json is unreadable"),
        ("manifest.json", lambda p: p.write_text("[1]"), "manifest.json is unreadable"),
        ("manifest.json", lambda p: p.write_text("{}"), "manifest.json is unreadable"),
        ("manifest.json", lambda p: p.write_bytes(b"\xff"), "manifest.json is unreadable"),
        (
            "manifest.json",
            lambda p: p.write_text(p.read_text().replace('"step": 2', '"step": 3')),
            "manifest.json does not match its own checksum",
        ),
    ],
)
def test_damage_is_refused_by_file_and_the_one_before_is_offered(tmp_path, name, damage, words) -> None:  # type: ignore[no-untyped-def]
    before, newest = _write(tmp_path, 1), _write(tmp_path, 2)
    damage(newest / name)
    with pytest.raises(DamagedCheckpoint, match=words) as caught:
        files.verify(newest)
    assert caught.value.before == before
    assert f"The one before it is {before}" in str(caught.value)
    if "checksum" not in words or name == "manifest.json":
        assert files.latest_complete(tmp_path) == before


def test_offer_skips_damaged_ones_and_says_when_there_is_none(tmp_path: Path) -> None:
    paths = [_write(tmp_path, step) for step in (1, 2, 3)]
    for path in paths[1:]:
        (path / ".metadata").unlink()
    with pytest.raises(DamagedCheckpoint, match="step-00000001"):
        files.verify(paths[2])
    (paths[0] / ".metadata").unlink()
    with pytest.raises(DamagedCheckpoint, match="no complete one before it") as caught:
        files.verify(paths[2])
    assert caught.value.before is None


def test_absent_checkpoint_and_another_format_are_told_apart_from_damage(tmp_path: Path) -> None:
    path = _write(tmp_path, 1)
    with pytest.raises(
        ValueError, match=f"no checkpoint .*step-00000007.*newest complete one there is {path}"
    ):
        files.verify(files.path_of(tmp_path, 7))
    values = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**values, "format_version": 2}))
    with pytest.raises(ValueError, match="format 2; this tightrec reads 1") as caught:
        files.verify(path)
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_last_k_stay_and_later_steps_of_an_abandoned_course_are_set_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):
        _write(tmp_path, step)
    _write(tmp_path, 4)
    with pytest.warns(UserWarning, match=r"step-00000009 is of a later step"):
        files.retire(tmp_path, 4, keep=2)
    assert _names(tmp_path) == ["step-00000003", "step-00000004", "step-00000009.abandoned"]
    files.tidy(tmp_path)
    assert files.latest_complete(tmp_path) == files.path_of(tmp_path, 4)
    assert _names(tmp_path)[-1] == "step-00000009.abandoned"


class _Crash(BaseException):
    pass


@contextmanager
def _crash_at(count: int) -> Iterator[None]:
    """The first ``count`` changes to the disk happen, the next one raises instead."""
    left = [count]

    def guarded(function):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            left[0] -= 1
            if left[0] < 0:
                raise _Crash
            return function(*args, **kwargs)

        return call

    with (
        mock.patch.object(os, "unlink", guarded(os.unlink)),
        mock.patch.object(os, "rmdir", guarded(os.rmdir)),
        mock.patch.object(os, "fsync", guarded(os.fsync)),
        mock.patch.object(Path, "rename", guarded(Path.rename)),
        mock.patch.object(Path, "mkdir", guarded(Path.mkdir)),
        mock.patch.object(json, "dump", guarded(json.dump)),
    ):
        yield


@pytest.mark.parametrize("step", [2, 3], ids=["same step again", "next step"])
def test_crash_at_any_change_to_the_disk_leaves_a_complete_checkpoint(tmp_path: Path, step: int) -> None:
    crashes = 0
    for count in range(100):
        folder = tmp_path / str(count)
        _write(folder, 1, "a")
        _write(folder, 2, "b")
        finished = False
        with suppress(_Crash), _crash_at(count):
            _write(folder, step, "c")
            files.retire(folder, step, keep=1)
            finished = True
        crashes += not finished
        complete = [path for path in files.find_checkpoints(folder) if files.verify(path)]
        assert complete, f"none left after {count} changes: {_names(folder)}"
        files.tidy(folder)
        newest = files.latest_complete(folder)
        assert newest is not None
        assert files.verify(newest).extra["note"] in "bc"
        assert all("." not in name for name in _names(folder))
        if finished:
            assert _names(folder) == [f"step-{step:08d}"]
            assert files.verify(newest).extra["note"] == "c"
            break
        shutil.rmtree(folder)
    assert crashes > 8
    assert finished
