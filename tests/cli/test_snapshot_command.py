"""``python -m tightrec.snapshot`` as a user meets it: words, exit codes, what is published and what not."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TRAINING = [
    "data.synthetic.max_cardinality=300",
    "data.synthetic.train_rows=4000",
    "data.synthetic.valid_rows=1500",
    "data.synthetic.test_rows=1500",
    "data.loader.batch_size=128",
    "model.embedding_dim=16",
    "model.bottom_layers=[32]",
    "model.top_layers=[32,16]",
]


def python(*words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=timeout)


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def snapshot(*words: object) -> Done:
    """The command inside this process, which saves importing torch each time."""
    from tightrec.snapshot.__main__ import main

    handler = signal.getsignal(signal.SIGTERM)
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = main(list(map(str, words)))
    finally:
        signal.signal(signal.SIGTERM, handler)
    return Done(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = python("tightrec.trainer", *TRAINING, f"run_folder={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def test_an_export_is_verified_published_and_served(run: Path, tmp_path: Path) -> None:
    from tightrec.snapshot import load

    out = tmp_path / "snapshot"
    done = snapshot("export", f"checkpoint={run}", f"out={out}", "budget_ne=0.01")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "tables 26 int8; layers 5 int8" in done.stdout
    assert "verified on 1,500 test rows: NE " in done.stdout
    assert done.stdout.splitlines()[-1] == f"snapshot {out}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["snapshot"]
    served = load(out)
    names = [column["name"] for column in served.manifest.features["sparse"]]
    scores = served.predict(np.zeros((2, 13), np.float32), {name: np.zeros(2, np.int64) for name in names})
    assert scores.shape == (2,)
    assert scores[0] == scores[1]

    shown = python("tightrec.snapshot", "show", f"snapshot={out}")
    assert shown.returncode == 0, shown.stderr
    assert "verified on 1,500 test rows" in shown.stdout
    assert "t_C1 " in shown.stdout

    again = snapshot("export", f"checkpoint={run}", f"out={out}", "budget_ne=0.01", "precision=fp16")
    assert again.returncode == 2
    assert f"{out} exists already. Give another folder, or replace=true to replace it." in again.stderr
    assert load(out).plan.tables["t_C1"] == "int8"
    again = snapshot(
        "export", f"checkpoint={run}", f"out={out}", "budget_ne=0.01", "precision=fp16", "replace=true"
    )
    assert again.returncode == 0, again.stderr
    assert load(out).plan.tables["t_C1"] == "fp16"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["snapshot"]


def test_past_its_budget_nothing_is_published(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "snapshot"
    done = snapshot("export", f"checkpoint={run}", f"out={out}", "precision=int2", "budget_ne=0")
    assert done.returncode == 1, done.stdout
    assert "REFUSED on 1,500 test rows" in done.stdout
    assert "nothing was published" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_refused_export_leaves_the_snapshot_that_was_there(run: Path, tmp_path: Path) -> None:
    from tightrec.snapshot import load

    out = tmp_path / "snapshot"
    assert snapshot("export", f"checkpoint={run}", f"out={out}", "precision=fp32").returncode == 0
    done = snapshot(
        "export", f"checkpoint={run}", f"out={out}", "precision=int2", "budget_ne=0", "replace=true"
    )
    assert done.returncode == 1
    assert load(out).plan.tables["t_C1"] == "fp32"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["snapshot"]


def test_an_unverified_export_says_so(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "snapshot"
    done = snapshot(
        "export", f"checkpoint={run}", f"out={out}", "verify=false", "ranges=dynamic", "precision=int2"
    )
    assert done.returncode == 0, done.stderr
    assert "not verified, as verify=false asks" in done.stdout
    assert json.loads((out / "manifest.json").read_text())["verification"] is None
    assert "not verified" in snapshot("show", f"snapshot={out}").stdout


def test_a_searched_export_stays_within_its_budget_and_shows_why(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "snapshot"
    done = snapshot("export", f"checkpoint={run}", f"out={out}", "precision=auto", "budget_ne=0.005")
    assert done.returncode == 0, done.stderr + done.stdout
    manifest = json.loads((out / "manifest.json").read_text())
    assert {"sensitivity.json", "sensitivity.svg"} <= set(manifest["files"])
    assert manifest["verification"]["ne_loss"] <= 0.005
    assert manifest["verification"]["snapshot_bytes"] < 0.3 * manifest["verification"]["float32_bytes"]
    costs = json.loads((out / "sensitivity.json").read_text())["costs"]
    assert {cost["part"] for cost in costs} >= {"table:t_C1", "layer:top.0"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["exprt"], "there is no command 'exprt'. Known: export, watch, show, debug, compile."),
        (["export", "checkpoint=RUN"], "export.out: this setting has no default, give it."),
        (["export", "checkpoint=RUN", "out=OUT", "precison=int8"], "Did you mean 'precision'?"),
        (["export", "checkpoint=RUN", "out=OUT", "precision=int9"], "neither a file nor one of auto"),
        (["export", "checkpoint=RUN", "out=OUT", "budget_ne=2"], "budget_ne=2.0 must lie between 0 and 1"),
        (["export", "checkpoint=nowhere", "out=OUT"], "There is no folder nowhere."),
        (["export", "checkpoint=RUN", "out=OUT", "data=nowhere"], "nowhere"),
        (
            ["export", "checkpoint=RUN", "out=OUT", "verify_split=later"],
            "has no split 'later', only",
        ),
        (["export", "checkpoint=RUN", "out=OUT", "ranges=max"], "export.ranges: "),
        (["show", "snapshot=nowhere"], "nowhere"),
    ],
)
def test_a_mistake_ends_in_a_sentence(run: Path, tmp_path: Path, words: list[str], told: str) -> None:
    given = [word.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")) for word in words]
    done = snapshot(*given)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_leaves_nothing_behind(run: Path, tmp_path: Path, number: int, status: int) -> None:
    out = tmp_path / "snapshot"
    words = ["export", f"checkpoint={run}", f"out={out}", "precision=auto"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tightrec.snapshot", *words],
        # Jobs that a shell starts in the background are born with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    # The search speaks while it goes on.
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_help_names_commands_and_settings() -> None:
    for words, told in (([], "watch "), (["export", "--help"], "budget_ne=FLOAT  (0.0002)")):
        done = snapshot(*(words or ["--help"]))
        assert done.returncode == 0
        assert told in done.stdout
