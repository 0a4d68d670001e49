"""The folder that a watcher keeps: verified snapshots, and the link to the newest of them.

    OUT/step-00000782/            a verified snapshot
    OUT/step-00000782-2/          another one of that step, when training went back and came there again
    OUT/current -> step-00000782  the newest verified one
    OUT/rejected/step-00000782/   what did not verify, with ``report.json``
    OUT/.lock                     held by the one watcher that may write here
    OUT/NAME.partial-PID          being written or being deleted

A snapshot is never replaced, so whoever has resolved ``current`` keeps a whole one until it is deleted.
What a watcher needs to know of a snapshot it made stands in the file ``watch.json`` in it.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightrec.snapshot import store
from tightrec.snapshot.manifest import DamagedSnapshot, SnapshotManifest, read_manifest
from tightrec.snapshot.publish import flush_folder, partial_of, publish

CURRENT = "current"
REJECTED = "rejected"
REPORT = "report.json"

_LOCK = ".lock"
_NOTE = "watch.json"
_NEW_LINK = f".{CURRENT}."


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A verified snapshot in the folder."""

    path: Path
    """Where it stands."""

    manifest: SnapshotManifest
    """What it says of itself."""

    note: Mapping[str, Any]
    """``number``: they are counted in the order in which they are made; ``checkpoint``: fingerprint of what
    it was made from; ``asked``: the plan that the settings asked for. Empty if no watcher made it."""


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder ``out``, made if absent, for one watcher; the system lets go of it when that dies.

    Raises:
        ValueError: another watcher holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ValueError(
                f"Another watcher (process {holder}) keeps {out}. Stop it, or give this one another out."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def tidy(out: Path) -> None:
    """Remove what a killed watcher left half-written or half-deleted; hold the lock.

    Raises:
        ValueError: ``current`` is there and no link.
    """
    link = out / CURRENT
    if link.exists() and not link.is_symlink():
        raise ValueError(f"{link} is not a link, so it cannot be moved on. Remove it, or give another out.")
    for folder in (out, out / REJECTED):
        # Whatever process wrote them: with the lock held it is gone, and its number may be another's by now.
        for partial in folder.glob("step-*.partial-*"):
            shutil.rmtree(partial)
    for new in out.glob(f"{_NEW_LINK}*"):
        new.unlink()


def find_verified(out: Path) -> list[Kept]:
    """The verified snapshots of ``out`` whose files have the right sizes, in the order they were made."""
    found = []
    for path in out.glob("step-*"):
        if ".partial-" in path.name or path.is_symlink():
            continue
        try:
            manifest = read_manifest(path)
            store.check(path, manifest, contents=False)
        except ValueError:
            continue
        if manifest.verification and manifest.verification.get("passed") is True:
            found.append(Kept(path=path, manifest=manifest, note=_read(path / _NOTE)))
    return sorted(found, key=lambda kept: (kept.note.get("number", 0), kept.manifest.step, kept.path.name))


def find_unreadable(out: Path) -> list[tuple[Path, str]]:
    """Snapshots of ``out`` that are damaged, with what is wrong; reads every file of every one."""
    found = []
    for path in sorted(out.glob("step-*")):
        if ".partial-" in path.name or path.is_symlink() or not path.is_dir():
            continue
        try:
            store.check(path, read_manifest(path))
        except DamagedSnapshot as error:
            found.append((path, error.problem))
    return found


def read_reports(out: Path) -> list[dict[str, Any]]:
    """What ``report.json`` says of everything rejected that has a readable one, in the order made.

    Each has its folder as ``path`` in addition.
    """
    found = []
    for path in (out / REJECTED).glob(f"step-*/{REPORT}"):
        if ".partial-" not in path.parent.name and (report := _read(path)):
            found.append({**report, "path": path.parent})
    return sorted(found, key=lambda report: (report.get("number", 0), report["path"].name))


def next_number(out: Path) -> int:
    """One more than anything in ``out`` is counted with."""
    known = [kept.note.get("number", 0) for kept in find_verified(out)]
    return 1 + max([*known, *(report.get("number", 0) for report in read_reports(out))], default=0)


def free_name(folder: Path, name: str) -> Path:
    """Where something called ``name`` can be put in ``folder``: there, or with ``-2``, ``-3``, ... behind."""
    path, again = folder / name, 1
    while path.exists() or path.is_symlink():
        again += 1
        path = folder / f"{name}-{again}"
    return path


def add(partial: Path, path: Path, note: Mapping[str, Any]) -> None:
    """Write ``note`` into the whole and verified snapshot ``partial`` and give it its name ``path``."""
    _write(partial / _NOTE, note)
    publish(partial, path)


def set_aside(out: Path, folder: Path, name: str, report: Mapping[str, Any]) -> Path:
    """Move ``folder`` below ``rejected``, with its report; returns where it stands now.

    Earlier reports on the same ``checkpoint``, if it names one, are deleted.
    """
    rejected = out / REJECTED
    rejected.mkdir(exist_ok=True)
    for earlier in read_reports(out):
        if report["checkpoint"] and earlier.get("checkpoint") == report["checkpoint"]:
            _delete(earlier["path"])
    _write(folder / REPORT, {"number": next_number(out), **report})
    path = free_name(rejected, name)
    folder.rename(path)
    flush_folder(rejected)
    return path


def target_of(out: Path) -> Path | None:
    """The snapshot that ``current`` points at; None: there is no link, or it points nowhere."""
    link = out / CURRENT
    return link.resolve() if link.is_symlink() and link.exists() else None


def point(out: Path, path: Path) -> bool:
    """Make ``current`` a relative link to the snapshot ``path`` in ``out``; whether it was not one yet.

    The new link is renamed over the old one, so there is one at any moment.
    """
    link = out / CURRENT
    if link.is_symlink() and os.readlink(link) == path.name:
        return False
    new = out / f"{_NEW_LINK}{os.getpid()}"
    new.unlink(missing_ok=True)
    new.symlink_to(path.name, target_is_directory=True)
    new.replace(link)
    flush_folder(out)
    return True


def unlink_dangling(out: Path) -> bool:
    """Remove ``current`` if it points nowhere; whether it did."""
    link = out / CURRENT
    if not link.is_symlink() or link.exists():
        return False
    link.unlink()
    return True


def retire(out: Path, keep: int) -> None:
    """Delete all but the last ``keep`` verified snapshots, and all but as many rejected ones.

    What ``current`` points at is never deleted.
    """
    used = target_of(out)
    verified: Sequence[Path] = [kept.path for kept in find_verified(out)]
    rejected: Sequence[Path] = [report["path"] for report in read_reports(out)]
    for path in [*verified[:-keep], *rejected[:-keep]]:
        if path.resolve() != used:
            _delete(path)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _write(path: Path, values: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    flush_folder(path.parent)


def _delete(path: Path) -> None:
    # Renamed first: a kill in the middle must not leave half a snapshot under a whole one's name.
    partial = partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)
    path.rename(partial)
    shutil.rmtree(partial)
