"""What stands under a snapshot's name, at whatever call its exporter is killed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from snapshot_made import make_snapshot

from tightrec.snapshot.store import check, partial_of, publish, read_manifest, tidy

KILLED = 77

# Runs publish or tidy and dies before its n-th call that changes something on the disk.
DYING = f"""
import os, sys
from pathlib import Path
from tightrec.snapshot.publish import publish, tidy

left = int(sys.argv[1])
def dying(real):
    def call(*arguments, **more):
        global left
        if left == 0:
            os._exit({KILLED})
        left -= 1
        return real(*arguments, **more)
    return call
for name in ("rename", "replace", "unlink", "rmdir", "fsync"):
    setattr(os, name, dying(getattr(os, name)))
what, partial, out = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
if what == "tidy":
    tidy(out)
else:
    publish(partial, out, replace=True)
"""


def dying(calls: int, what: str, partial: Path, out: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", DYING, str(calls), what, str(partial), str(out)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two whole snapshots of steps that differ in a table's bytes."""
    folder = tmp_path_factory.mktemp("made")
    return make_snapshot(folder / "a", seed=1), make_snapshot(folder / "b", seed=2)


@pytest.fixture(scope="module")
def gone() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def which(out: Path, made: tuple[Path, Path]) -> int | None:
    """0 or 1: ``out`` is that one of ``made``, whole; None: nothing is there."""
    if not out.exists():
        return None
    manifest = read_manifest(out)
    check(out, manifest)
    return [read_manifest(path) for path in made].index(manifest)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_snapshot_gets_its_name(tmp_path: Path, made: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    publish(shutil.copytree(made[0], partial_of(out)), out)
    assert which(out, made) == 0
    assert names(tmp_path) == ["out"]


def test_a_snapshot_that_is_there_is_replaced_only_if_told(tmp_path: Path, made: tuple[Path, Path]) -> None:
    out = shutil.copytree(made[0], tmp_path / "out")
    partial = shutil.copytree(made[1], partial_of(out))
    with pytest.raises(ValueError, match=r"out exists already. Give another folder, or replace=true"):
        publish(partial, out)
    assert which(out, made) == 0
    publish(partial, out, replace=True)
    assert which(out, made) == 1
    assert names(tmp_path) == ["out"]


def test_what_is_no_snapshot_is_never_replaced(tmp_path: Path, made: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("ten years")
    partial = shutil.copytree(made[0], partial_of(out))
    with pytest.raises(ValueError, match="is not replaced"):
        publish(partial, out, replace=True)
    (out / "manifest.json").write_text('{"format_version": 1}')
    with pytest.raises(ValueError, match="is not replaced"):
        publish(partial, out, replace=True)
    assert (out / "thesis.txt").read_text() == "ten years"
    shutil.rmtree(out)
    out.symlink_to(made[1])
    with pytest.raises(ValueError, match="is a link"):
        publish(partial, out, replace=True)
    out.unlink()
    out.write_text("a file")
    with pytest.raises(ValueError, match="is not replaced"):
        publish(partial, out, replace=True)


def test_what_is_not_whole_gets_no_name(tmp_path: Path, made: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    partial = shutil.copytree(made[0], partial_of(out))
    (partial / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest.json is missing"):
        publish(partial, out)
    assert not out.exists()


@pytest.mark.parametrize("there", [False, True])
def test_a_kill_at_any_call_leaves_a_whole_snapshot(
    there: bool, tmp_path: Path, made: tuple[Path, Path], gone: int
) -> None:
    seen = []
    for calls in range(100):
        folder = tmp_path / str(calls)
        out = folder / "out"
        folder.mkdir()
        if there:
            shutil.copytree(made[0], out)
        partial = shutil.copytree(made[1], folder / f"out.partial-{gone}")
        run = dying(calls, "publish", partial, out)
        found = which(out, made)
        tidy(out)
        after = which(out, made)
        # Nothing is lost, and what was there stays the newer one.
        assert after == (found if found is not None else 0 if there else None)
        assert names(folder) == ([] if after is None else ["out"])
        seen.append(found)
        if run.returncode == 0:
            break
        assert run.returncode == KILLED, run.stderr
    assert seen == ([0, None, *[1] * (len(seen) - 2)] if there else [None, *[1] * (len(seen) - 1)])
    assert len(seen) == (12 if there else 3)


def test_a_failing_rename_puts_the_old_one_back(
    tmp_path: Path, made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(made[0], tmp_path / "out")
    partial = shutil.copytree(made[1], partial_of(out))
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(source) == partial:
            raise OSError("no such luck")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="no such luck"):
        publish(partial, out, replace=True)
    assert which(out, made) == 0


@pytest.mark.parametrize("end", [SystemExit(143), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [False, True])
def test_a_signal_between_the_renames_puts_the_old_one_back(
    tmp_path: Path, made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, end: BaseException, after: bool
) -> None:
    out = shutil.copytree(made[0], tmp_path / "out")
    partial = shutil.copytree(made[1], partial_of(out))
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        # As a signal's handler does: behind the call that it came in, or before the next one.
        if Path(source) == partial and not after:
            raise end
        real(source, target)
        if Path(source) == out and after:
            raise end

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(type(end)):
        publish(partial, out, replace=True)
    assert which(out, made) == 0
    assert names(tmp_path) == ["out", partial.name]


def test_a_signal_after_the_renames_leaves_the_new_one(
    tmp_path: Path, made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(made[0], tmp_path / "out")
    partial = shutil.copytree(made[1], partial_of(out))
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        real(source, target)
        if Path(source) == partial:
            raise SystemExit(143)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(SystemExit):
            publish(partial, out, replace=True)
    assert which(out, made) == 1
    tidy(out)
    assert which(out, made) == 1
    assert names(tmp_path) == ["out"]


def test_a_restarted_process_of_the_same_number_tidies_too(tmp_path: Path, made: tuple[Path, Path]) -> None:
    """As in a container, whose processes count from the same number at every start."""
    out = tmp_path / "out"
    shutil.copytree(made[0], tmp_path / f"out.old-{os.getpid()}")
    shutil.copytree(made[1], partial_of(out))
    tidy(out)
    assert which(out, made) == 0
    assert names(tmp_path) == ["out"]


def test_a_kill_of_the_tidying_is_tidied(tmp_path: Path, made: tuple[Path, Path], gone: int) -> None:
    for there in (False, True):
        for calls in range(100):
            folder = tmp_path / f"{there}-{calls}"
            out = folder / "out"
            folder.mkdir()
            if there:
                shutil.copytree(made[1], out)
            shutil.copytree(made[0], folder / f"out.old-{gone}")
            shutil.copytree(made[1], folder / f"out.partial-{gone}")
            run = dying(calls, "tidy", out, out)
            assert which(out, made) in ((1,) if there else (None, 0))
            tidy(out)
            assert which(out, made) == (1 if there else 0)
            assert names(folder) == ["out"]
            if run.returncode == 0:
                break
            assert run.returncode == KILLED, run.stderr
        assert calls > 5


def test_what_belongs_to_others_is_let_be(tmp_path: Path, made: tuple[Path, Path], gone: int) -> None:
    out = tmp_path / "out"
    kept = [f"out.partial-{os.getppid()}", "out.partial-x", f"out2.partial-{gone}", f"outX.old-{gone}"]
    for name in [*kept, f"out.partial-{gone}"]:
        shutil.copytree(made[0], tmp_path / name)
    (tmp_path / f"out.old-{gone}").write_text("a file")
    tidy(out)
    assert names(tmp_path) == sorted([*kept, f"out.old-{gone}"])
    tidy(tmp_path / "nowhere" / "out")


def test_of_several_old_ones_the_newest_is_put_back(
    tmp_path: Path, made: tuple[Path, Path], gone: int
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    older = shutil.copytree(made[0], tmp_path / f"out.old-{gone}")
    newer = shutil.copytree(made[1], tmp_path / f"out.old-{process.pid}")
    os.utime(older, (1000, 1000))
    os.utime(newer, (2000, 2000))
    tidy(out)
    assert which(out, made) == 1
    assert names(tmp_path) == ["out"]
