"""Damaged and forged snapshots: changes to one that is whole, with checksums made to fit where asked."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tightrec.snapshot.manifest import MANIFEST


def forge_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply ``change`` to the manifest's values in place and give it the checksum that fits them."""
    values = json.loads((folder / MANIFEST).read_text())
    del values["sha256"]
    change(values)
    text = json.dumps(values, sort_keys=True)
    (folder / MANIFEST).write_text(
        json.dumps({**values, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    )


def forge_tensors(folder: Path, name: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Apply ``change`` to the tensors of the file ``name`` and write its new size and SHA-256 down."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    data = (folder / name).read_bytes()
    record = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge_manifest(folder, lambda values: values["files"].update({name: record}))


def flip_byte(path: Path, place: int = -1) -> None:
    """Change one byte of a file, its last one unless told."""
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
