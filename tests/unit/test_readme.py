"""The trainer's commands in README.md and in conf/ compose, so that copying them works."""

import re
import shlex
from pathlib import Path

import pytest

from tightrec.trainer.config import load

ROOT = Path(__file__).resolve().parents[2]


def _words_after_the_trainer() -> list[list[str]]:
    text = (ROOT / "README.md").read_text()
    lines = [line.split("  #")[0].split(" # ")[0] for line in text.splitlines()]
    found = [line.removeprefix("$T ") for line in lines if line.startswith("$T ")]
    found += re.findall(r'make train ARGS="([^"]*)"', text)
    words = [shlex.split(each) for each in found]
    # A run folder of the reader's own cannot be resumed here.
    return [w for w in words if not any(word.startswith("resume=") for word in w)]


def _words_of_conf() -> list[list[str]]:
    found = []
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        command = next(line for line in path.read_text().splitlines() if "-m tightrec.trainer" in line)
        words = shlex.split(command.split("-m tightrec.trainer")[1], comments=True)
        found.append([word for word in words if not word.startswith("[")])
    return found


@pytest.mark.parametrize("words", _words_after_the_trainer() + _words_of_conf(), ids=" ".join)
def test_a_command_of_the_readme_or_of_conf_composes(words):
    load(words)


def test_the_readme_has_commands_to_compose():
    assert len(_words_after_the_trainer()) >= 5
    assert len(_words_of_conf()) >= 30
