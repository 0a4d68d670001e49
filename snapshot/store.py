"""Snapshot folders on disk: written, checked and read.

    OUT/manifest.json                     everything but weights, every file's SHA-256; written last
    OUT/dense.safetensors                 the dense layers
    OUT/tables/t_NAME.safetensors         one file a table: tensor ``rows``, uint8 [R, bytes of a row]

Weights are plain tensors in safetensors files and values are JSON: nothing is unpickled.
"""

import errno
import hashlib
import os
import re
import stat
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tightrec.snapshot.layers import ACTIVATION_BITS, DTYPES, StoredLayer
from tightrec.snapshot.manifest import (
    MANIFEST,
    DamagedSnapshot,
    FileRecord,
    LayerRecord,
    SnapshotManifest,
    TableRecord,
    from_text,
    plain,
    read_manifest,
    to_text,
)
from tightrec.snapshot.packed import row_bytes
from tightrec.snapshot.publish import flush_folder, partial_of, publish, tidy

__all__ = [
    "DENSE_FILE",
    "SnapshotWriter",
    "check",
    "partial_of",
    "publish",
    "read_dense",
    "read_manifest",
    "read_table",
    "tidy",
]

DENSE_FILE = "dense.safetensors"
"""Tensors ``layers/NAME/weight``, ``.../bias``, ``.../scale`` and ``extras/NAME``."""

_ROWS = "rows"
_LONGEST_NAME = 120
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


class SnapshotWriter:
    """Writes one snapshot into a folder of its own.

    Args:
        folder: does not exist yet or is empty; :func:`publish` renames it once it is whole.

    Raises:
        ValueError: the folder holds something.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is there already: a snapshot is written into a folder of its own.")
        (folder / "tables").mkdir(parents=True)
        self.folder = folder
        self._files: dict[str, FileRecord] = {}
        self._tables: list[TableRecord] = []
        self._layers: dict[str, LayerRecord] = {}

    def write_table(self, name: str, kind: str, dim: int, data: Tensor) -> None:
        """Write the table ``name`` of ``kind``: ``data`` uint8 [R, row_bytes(kind, dim)].

        Tables are written in the order of their features.

        Raises:
            ValueError: another type or shape, or a table of that name was written.
        """
        wanted = (data.shape[0], row_bytes(kind, dim))
        if data.dtype != torch.uint8 or tuple(data.shape) != wanted:
            raise ValueError(f"table {name}: {data.dtype} {list(data.shape)} is not uint8 {list(wanted)}.")
        file = _table_file(name)
        if file in self._files:
            raise ValueError(f"table {name}: {file} was written already. Give every table a name of its own.")
        self._save(file, {_ROWS: data})
        self._tables.append(TableRecord(name=name, kind=kind, rows=len(data), dim=dim, file=file))

    def write_dense(self, layers: Mapping[str, StoredLayer], extras: Mapping[str, Tensor]) -> None:
        """Write all dense layers, in the order in which they run, and the small tensors that stay float32.

        Raises:
            ValueError: a value is not finite; names the layer.
        """
        tensors = {f"extras/{name}": tensor for name, tensor in extras.items()}
        for name, layer in layers.items():
            tensors |= {
                f"layers/{name}/{part}": tensor
                for part, tensor in (("weight", layer.weight), ("bias", layer.bias), ("scale", layer.scale))
                if tensor is not None
            }
            outputs, inputs = layer.weight.shape
            self._layers[name] = LayerRecord(
                kind=layer.kind,
                outputs=outputs,
                inputs=inputs,
                bias=layer.bias is not None,
                activation=layer.activation,
            )
        for name, tensor in tensors.items():
            _refuse_not_finite(name, tensor)
        self._save(DENSE_FILE, tensors)

    def write_file(self, name: str, data: bytes) -> None:
        """Write a file that goes with the snapshot, such as a plot; it is checked like the weights."""
        with self.new_file(name) as path:
            path.write_bytes(data)

    @contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """The path to write such a file to; it is taken into the manifest when the block ends."""
        yield self.folder / name
        self._files[name] = _flushed_record(self.folder / name)

    def finish(
        self,
        *,
        step: int,
        source: Mapping[str, Any],
        model: Any,
        features: Mapping[str, Any],
        plan: Any,
        verification: Mapping[str, Any] | None = None,
        score_histogram: Mapping[str, Any] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> SnapshotManifest:
        """Write the manifest, after which the folder is a snapshot; arguments as in its fields.

        It may be called again, with what only a loaded snapshot tells: the new manifest is renamed over the
        old one. ``model`` and ``plan`` may be dataclasses.
        """
        manifest = SnapshotManifest(
            step=step,
            source=plain(source),
            model=plain(model),
            features=plain(features),
            plan=plain(plan),
            tables=tuple(self._tables),
            layers=self._layers,
            activation_bits=ACTIVATION_BITS,
            files=self._files,
            verification=plain(verification),
            score_histogram=plain(score_histogram),
            notes=plain(notes or {}),
        )
        flush_folder(self.folder / "tables")
        return _write_manifest(self.folder, manifest)

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        path = self.folder / name
        # safetensors makes files that only their owner may read: one made as others are tells the mode.
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)
        try:
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, path)
        except SafetensorError as error:
            raise _as_os_error(error, path) from error
        path.chmod(mode)
        self._files[name] = _flushed_record(path)


def check(folder: Path, manifest: SnapshotManifest, *, contents: bool = True) -> None:
    """Compare every file of a snapshot with its manifest; files that it does not name are let be.

    Args:
        contents: read every file and compare its SHA-256; without, only sizes.

    Raises:
        DamagedSnapshot: a file is missing, short, long or altered; names it.
    """
    for name, expected in manifest.files.items():
        try:
            size_bytes = (folder / name).stat().st_size
            if size_bytes != expected.size_bytes:
                problem = f"{name} has {size_bytes:,} bytes where the manifest says {expected.size_bytes:,}"
                raise DamagedSnapshot(folder, problem)
            if contents and _sha256(folder / name) != expected.sha256:
                raise DamagedSnapshot(folder, f"{name} does not have the SHA-256 that the manifest says")
        except FileNotFoundError:
            raise DamagedSnapshot(folder, f"{name} is missing") from None
        except OSError as error:
            raise DamagedSnapshot(folder, f"{name} cannot be read ({error.strerror})") from None


def read_table(folder: Path, table: TableRecord) -> Tensor:
    """The rows of a table, uint8 [R, bytes of a row], mapped from its file instead of read.

    Raises:
        DamagedSnapshot: the file does not hold what the manifest says.
    """
    rows = dict(_tensors(folder, table.file)).get(_ROWS)
    wanted = [table.rows, row_bytes(table.kind, table.dim)]
    if rows is None or rows.dtype != torch.uint8 or list(rows.shape) != wanted:
        found = "no such tensor" if rows is None else f"{rows.dtype} {list(rows.shape)}"
        raise DamagedSnapshot(
            folder, f"{table.file}: {_ROWS!r} should be torch.uint8 {wanted}, found {found}"
        )
    return rows


def read_dense(folder: Path, manifest: SnapshotManifest) -> tuple[dict[str, StoredLayer], dict[str, Tensor]]:
    """The dense layers by name, in order, and the small tensors that stay float32.

    Raises:
        DamagedSnapshot: the file does not hold what the manifest says, or values that are not finite.
    """
    found = {name: tensor.clone() for name, tensor in _tensors(folder, DENSE_FILE)}
    wanted: dict[str, tuple[torch.dtype, list[int]]] = {}
    for name, layer in manifest.layers.items():
        wanted[f"layers/{name}/weight"] = (DTYPES[layer.kind], [layer.outputs, layer.inputs])
        if layer.bias:
            wanted[f"layers/{name}/bias"] = (torch.float32, [layer.outputs])
        if layer.kind == "int8":
            wanted[f"layers/{name}/scale"] = (torch.float32, [layer.outputs])
    extras = {name.removeprefix("extras/"): t for name, t in found.items() if name.startswith("extras/")}
    wanted |= {f"extras/{name}": (torch.float32, list(tensor.shape)) for name, tensor in extras.items()}
    for name in wanted | found:
        if name not in found or name not in wanted:
            which = "lacks" if name in wanted else "holds an unknown"
            raise DamagedSnapshot(folder, f"{DENSE_FILE} {which} {name}")
        dtype, shape = wanted[name]
        if (found[name].dtype, list(found[name].shape)) != (dtype, shape):
            raise DamagedSnapshot(
                folder,
                f"{DENSE_FILE}: {name} should be {dtype} {shape}, found {found[name].dtype} "
                f"{list(found[name].shape)}",
            )
        try:
            _refuse_not_finite(name, found[name])
        except ValueError as error:
            raise DamagedSnapshot(folder, f"{DENSE_FILE}: {error}".rstrip(".")) from None
    layers = {
        name: StoredLayer(
            kind=layer.kind,
            weight=found[f"layers/{name}/weight"],
            bias=found.get(f"layers/{name}/bias"),
            scale=found.get(f"layers/{name}/scale"),
            activation=layer.activation,
        )
        for name, layer in manifest.layers.items()
    }
    return layers, extras


def _tensors(folder: Path, file: str) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise DamagedSnapshot(folder, f"{file} is not a whole safetensors file ({error})") from None


def _write_manifest(folder: Path, manifest: SnapshotManifest) -> SnapshotManifest:
    text = to_text(manifest)
    # Read back before it is written: what the loader would refuse is not written.
    again = from_text(text, folder)
    partial = folder / f"{MANIFEST}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / MANIFEST)
    flush_folder(folder)
    return again


def _table_file(name: str) -> str:
    """A file name for any table's name: letters, digits, _ and - stay, the rest becomes %XX."""
    safe = urllib.parse.quote(name, safe="").replace(".", "%2E").replace("~", "%7E")
    if len(safe) > _LONGEST_NAME:
        safe = f"{safe[: _LONGEST_NAME - 20]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return f"tables/{safe}.safetensors"


def _refuse_not_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds a value that is not finite.")


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    """What the system refused, such as room on a full disk: safetensors tells it in words alone."""
    found = _SYSTEM_ERROR.search(str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, f"the file cannot be written: {os.strerror(number)}", str(path))


def _flushed_record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileRecord(size_bytes=path.stat().st_size, sha256=_sha256(path))


def _sha256(path: Path) -> str:
    # In pieces of 256 KiB, whatever the size of the file.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
