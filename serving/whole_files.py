"""Files that appear whole or not at all."""

import os
from pathlib import Path


def write_whole(file: Path, content: bytes | str) -> None:
    """Write ``content``, text as UTF-8, to a file beside ``file`` and rename it; several processes may.

    Raises:
        OSError: the folder is not there or cannot be written to; ``file`` is as it was.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)
