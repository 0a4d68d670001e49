"""The programs of examples/ run as their docstrings say, learn alike, and read each other's checkpoints."""

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PLAIN, COMPRESSED = EXAMPLES / "minimal_torchrec.py", EXAMPLES / "compressed_torchrec.py"
STEPS = 101


class Runs(NamedTuple):
    """Losses as printed, and folders of checkpoints."""

    plain: list[float]
    compressed: list[float]
    folder: Path


def losses(program: Path, *words: str) -> list[float]:
    torchrun = Path(sys.executable).with_name("torchrun")
    done = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node", "2", program, *words],
        capture_output=True,
        text=True,
        timeout=140,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", done.stdout)]
    assert len(found) == STEPS // 20 + 1, done.stdout
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("examples")
    return Runs(
        plain=losses(PLAIN, "--save", str(folder / "plain")),
        compressed=losses(COMPRESSED, "--save", str(folder / "compressed")),
        folder=folder,
    )


def test_the_two_programs_differ_in_the_line_that_the_readme_shows():
    before, after = PLAIN.read_text().splitlines(), COMPRESSED.read_text().splitlines()
    changed = [line for line in difflib.ndiff(before, after) if line.startswith(("+ ", "- "))]
    assert [line[0] for line in changed] == ["-", "+"]
    assert "import EmbeddingBagCollectionSharder" in changed[0]
    shown = (EXAMPLES.parent / "README.md").read_text().splitlines()
    assert {line[0] + line[2:] for line in changed} <= set(shown)


@pytest.mark.multiprocess
def test_the_compressed_program_learns_as_the_plain_one_does(runs: Runs):
    assert runs.plain[-1] < 0.1 * runs.plain[0]
    assert runs.compressed == pytest.approx(runs.plain, rel=0.05)
    assert runs.compressed != runs.plain, "nothing was quantised"


@pytest.mark.multiprocess
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_plain_torchrec_goes_on_from_the_compressed_programs_checkpoint(runs: Runs):
    theirs, ours = held(runs.folder / "plain"), held(runs.folder / "compressed")
    assert sum("momentum" in name for name in theirs) == 2
    assert {name: value.shape for name, value in ours.items()} == {n: v.shape for n, v in theirs.items()}
    for name, value in theirs.items():
        assert (ours[name] - value).norm() < 0.2 * value.norm(), name
    assert losses(PLAIN, "--load", str(runs.folder / "compressed"))[0] < 1.1 * runs.compressed[-1]


def held(path: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds, by name."""
    reader = FileSystemReader(path)
    entries = reader.read_metadata().state_dict_metadata
    held = {name: torch.empty(entry.size) for name, entry in entries.items()}
    checkpoint.load(held, storage_reader=reader, no_dist=True)
    return held
