"""Where compiled kernels are kept: one folder for all backends, by the content of their sources."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

CACHE_VARIABLE = "TIGHTREC_CACHE"


def cache_folder() -> Path:
    """``$TIGHTREC_CACHE``, else ``~/.cache/tightrec``."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "tightrec")


def digest(paths: Iterable[Path], *also: str) -> str:
    """24 hexadecimal digits that change with the name or content of any file, or with what else is given."""
    state = hashlib.sha256(repr(also).encode())
    for path in sorted(paths):
        content = path.read_bytes()
        state.update(f"{path.name} {len(content)}\n".encode() + content)
    return state.hexdigest()[:24]
