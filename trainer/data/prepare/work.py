"""The unfinished output beside its destination: journals to continue from, and the rename at the end.

    DST.partial/lock               held while a process works on it
    DST.partial/STAGE/settings.json
    DST.partial/STAGE/journal.jsonl    one line per finished part, in order
    DST.partial/STAGE/out/...      what the stage has made so far; that of the last one becomes DST

What is journalled is on the disk: files are flushed and renamed before their line is appended.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

_LONGEST = 200
"""Most characters of a pair of differing values in an error."""


class Stage:
    """One step of the work, continued part by part."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, redo: bool = False) -> None:
        """Open ``folder``, or start it with ``settings``, the plain values that its parts depend on.

        Raises:
            ValueError: parts were finished with other settings, and ``redo`` does not allow to drop them.
        """
        self.out = folder / "out"
        self.entries: list[dict[str, Any]] = []
        self._journal = folder / "journal.jsonl"
        wanted = json.loads(json.dumps(settings))
        known = folder / "settings.json"
        if known.is_file() and self._journal.is_file() and self.out.is_dir():
            self.entries = self._read()
        if self.entries and redo and json.loads(known.read_text()) != wanted:
            self.entries = []
        if self.entries:
            _refuse_other(json.loads(known.read_text()), wanted, folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            self.out.mkdir(parents=True)
            with written(known) as file:
                file.write(json.dumps(wanted, indent=1).encode() + b"\n")

    def finish(self, entry: Mapping[str, Any]) -> None:
        """Journal one finished part."""
        with self._journal.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(dict(entry))

    def _read(self) -> list[dict[str, Any]]:
        """The journal's whole lines; one torn by a kill or a full disk is cut off."""
        text = self._journal.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            os.truncate(self._journal, len(whole))
        return [json.loads(line) for line in whole.splitlines()]


class Work:
    """The folder ``DST.partial``, held by one process at a time. A context manager."""

    def __init__(self, dst: Path, *, overwrite: bool, restart: bool) -> None:
        """Look at ``dst``.

        Raises:
            ValueError: the destination exists and may not be overwritten, or cannot be made.
        """
        if dst.exists() and not overwrite:
            raise ValueError(f"dst={dst} exists. Name another folder, or give overwrite=true to replace it.")
        if dst.exists() and not dst.is_dir():
            raise ValueError(f"dst={dst} is not a folder. Name another one.")
        self.dst = dst
        self.folder = dst.with_name(dst.name + ".partial")
        self._restart = restart

    def __enter__(self) -> "Work":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{self.folder} cannot be made ({error.strerror}). Choose another dst."
            ) from None
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ValueError(
                f"{self.folder} is in use by another preparation. Wait for it, or choose another dst."
            ) from None
        if self._restart:
            for entry in self.folder.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def stage(self, name: str, settings: Mapping[str, Any], *, redo: bool = False) -> Stage:
        """Open the stage ``name`` to start or continue it; see :class:`Stage`."""
        return Stage(self.folder / name, settings, redo=redo)

    def publish(self, stage: Stage) -> None:
        """Make the output of the finished ``stage`` the destination, by a rename, and remove all else."""
        old = self.dst.with_name(self.dst.name + ".old")
        if self.dst.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.dst.rename(old)
        stage.out.rename(self.dst)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.folder)


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes ``path`` when it is complete and flushed to the disk."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _refuse_other(there: Mapping[str, Any], here: Mapping[str, Any], folder: Path) -> None:
    differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if differing:
        pairs = [(key, f"{there.get(key)} there, {here.get(key)} here") for key in differing]
        told = "; ".join(f"{key}: {pair if len(pair) <= _LONGEST else 'differs'}" for key, pair in pairs)
        raise ValueError(
            f"{folder} holds an unfinished preparation from other settings or inputs ({told}). "
            "Give the same ones to continue it, or restart=true to begin anew."
        )
