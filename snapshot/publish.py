"""How a whole snapshot gets its name, and what is done about exporters that were killed.

OUT                 a whole snapshot
OUT.partial-PID     being written, or being deleted, by process PID
OUT.old-PID         was OUT, about to be replaced by process PID
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tightrec.formats.checkpoint_files import flush_folder
from tightrec.snapshot.manifest import read_manifest


def partial_of(out: Path) -> Path:
    """Where this process writes the snapshot ``out`` before it is whole."""
    return out.with_name(f"{out.name}.partial-{os.getpid()}")


def publish(partial: Path, out: Path, replace: bool = False) -> None:
    """Give the whole snapshot ``partial`` its name ``out``, beside which it stands.

    Both steps are renames: what stands under ``out`` is a whole snapshot or nothing. A kill between them,
    when ``out`` is replaced, leaves nothing under ``out``; :func:`tidy` puts the old one back.

    Args:
        replace: put it in the place of a snapshot that is there.

    Raises:
        ValueError: ``partial`` is not whole, or ``out`` exists and ``replace`` is off, or ``out`` is not a
            snapshot, which is never deleted.
    """
    read_manifest(partial)
    require_free(out, replace)
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    try:
        if out.exists():
            out.rename(old)
        partial.rename(out)
    except BaseException:
        # SystemExit and KeyboardInterrupt too: signals end a command between the renames as well.
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    flush_folder(out.parent)
    if old.exists():
        _delete(old)


def tidy(out: Path) -> None:
    """Remove what killed exporters left beside ``out``, and put the old snapshot back where one was killed
    between taking it away and renaming the new one.

    To be called before this process writes: what has its own number was left by another one, as restarted
    containers count their processes from the same number. What belongs to others that run on this machine is
    let be: export to one ``out`` from one machine.
    """
    # First, since an old snapshot takes such a name to be deleted.
    for partial in _leftovers(out, "partial"):
        shutil.rmtree(partial)
    for old in sorted(_leftovers(out, "old"), key=lambda path: path.stat().st_mtime, reverse=True):
        if out.exists() or out.is_symlink():
            _delete(old)
        else:
            old.rename(out)
            flush_folder(out.parent)


def _leftovers(out: Path, what: str) -> Iterator[Path]:
    if not out.parent.is_dir():
        return
    name = re.compile(re.escape(out.name) + rf"\.{what}-(\d+)")
    for path in list(out.parent.iterdir()):
        match = name.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink() and not _runs(int(match[1])):
            yield path


def _runs(process: int) -> bool:
    """Whether another process of that number runs."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def require_free(out: Path, replace: bool = False) -> None:
    """Refuse a name that a snapshot cannot be given; to be asked before the work too.

    Args:
        replace: whether a snapshot that is there may be replaced.

    Raises:
        ValueError: ``out`` is a link; it exists and ``replace`` is off, or is not a whole snapshot.
    """
    if out.is_symlink():
        raise ValueError(f"{out} is a link. Name a folder; a link to it can be moved afterwards.")
    if not out.exists():
        return
    if not replace:
        raise ValueError(f"{out} exists already. Give another folder, or replace=true to replace it.")
    try:
        read_manifest(out)
    except ValueError as error:
        raise ValueError(
            f"{out} is not replaced, since what is there is not a whole snapshot ({error}) "
            "Remove it yourself or choose another name."
        ) from None


def _delete(old: Path) -> None:
    # Renamed first: half a snapshot must not be put back by a later tidy.
    partial = old.with_name(old.name.replace(".old-", ".partial-"))
    old.rename(partial)
    shutil.rmtree(partial)
