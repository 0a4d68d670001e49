"""Reading a trainer's checkpoint on one process, one tensor at a time, whatever ranks and sharding wrote it.

A checkpoint (:mod:`tightrec.formats.checkpoint_files`) holds tensors in pieces, as the ranks held them:
whole tables, blocks of rows, blocks of columns, or both. Its ``.metadata`` says which piece lies where. That
file is a pickle by torch.distributed.checkpoint, so opening a checkpoint runs what its writer put there:
open only checkpoints that you trust. A snapshot made of one holds no pickle.

Nothing here joins a process group. Legend: R rows of a table, D embedding dim.
"""

import difflib
import hashlib
import io
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from tightrec.formats import checkpoint_files as files
from tightrec.formats.run_folder import CHECKPOINTS
from tightrec.formats.schema import SCHEMA_FILE, Schema
from tightrec.formats.settings import from_mapping
from tightrec.models.config import ModelConfig, table_name
from tightrec.models.representation import with_dhe, with_table
from tightrec.snapshot.model import DECODER_KEYS

_MODEL = "model.model."
"""What stands before the names of the DLRM's state dict: it is the member ``model`` of the task, and the task
is the member ``model`` of what is saved."""

_TABLES = "sparse_arch.embedding_bag_collection.embedding_bags."


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One complete, verified checkpoint. Holds no weights and no open file."""

    path: Path
    """Its folder, absolute and free of links."""

    step: int
    """Steps trained."""

    fingerprint: str
    """SHA-256 of its manifest.json, which holds every file's checksum; 64 hexadecimal digits."""

    model: ModelConfig
    """Shape of the model."""

    schema: Schema
    """The columns that it was trained on, in order. Names no splits."""

    data: str | None
    """The prepared folder that holds the rows, as far as is known; it may be gone. None: there are no
    held-out rows."""

    metadata: Metadata = field(repr=False)
    """Where every piece of every tensor lies."""

    def table(self, name: str) -> Tensor:
        """The table ``name`` (``t_FEATURE``), float32 [R, D], in memory once.

        Raises:
            ValueError: there is no such table, or a file is gone or unreadable.
        """
        return self._read(f"{_TABLES}{name}.weight")

    def parameter(self, key: str) -> Tensor:
        """The tensor ``key`` of the state dict of :class:`tightrec.models.dlrm.DLRM`, as float32.

        Raises:
            ValueError: as :meth:`table`.
        """
        return self._read(key)

    def _read(self, key: str) -> Tensor:
        entry = self.metadata.state_dict_metadata.get(_MODEL + key)
        if not isinstance(entry, TensorStorageMetadata):
            known = [name.removeprefix(_MODEL) for name in self.metadata.state_dict_metadata]
            near = difflib.get_close_matches(key, known, n=1)
            meant = f" The nearest name is {near[0]}." if near else ""
            raise ValueError(f"{self.path} holds no tensor {key} of a model.{meant}")
        offsets = [tuple(chunk.offsets) for chunk in entry.chunks]
        if len(offsets) == 1 and entry.chunks[0].sizes == entry.size:
            return self._piece(key, offsets[0]).float()
        whole = torch.empty(entry.size, dtype=torch.float32)
        filled = 0
        for chunk in entry.chunks:
            place = whole
            for dimension, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                place = place.narrow(dimension, start, length)
            if place.numel():
                place.copy_(self._piece(key, tuple(chunk.offsets)))
                filled += place.numel()
        if filled != whole.numel():
            raise files.DamagedCheckpoint(
                self.path, f".metadata places {filled:,} of the {whole.numel():,} values of {key}"
            )
        return whole

    def _piece(self, key: str, offset: tuple[int, ...]) -> Tensor:
        # dcp.load would need the target beside the piece that it reads: a whole table twice.
        place = self.metadata.storage_data[MetadataIndex(_MODEL + key, offset)]
        try:
            with (self.path / place.relative_path).open("rb") as file:
                part: Any = _Part(file, place.offset, place.length)
                return torch.load(part, map_location="cpu", weights_only=True)
        except OSError as error:
            raise ValueError(
                f"{self.path / place.relative_path} cannot be read ({error.strerror}). If a running job has "
                "deleted this checkpoint meanwhile, open its newest one, or have the job keep more "
                "(train.checkpoint.keep)."
            ) from None


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint of the trainer and verify every one of its files.

    Args:
        path: a run folder or its ``checkpoints`` folder (the newest complete checkpoint is taken), one
            ``step-...`` folder, or a link to any of them, such as ``runs/latest``.

    Raises:
        ValueError: there is no complete checkpoint, or one that does not say what model it holds.
        DamagedCheckpoint: naming the file, and the checkpoint before it.
    """
    found = _find(Path(path))
    manifest = files.verify(found)
    extra = manifest.extra
    missing = [name for name in ("model", "schema", "data") if name not in extra]
    if missing:
        raise ValueError(
            f"The checkpoint {found} does not say which model and columns it holds: a tightrec before "
            f"snapshots wrote it. Continue its run with resume={_run_of(found)} "
            "train.checkpoint.every_steps=0, which saves a new one at the end, and use that."
        )
    where = f"{found / files.MANIFEST}: "
    metadata = FileSystemReader(found).read_metadata()
    checkpoint = Checkpoint(
        path=found,
        step=manifest.step,
        fingerprint=hashlib.sha256((found / files.MANIFEST).read_bytes()).hexdigest(),
        model=from_mapping(ModelConfig, extra["model"], where + "model"),
        schema=_schema(extra["schema"], manifest.step, where + "schema"),
        data=_data(extra["data"], found),
        metadata=metadata,
    )
    _require_shapes(checkpoint)
    return checkpoint


def _find(path: Path) -> Path:
    """The folder of the checkpoint that ``path`` means."""
    if files.step_of(path) >= 0:
        # Verification says it if this one does not exist, and names the newest one that does.
        return path.resolve()
    if not path.is_dir():
        raise ValueError(
            f"There is no folder {path}. Give a run folder, which the trainer prints at its start, or one "
            "checkpoint in it."
        )
    # So that a link such as runs/latest means one run from here on, even if it is moved meanwhile.
    folder = path.resolve()
    if (folder / files.MANIFEST).is_file():
        return folder
    if (folder / CHECKPOINTS).is_dir():
        folder = folder / CHECKPOINTS
    newest = files.latest_complete(folder)
    if newest is not None:
        return newest
    named = files.find_checkpoints(folder)
    if named:
        # Tells what is wrong with the newest, by file.
        files.verify(named[-1])
    raise ValueError(
        f"There is no complete checkpoint in {folder}. Give a run folder in which the trainer has saved one."
    )


def _run_of(path: Path) -> Path:
    return path.parent.parent if path.parent.name == CHECKPOINTS else path


def _schema(values: Mapping[str, Any], step: int, where: str) -> Schema:
    described = {**values, "rows": {}, "source": f"a checkpoint of step {step}"}
    return from_mapping(Schema, described, where)


def _data(named: str | None, path: Path) -> str | None:
    """Where the rows are: beside the checkpoints if they were there, since the run may have been moved."""
    if named is None:
        return None
    beside = _run_of(path) / Path(named).name
    return str(beside if (beside / SCHEMA_FILE).is_file() else Path(named))


def _require_shapes(checkpoint: Checkpoint) -> None:
    """Compare the shapes of tables and decoders with the columns.

    Raises:
        ValueError: also where the model's representation names a feature that is not there.
    """
    for key, named, wanted in _shapes(checkpoint):
        entry = checkpoint.metadata.state_dict_metadata.get(_MODEL + key)
        found = tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        if found != wanted:
            held = "none" if found is None else found
            raise ValueError(
                f"The checkpoint {checkpoint.path} describes a {named} of shape {wanted}, but holds {held}. "
                "It is not one of the trainer's; save it again."
            )


def _shapes(checkpoint: Checkpoint) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Key, name in words and shape of every parameter that depends on the columns."""
    model = checkpoint.model
    columns = [(column.name, column.cardinality) for column in checkpoint.schema.sparse]
    tables = with_table(columns, model.representation)
    for name, cardinality in columns:
        if name in tables:
            table = table_name(name)
            yield f"{_TABLES}{table}.weight", f"table {table}", (cardinality, model.embedding_dim)
    hashed = len(with_dhe(columns, model.representation))
    widths = (model.representation.hashes, *model.representation.decoder, model.embedding_dim)
    for place, (inputs, outputs) in enumerate(itertools.pairwise(widths) if hashed else ()):
        for part, shape in (("weights", (hashed, outputs, inputs)), ("biases", (hashed, outputs))):
            key = f"{DECODER_KEYS}.{part}.{place}"
            yield key, f"tensor {key}", shape


class _Part(io.RawIOBase):
    """Bytes ``start`` to ``start + length`` of a file, as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._file = file
        self._start = start
        self._length = length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return count
