"""Files that a command writes at its end: whether it can is found out at its beginning."""

import tempfile
from pathlib import Path


def require_writable(setting: str, file: Path) -> None:
    """Refuse a ``file`` that could not be written.

    Args:
        setting: its name, for messages.

    Raises:
        ValueError: it is a folder, or its folder is missing or takes no files.
    """
    folder = file.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{setting}={file}: there is no folder {file.parent}. Make it first.")
    if file.is_dir():
        raise ValueError(f"{setting}={file} is a folder. Name a file.")
    try:
        # Rights alone do not tell: root has all of them in /proc, where nobody can make a file.
        with tempfile.NamedTemporaryFile(prefix=".", suffix=".partial", dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{setting}={file}: the folder {file.parent} takes no files ({error.strerror})."
        ) from None
