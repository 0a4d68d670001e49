"""In real jobs on two ranks every part of a step is found in what torchrec and fbgemm record."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks

from tightrec.trainer.step_split import PARTS

pytestmark = pytest.mark.multiprocess

SMALL = [
    "data.synthetic.max_cardinality=40",
    "data.synthetic.train_rows=256",
    "data.synthetic.valid_rows=64",
    "data.synthetic.test_rows=64",
    "data.synthetic.row_group_rows=64",
    "data.loader.batch_size=32",
    "model.embedding_dim=8",
    "model.top_layers=[16]",
    "logging.every_steps=1",
    "logging.split_every=2",
    "train.checkpoint.every_steps=0",
    "train.steps=4",
]
CASES = [
    (sharding, pipeline) for sharding in ("table_wise", "row_wise") for pipeline in ("plain", "sparse_dist")
]


def _jobs(rank: int, world: int, folder: str) -> None:
    from tightrec.trainer.config import load
    from tightrec.trainer.job import run

    for sharding, pipeline in CASES:
        where = [f"sharding={sharding}", f"train.pipeline={pipeline}"]
        words = [*SMALL, *where, f"run_folder={folder}/{sharding}-{pipeline}"]
        run(*load(words), words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    run_ranks(2, _jobs, str(folder), connect=False, timeout=150)
    return folder


@pytest.mark.parametrize(("sharding", "pipeline"), CASES)
def test_every_part_takes_some_time(folder: Path, sharding: str, pipeline: str) -> None:
    run = folder / f"{sharding}-{pipeline}"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    splits = [record for record in records if record["kind"] == "split"]
    assert [split["step"] for split in splits] == [2, 4]
    for split in splits:
        assert [part for part in PARTS if not split[part]] == []
        assert split["total"] == pytest.approx(sum(split[part] for part in PARTS))
    assert json.loads((run / "run.json").read_text())["time_split_ms"].keys() == set(PARTS)


def test_the_page_and_the_scalars_of_a_real_run_are_there(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = folder / "table_wise-plain"
    page = (run / "report.html").read_text()
    for title in ("Log loss", "AUC", "Speed", "Sent between ranks a step", "Where a step&#39;s time goes"):
        assert title in page
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [scalar.step for scalar in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert {"test/auc", "valid/auc", "split/lookup", "train/forward_bytes"} <= set(events.Tags()["scalars"])
