"""The command line as a user meets it: torchrun, words, exit codes, Ctrl-C, a missing folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node"]
TRAINER = ["-m", "tightrec.trainer"]
SMALL = [
    "data.synthetic.max_cardinality=40",
    "data.synthetic.train_rows=320",
    "data.synthetic.valid_rows=64",
    "data.synthetic.test_rows=64",
    "data.loader.batch_size=32",
    "model.embedding_dim=8",
    "model.top_layers=[16]",
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def start(*words: str, ranks: int = 2) -> subprocess.Popen[str]:
    command = [*TORCHRUN, str(ranks), *TRAINER, *words] if ranks else [sys.executable, *TRAINER, *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )


def finish(process: subprocess.Popen[str], timeout: float = 90) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


@pytest.mark.multiprocess
def test_a_job_ends_with_a_table_and_the_reports_path_and_little_noise(tmp_path: Path):
    status, out, err = finish(start(*SMALL, f"run_folder={tmp_path}"))
    assert status == 0, err
    for told in ("AUC", "Bayes AUC", "NE", "rows/s", "sent a step", "table_wise", "report"):
        assert told in out, told
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / ".hydra" / "overrides.yaml").is_file()
    assert "Warning" not in out + err, "a library's warning reached the console"
    assert max(map(len, out.splitlines())) <= 110


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["codec=int7"], "int7"),
        (["data=movielens", "data.path=nowhere/to/be/found"], "tightrec.trainer.data.prepare movielens"),
        (["codec=fp8"], "fbgemm has no fp8 quantiser on CPU"),
    ],
)
def test_a_mistake_ends_with_its_sentence_and_without_our_traceback(tmp_path: Path, words, told):
    status, out, err = finish(start(*SMALL, f"run_folder={tmp_path}", *words))
    assert status != 0
    assert told in out + err
    assert 'trainer/job.py", line' not in out + err
    assert 'trainer/config.py", line' not in out + err


@pytest.mark.multiprocess
def test_one_process_without_torchrun_says_that_a_codec_changes_nothing(tmp_path: Path):
    status, out, err = finish(start(*SMALL, f"run_folder={tmp_path}", "codec=fp16", ranks=0))
    assert status == 0, err
    assert "With one rank nothing is exchanged" in out


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_exits_0_with_words_and_the_run_goes_on_from_there(tmp_path: Path, number):
    process = start(
        *SMALL, f"run_folder={tmp_path}", "train.epochs=1000000", "logging.every_steps=1", ranks=0
    )
    records = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (records.is_file() and records.read_text().count("\n") > 5):
        assert time.monotonic() < deadline, "the job wrote no records"
        assert process.poll() is None, "the job ended by itself"
        time.sleep(0.1)
    process.send_signal(number)
    status, out, err = finish(process)
    assert status == 0, err
    assert f"stopped by {number.name}" in out.replace("\n", " ")
    assert f"resume={tmp_path}" in out.replace("\n", "")
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "stopped"
    assert Path(run["checkpoint"]).is_dir()


def test_help_and_cfg_start_nothing():
    status, out, _ = finish(start("--help", ranks=0))
    assert status == 0
    assert "codec=auto|bf16|budget|fp16|fp8|int8|lossy|mx4|none|sc24" in out
    status, out, _ = finish(start("--cfg", "model=dcnv2", ranks=0))
    assert status == 0
    assert "architecture: dcnv2" in out


def _broken_torchrec(folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "torchrec.py").write_text("raise ImportError('undefined symbol')\n")
    environment = ENVIRONMENT | {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *TRAINER], capture_output=True, text=True, env=environment, timeout=60
    )


def test_a_library_that_cannot_load_is_told_in_words(tmp_path: Path):
    done = _broken_torchrec(tmp_path)
    assert done.returncode == 2
    assert "undefined symbol" in done.stderr
    assert "tightrec.trainer.doctor" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mismatched_installation_is_told_in_words_before_anything_is_loaded(tmp_path: Path):
    # A torchmetrics of another version, as importlib.metadata sees it, and a torchrec that cannot load.
    (tmp_path / "torchmetrics-1.9.0.dist-info").mkdir()
    (tmp_path / "torchmetrics-1.9.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchmetrics\nVersion: 1.9.0\n"
    )
    done = _broken_torchrec(tmp_path)
    assert done.returncode == 2
    assert "torchmetrics" in done.stderr
    assert "1.0.3" in done.stderr
    assert "Traceback" not in done.stderr
    assert "undefined symbol" not in done.stderr
