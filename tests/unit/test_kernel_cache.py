"""Compiled loops are kept by the content of all sources, and a folder that cannot be written is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tightrec.kernels.cache import CACHE_VARIABLE, cache_folder, digest
from tightrec.kernels.cpu import jit


def test_the_digest_follows_content_names_and_what_else_is_given(tmp_path: Path) -> None:
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text("x = 1")
    second.write_text("y = 1")
    seen = {digest([first]), digest([second]), digest([first, second]), digest([first], "sm_90")}
    assert digest([second, first]) == digest([first, second])
    first.write_text("x = 2")
    assert len({*seen, digest([first]), digest([first, second])}) == 6


def test_loops_are_kept_in_a_folder_of_these_very_sources() -> None:
    folder = jit._FOLDER
    assert folder is not None
    sources = [*Path(jit.__file__).parent.glob("*.py"), Path(jit.__file__).parents[1] / "format.py"]
    assert folder.name == f"numba-{digest(sources)}"
    kept = jit.loop(lambda start, stop: None)
    assert str(folder) in kept._cache.cache_path
    assert not os.environ.get("NUMBA_CACHE_DIR") or str(folder).startswith(os.environ["NUMBA_CACHE_DIR"])


def test_a_folder_that_cannot_be_written_is_told_and_nothing_breaks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    environment[CACHE_VARIABLE] = str(tmp_path / "file" / "cache")
    code = (
        "from tightrec.kernels.cpu import jit; import numpy\n"
        "@jit.loop\n"
        "def double(start, stop, values):\n"
        "    for i in range(start, stop):\n"
        "        values[i] *= 2\n"
        "values = numpy.ones(3)\n"
        "double(0, 2, values)\n"
        "print(values.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "[2.0, 2.0, 1.0]\n", done.stderr
    assert "cannot be kept in" in done.stderr and "Set TIGHTREC_CACHE" in done.stderr


def test_the_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "tightrec"
