"""Real data from its published files to a trained model, a few steps each."""

from pathlib import Path

import pytest
from jobs import job, losses, summary

from tightrec.trainer.data.prepare.__main__ import main as prepare

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
FEW = ["train.steps=12", "logging.tensorboard=false", "logging.split_every=0", "logging.every_steps=4"]

pytestmark = [pytest.mark.multiprocess, pytest.mark.data]


def _prepared(folder: Path, name: str, source: str) -> Path:
    if not (DATA / source).is_dir():
        pytest.skip(f"{DATA / source} is absent")
    assert prepare([name, f"src={DATA / source}", f"dst={folder / name}"]) == 0
    return folder / name


@pytest.mark.parametrize(
    ("name", "source", "words", "auc"),
    [
        ("movielens", "movielens1m", [], 0.66),
        ("jester", "jester1", [], 0.66),
        # 265 clicks in the sample cannot judge a model: the path is what is tested.
        ("criteo", "criteo_tb10k", ["data.loader.batch_size=256"], 0.0),
    ],
)
def test_an_experiment_prepares_trains_and_evaluates(tmp_path: Path, name, source, words, auc):
    data = _prepared(tmp_path, name, source)
    experiment = {"criteo": "criteo_sample"}.get(name, name)
    given = [f"experiment={experiment}", f"data.path={data}", *FEW, *words]
    job(2, tmp_path / "run", *given, small=False)
    run = summary(tmp_path / "run")
    assert run["scores"]["test"]["rows"] == run["rows"]["test"]
    assert run["scores"]["test"]["auc"] > auc
    course = losses(tmp_path / "run")
    assert course[12] < course[4]
