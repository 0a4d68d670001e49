"""Checkpoint folders on disk: names, manifest, verification, publishing, and which ones are kept.

    FOLDER/step-00000100/               whole: it was renamed last
        manifest.json                   every other file's size and CRC-32, step, world, extra
        .metadata, __0_0.distcp, ...    written by torch.distributed.checkpoint
    FOLDER/step-00000200.partial/       being written, or being deleted
    FOLDER/step-00000100.old/           about to be replaced by a second checkpoint of the same step
    FOLDER/step-00000300.abandoned/     written before the job went back to an earlier step

Nothing here knows tensors or ranks.
"""

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 22
_WHOLE = re.compile(r"step-(\d{8,})")


class DamagedCheckpoint(ValueError):
    """A checkpoint that must not be loaded; the message names the file and offers the one before."""

    def __init__(self, path: Path, problem: str) -> None:
        before = [
            p for p in find_checkpoints(path.parent) if step_of(p) < step_of(path) and not quick_check(p)
        ]
        self.path = path
        """The refused checkpoint."""
        self.problem = problem
        """What is wrong with it, naming the file."""
        self.before: Path | None = before[-1] if before else None
        """The newest complete one of an earlier step, if any."""
        offer = (
            f"The one before it is {self.before}: load that one, or move {path.name} away."
            if self.before
            else "There is no complete one before it: start again."
        )
        super().__init__(f"The checkpoint {path} is damaged: {problem}. {offer}")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What one file must look like."""

    size_bytes: int
    """Its length."""

    crc32: str
    """CRC-32 of its contents, eight hexadecimal digits."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of; written last, so its presence says that the rest is there."""

    step: int
    """Steps trained."""

    world: int
    """Number of ranks that wrote it."""

    files: dict[str, FileRecord]
    """Every file beside the manifest, by name."""

    extra: dict[str, Any] = field(default_factory=dict)
    """What the caller saved beside tensors, as JSON."""

    torch: str = ""
    """The torch version that wrote it."""

    format_version: int = FORMAT_VERSION
    """Version of this layout."""


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` stands in ``folder``."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, -1 for a folder named otherwise."""
    match = _WHOLE.fullmatch(path.name)
    return int(match[1]) if match else -1


def find_checkpoints(folder: Path) -> list[Path]:
    """Every finished checkpoint of ``folder``, oldest step first; none of them is opened."""
    if not folder.is_dir():
        return []
    found = (entry for entry in folder.iterdir() if _WHOLE.fullmatch(entry.name) and entry.is_dir())
    return sorted(found, key=step_of)


def latest_complete(folder: Path) -> Path | None:
    """The newest checkpoint whose manifest reads and whose files have the right sizes."""
    return next((path for path in reversed(find_checkpoints(folder)) if quick_check(path) is None), None)


def record_of(path: Path) -> FileRecord:
    """Size and CRC-32 of a file, read in pieces of 4 MiB."""
    size_bytes, crc = 0, 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            size_bytes += len(piece)
            crc = zlib.crc32(piece, crc)
    return FileRecord(size_bytes=size_bytes, crc32=f"{crc:08x}")


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint ``path``.

    Raises:
        ValueError: no such checkpoint, or one of another format version.
        DamagedCheckpoint: the manifest is missing or unreadable.
    """
    if not path.is_dir():
        raise ValueError(f"There is no checkpoint {path}.{_instead(path.parent)}")
    try:
        text = (path / MANIFEST).read_text()
        values = json.loads(text)
        crc = values.pop("crc32")
        if values["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{path} has checkpoint format {values['format_version']}; this tightrec reads "
                f"{FORMAT_VERSION}. Load it with the tightrec that wrote it."
            )
        if crc != _crc_of(values):
            raise DamagedCheckpoint(path, f"{MANIFEST} does not match its own checksum")
        records = {name: FileRecord(**record) for name, record in values.pop("files").items()}
        return Manifest(**values, files=records)
    except FileNotFoundError:
        raise DamagedCheckpoint(path, f"{MANIFEST} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        detail = str(error) or type(error).__name__
        raise DamagedCheckpoint(path, f"{MANIFEST} is unreadable ({detail})") from None


def quick_check(path: Path) -> str | None:
    """What is wrong with a checkpoint as far as manifest and file sizes tell; None: nothing."""
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return str(error)
    problems = (_size_problem(path / name, record) for name, record in manifest.files.items())
    return next((problem for problem in problems if problem), None)


def check_files(path: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """What is wrong with the files ``names`` of a checkpoint, contents included; None: nothing."""
    for name in names:
        expected = manifest.files[name]
        problem = _size_problem(path / name, expected)
        if problem:
            return problem
        try:
            crc32 = record_of(path / name).crc32
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if crc32 != expected.crc32:
            return f"{name} has checksum {crc32} where the manifest says {expected.crc32}"
    return None


def verify(path: Path) -> Manifest:
    """Read every file of a checkpoint and compare it with the manifest, which is returned.

    Raises:
        ValueError: no such checkpoint, or one of another format version.
        DamagedCheckpoint: a file is missing, short, long or altered, or the manifest is.
    """
    manifest = read_manifest(path)
    problem = check_files(path, manifest, manifest.files)
    if problem:
        raise DamagedCheckpoint(path, problem)
    return manifest


def partial_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is written before it is whole."""
    whole = path_of(folder, step)
    return whole.with_name(whole.name + ".partial")


def make_partial(folder: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of ``step`` into."""
    partial = partial_of(folder, step)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def publish(folder: Path, manifest: Manifest) -> Path:
    """Write the manifest into the partial folder of its step, and rename that to its final name.

    Every file and folder is flushed to the disk before the rename, so that what carries the final
    name is whole even after a power cut.
    """
    partial, whole = partial_of(folder, manifest.step), path_of(folder, manifest.step)
    values = asdict(manifest)
    with (partial / MANIFEST).open("w") as file:
        json.dump({**values, "crc32": _crc_of(values)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    flush_folder(partial)
    old = whole.with_name(whole.name + ".old")
    if whole.exists():
        whole.rename(old)
    partial.rename(whole)
    flush_folder(folder)
    if old.exists():
        _delete(old)
    return whole


def retire(folder: Path, step: int, keep: int) -> None:
    """Once the checkpoint of ``step`` is whole: keep the last ``keep`` up to it, set later ones aside.

    A checkpoint of a later step was written before the job went back to an earlier one; it belongs to
    an abandoned course, is renamed to ``*.abandoned`` and never deleted or loaded by itself.
    """
    found = find_checkpoints(folder)
    for later in (path for path in found if step_of(path) > step):
        aside = later.with_name(later.name + ".abandoned")
        if aside.exists():
            shutil.rmtree(aside)
        later.rename(aside)
        warnings.warn(
            f"{later.name} is of a later step than the checkpoint just written ({step}), so it belongs to a "
            f"course that was left; it is kept as {aside}.",
            stacklevel=2,
        )
    for older in [path for path in found if step_of(path) <= step][:-keep]:
        _delete(older)


def tidy(folder: Path) -> None:
    """Remove what a killed job left half-written or half-deleted; call it before the first save."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("step-*.old"):
        whole = old.with_suffix("")
        if whole.exists():
            _delete(old)
        else:
            old.rename(whole)
    for partial in folder.glob("step-*.partial"):
        shutil.rmtree(partial)


def _delete(path: Path) -> None:
    # Renamed first: a kill in the middle must not leave half a checkpoint under a whole one's name.
    partial = path.with_name(path.name.removesuffix(".old") + ".partial")
    path.rename(partial)
    shutil.rmtree(partial)


def _size_problem(file: Path, expected: FileRecord) -> str | None:
    try:
        size_bytes = file.stat().st_size
    except FileNotFoundError:
        return f"{file.name} is missing"
    if size_bytes != expected.size_bytes:
        return f"{file.name} has {size_bytes:,} bytes where the manifest says {expected.size_bytes:,}"
    return None


def _crc_of(values: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it outlives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _instead(folder: Path) -> str:
    newest = latest_complete(folder)
    return f" The newest complete one there is {newest}." if newest else f" {folder} holds no complete one."
