"""How commands end: the status and the words of each thing that can stop one."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tightrec.formats.command import exit_status


def raising(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


def test_the_status_of_a_command_that_ends_is_its_own(capsys: pytest.CaptureFixture) -> None:
    assert [exit_status(lambda given=given: given, "nothing") for given in (0, 1, 7)] == [0, 1, 7]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ValueError("rows=0: give at least 1."), 2, "error: rows=0: give at least 1.\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            1,
            "error: a/b: No space left on device\n",
        ),
        (ImportError("no faiss"), 1, "error: no faiss\n"),
        (MemoryError(), 1, "error: out of memory\n"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written\n"),
    ],
)
def test_what_stops_a_command_is_said_on_stderr(
    error: BaseException, status: int, words: str, capsys: pytest.CaptureFixture
) -> None:
    assert exit_status(raising(error), "nothing was written") == status
    assert capsys.readouterr() == ("", words)


def test_a_mistake_of_the_program_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_status(raising(ZeroDivisionError()), "nothing")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_has_gone_ends_the_command_quietly(lines: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from tightrec.formats.command import exit_status\n"
        "def run():\n"
        "    sys.stdin.read()\n"
        f"    print('line\\n' * {lines})\n"
        "    return 0\n"
        "sys.exit(exit_status(run, 'nothing'))\n"
    )
    pipe = subprocess.PIPE
    # Buffered, as a user's Python is: what is left in the buffer is written, and fails, at the very end.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, script], stdin=pipe, stdout=pipe, stderr=pipe, env=buffered
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1
