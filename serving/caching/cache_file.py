"""The file that keeps what was built for a cache: safetensors, with what it was built for beside it."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tightrec.serving.whole_files import write_whole

FORMAT = "tightrec cache 1"
"""Of the layout; a file of another one is built anew."""


_KEY = "tightrec"
"""Of the one entry of the metadata: safetensors writes several in an order that changes."""


class Unusable(ValueError):
    """A cache's file is not what is wanted; says why."""


def write(file: Path, tensors: Mapping[str, Tensor], values: Mapping[str, str]) -> None:
    """Write ``tensors`` and ``values`` whole or not at all; several processes may write the same file.

    Raises:
        OSError: the folder is not there or cannot be written to.
    """
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = json.dumps({**values, "format": FORMAT, "digest": _digest(kept)})
    write_whole(file, save(kept, {_KEY: metadata}))


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and values of ``file``.

    Raises:
        Unusable: no such file, of another format, or damaged.
    """
    try:
        with safe_open(file, "pt") as opened:
            values = json.loads((opened.metadata() or {}).get(_KEY, "{}"))
            if values.get("format") != FORMAT:
                raise Unusable(f"{file} has another format")
            # A copy: the mapped file may be replaced by another process, and its pages read late.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise Unusable(f"there is no {file} yet") from None
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise Unusable(f"{file} cannot be read ({str(error).splitlines()[0]})") from None
    if values.get("digest") != _digest(tensors):
        raise Unusable(f"{file} is damaged: its SHA-256 differs")
    return tensors, values


@contextmanager
def locked(file: Path | None) -> Iterator[None]:
    """Wait until no other process has this for a file in the same folder; None, or no lock to be had: go on.

    It is the folder that is locked, so that nothing is left behind.
    """
    if file is None:
        yield
        return
    folder = None
    try:
        with suppress(OSError):
            folder = os.open(file.parent, os.O_RDONLY)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        if folder is not None:
            os.close(folder)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy())
    return found.hexdigest()
