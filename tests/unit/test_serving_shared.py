"""What the parts of serving share: the event loop, and files that are written whole."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tightrec.serving.loops import new_event_loop
from tightrec.serving.whole_files import write_whole


@pytest.mark.parametrize("installed", [True, False])
def test_the_loop_is_uvloops_where_that_is_installed(monkeypatch: Any, installed: bool) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "uvloop", None)
    loop = new_event_loop()
    try:
        assert isinstance(loop, uvloop.Loop) is installed
    finally:
        loop.close()


def test_a_file_is_replaced_whole_and_open_to_whom_the_umask_lets(tmp_path: Path) -> None:
    file = tmp_path / "file"
    before = os.umask(0o022)
    try:
        write_whole(file, "\u00e9\n")
        assert (file.read_bytes(), file.stat().st_mode & 0o777) == (b"\xc3\xa9\n", 0o644)
    finally:
        os.umask(before)
    write_whole(file, b"\x00")
    assert (file.read_bytes(), list(tmp_path.iterdir())) == (b"\x00", [file])


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as opened:
            opened.write(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, "new")
    assert (file.read_text(), list(tmp_path.iterdir())) == ("old", [file])
