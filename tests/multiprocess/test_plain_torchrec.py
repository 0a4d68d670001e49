"""codec=none without dedup is plain torchrec: the losses of the control program in benchmarks/, bit for bit;
dedup changes the order of sums only."""

import importlib.util
from pathlib import Path

import pytest
from jobs import SMALL
from ranks import run_ranks

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "plain_torchrec.py"
WORDS = [*SMALL, "data.synthetic.train_rows=6400", "data.synthetic.max_cardinality=300"]


def _both(rank: int, world: int, words: list[str]) -> dict[str, list[float]]:
    spec = importlib.util.spec_from_file_location("plain_torchrec", SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    config, _ = script.load(words)
    with script.connected("cpu", 60) as ranks:
        losses, _ = script.compared(config, ranks, steps=60, turn=20, compare=True)
    return losses


@pytest.mark.multiprocess
def test_sixty_steps_are_bit_identical_to_plain_torchrec():
    for losses in run_ranks(2, _both, [*WORDS, "codec.dedup=false"], connect=False, timeout=120):
        assert len(losses["plain"]) == 60
        assert losses["plain"] == losses["ours"]
        assert losses["plain"][-1] < losses["plain"][0]


@pytest.mark.multiprocess
def test_dedup_keeps_the_losses_of_plain_torchrec():
    for losses in run_ranks(2, _both, WORDS, connect=False, timeout=120):
        assert losses["ours"] == pytest.approx(losses["plain"], rel=0, abs=1e-6)


@pytest.mark.multiprocess
def test_the_comparison_notices_another_codec():
    for losses in run_ranks(
        2, _both, [*WORDS, "codec=fp16", "codec.dedup=false"], connect=False, timeout=120
    ):
        assert losses["plain"] != losses["ours"]
