"""``python -m tightrec.serving`` as a user meets it, and ``explore`` from snapshots to a file of paths."""

import io
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from explored import hashed_snapshot, prepare
from snapshot_made import make_snapshot

from tightrec.serving.explore import explorer
from tightrec.serving.explore.measure import measure
from tightrec.serving.paths import ServingPath, read_paths

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
QUICK = ["rows=[1,64]", "threads=1", "repeats=4", "least_repeats=2", "seconds=0.01", "cores=2"]


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def serving(*words: object) -> Done:
    """The command inside this process, which saves importing torch each time."""
    from tightrec.serving.__main__ import main

    handler = signal.getsignal(signal.SIGTERM)
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = main(list(map(str, words)))
    finally:
        signal.signal(signal.SIGTERM, handler)
    return Done(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with snapshots ``table`` and ``dhe`` and the prepared folder ``rows``."""
    folder = tmp_path_factory.mktemp("made")
    make_snapshot(folder / "table")
    hashed_snapshot(folder / "dhe")
    prepare(folder / "rows")
    return folder


def test_snapshots_become_a_file_of_paths_a_plot_and_a_table(made: Path, tmp_path: Path) -> None:
    snapshots = f"snapshots=[{made / 'table'},{made / 'dhe'}]"
    out = tmp_path / "paths.json"
    done = serving(
        "explore", snapshots, f"data={made / 'rows'}", f"out={out}", "caches=[both]", "memory=1GB", *QUICK
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("snapshots table-int8, dhe-fp32; judged by accuracy on 600 rows of split test")
    assert sum(line.startswith("[1/2] table-int8-cpu-1: ") for line in lines) == 1
    assert lines[-1] == f"paths {out}, plot {tmp_path / 'paths.svg'}"
    found = read_paths(out)
    both = {path.name: path for path in (*found.paths, *(path for path, _ in found.dropped))}
    assert set(both) == {"table-int8-cpu-1", "dhe-fp32-cpu-1-both"}
    cached = both["dhe-fp32-cpu-1-both"]
    assert cached.representation == "dhe" and cached.cache.levels == "both"
    # A cache is judged beside the same snapshot without one, though no such path was asked for.
    assert set(cached.notes["cache"]["change"]) == {"accuracy", "auc", "ne"}
    assert set(cached.notes["cache"]["hits"]) == {"encoder", "decoder"}
    assert cached.profile.rows == (1, 64) and cached.notes["batches"][0] >= 2
    assert found.device("cpu").memory_bytes == 10**9 and found.device("cpu").slots == 2
    files = {"paths.json", "paths.svg"}
    if cached in found.paths:
        assert Path(cached.cache_file).parent == tmp_path
        files.add(Path(cached.cache_file).name)
    assert {file.name for file in tmp_path.iterdir()} == files


def test_a_mistake_is_told_with_status_2_and_nothing_is_written(made: Path, tmp_path: Path) -> None:
    table, rows, out = f"snapshots={made / 'table'}", f"data={made / 'rows'}", f"out={tmp_path / 'p.json'}"
    for words, told in (
        (["explre"], "there is no command 'explre'. Known: explore, serve, load, simulate."),
        (["explore", out], "explore.snapshots: this setting has no default, give it."),
        (["explore", f"snapshots=[{made / 'table'}", out], "is not a list. Write snapshots=[A,B]"),
        (["explore", table, out, "device=[cpu]"], "there is no setting 'device'. Did you mean 'devices'?"),
        (["explore", table, out, "threads=[two]"], "explore.threads.0: "),
        (["explore", table, out], "Give data=FOLDER, a prepared folder with its columns."),
        (["explore", table, rows, out, "devices=cuda:99"], "this machine has no cuda:99"),
        (["explore", f"snapshots={made / 'none'}", rows, out], "There is no snapshot"),
        (
            ["explore", table, rows, "out=/nowhere/p.json"],
            "out=/nowhere/p.json: there is no folder /nowhere.",
        ),
        (["explore", table, rows, "out=/proc/p.json"], "out=/proc/p.json: the folder /proc takes no files"),
    ):
        done = serving(*words)
        assert (done.returncode, done.stdout) == (2, ""), words
        assert done.stderr.startswith("error: ") and told in done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_relative_out_measures_with_the_cache_file_that_is_kept(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    there: list[bool] = []

    def measured(path: ServingPath, *rest: Any, **more: Any) -> Any:
        found = measure(path, *rest, **more)
        assert path.cache_file is not None
        there.append(Path(path.cache_file).is_absolute() and Path(path.cache_file).is_file())
        return found

    monkeypatch.setattr(explorer, "measure", measured)
    monkeypatch.chdir(tmp_path)
    words = [f"snapshots={made / 'dhe'}", f"data={made / 'rows'}", "out=p.json", "caches=[both]"]
    done = serving("explore", *words, *QUICK)
    assert done.returncode == 0, done.stderr
    assert there == [True]
    assert "could not be written" not in capfd.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {
        "p.json",
        "p.svg",
        "p.dhe-fp32-both.safetensors",
    }


def test_no_room_is_told_before_latencies_and_nothing_is_written(made: Path, tmp_path: Path) -> None:
    words = [f"snapshots={made / 'table'}", f"data={made / 'rows'}", f"out={tmp_path / 'p.json'}"]
    done = serving("explore", *words, "memory=1KB", *QUICK)
    assert done.returncode == 2
    assert "device cpu: the smallest path needs " in done.stderr and "memory allows 1,000." in done.stderr
    assert "table-int8 on cpu: accuracy" in done.stdout and "[1/1]" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_lists_commands_and_settings_without_torch() -> None:
    done = serving("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in ("explore", "serve", "load", "simulate"))
    done = serving("explore", "--help")
    assert done.returncode == 0 and "snapshots=" in done.stdout and "recorded=" in done.stdout
    assert serving("explore").returncode == 2
    code = (
        "import sys; from tightrec.serving.__main__ import main; main(['--help']); "
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout.splitlines()[-1] == "False"


def child_of(process: subprocess.Popen[str], words: str) -> psutil.Process:
    """Waits for a child whose command holds ``words``."""
    for _ in range(600):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if words in " ".join(child.cmdline()):
                    return child
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"no child {words}: {process.communicate()}")


@pytest.mark.parametrize(
    ("number", "status", "stage"),
    [
        (signal.SIGINT, 130, "spawn_main"),
        (signal.SIGINT, 130, "workers.process"),
        (signal.SIGTERM, 143, "workers.process"),
    ],
)
def test_interrupted_it_leaves_no_file_and_no_process(
    made: Path, tmp_path: Path, number: int, status: int, stage: str
) -> None:
    words = [f"snapshots={made / 'table'}", f"data={made / 'rows'}", f"out={tmp_path / 'p.json'}"]
    slow = ["rows=[1,64]", "threads=1", "repeats=10000000", "seconds=300"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tightrec.serving", "explore", *words, *slow],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
        # A test run in the background has SIGINT ignored, and so would what it starts.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    try:
        child = child_of(process, stage)
        # As a terminal does: to the whole group.
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status, (out, err)
    assert "Traceback" not in err, err
    assert list(tmp_path.iterdir()) == []
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running()
