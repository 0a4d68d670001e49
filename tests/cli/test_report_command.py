"""``python -m tightrec.trainer.report`` builds a page again and tells mistakes in a sentence."""

import subprocess
import sys
from pathlib import Path

import pytest

from tightrec.trainer.report.__main__ import main
from tightrec.trainer.report.records import write_run


def test_the_command_writes_the_page_of_each_folder_given(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        write_run(folder, {"name": folder.name, "status": "finished"})
    words = [sys.executable, "-m", "tightrec.trainer.report", *map(str, folders)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(folder / "report.html") for folder in folders]
    assert "<title>two" in (folders[1] / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [([], "usage:"), (["--frobnicate"], "usage:"), (["nowhere"], "is not the folder of a run")],
)
def test_mistakes_end_with_2_and_a_sentence(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert told in capsys.readouterr().err
