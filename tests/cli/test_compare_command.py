"""Comparing runs as a user meets it: the command on run folders, and one job that makes and compares runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tightrec.trainer.report.records import write_run

SMALL = [
    "data.synthetic.max_cardinality=40",
    "data.synthetic.train_rows=128",
    "data.synthetic.valid_rows=64",
    "data.synthetic.test_rows=64",
    "data.loader.batch_size=32",
    "model.embedding_dim=8",
    "model.top_layers=[16]",
    "logging.tensorboard=false",
]


def test_the_command_prints_tables_and_writes_a_page_that_needs_no_other_file(tmp_path: Path) -> None:
    for codec, ne in (("none", 0.8), ("int8", 0.9)):
        (tmp_path / codec).mkdir()
        scores = {"test": {"ne": ne, "auc": 0.7, "log_loss": 0.4}}
        config = {"codec": {"forward": codec, "backward": codec}}
        run = {"status": "finished", "seed": 0, "config": config, "scores": scores}
        write_run(tmp_path / codec, run)
    words = [sys.executable, "-m", "tightrec.trainer.compare", "none", "int8"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "+0.10000" in done.stdout
    assert done.stdout.splitlines()[-1] == "comparison comparison.html"
    assert "+0.10000" in (tmp_path / "comparison.html").read_text()


@pytest.mark.multiprocess
def test_one_job_makes_the_runs_of_all_codecs_and_seeds_and_compares_them(tmp_path: Path) -> None:
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    words = [*SMALL, "ab.codecs=[plain,fp16]", "ab.seeds=[0,1]", f"run_folder={tmp_path}"]
    done = subprocess.run(
        [*torchrun, "-m", "tightrec.trainer", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    names = [f"{codec}_{seed}" for codec in ("plain", "fp16") for seed in (0, 1)]
    runs = {name: json.loads((tmp_path / name / "run.json").read_text()) for name in names}
    assert {run["status"] for run in runs.values()} == {"finished"}
    sent = {name: run["bytes_per_step"]["forward"] for name, run in runs.items()}
    # Half a number each, and equal bags once.
    assert sent["plain_0"] == sent["plain_1"] > 2 * sent["fp16_0"] > 0
    ne = {name: run["scores"]["test"]["ne"] for name, run in runs.items()}
    assert ne["plain_0"] != ne["plain_1"]
    assert abs(ne["plain_0"] - ne["fp16_0"]) < 0.01
    assert "Scores on test" in done.stdout
    assert (tmp_path / "comparison.html").is_file()
