"""Exporter and watcher killed before every single step that they take on the disk, and stopped by signals.

(benchmarks/snapshot_kills.py kills them at random moments, in the middle of a write too.)
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent / "unit")}

LOOSE = "budget_ne=0.5"

MAKE = """
import sys
from pathlib import Path
import snapshot_run
for step in sys.argv[2:]:
    snapshot_run.save(Path(sys.argv[1]), int(step))
"""


def make(run: Path, *steps: int) -> None:
    """Checkpoints in a run's folder, made elsewhere: torch must not run in this process before a fork."""
    subprocess.run(
        [sys.executable, "-c", MAKE, str(run), *map(str, steps)], env=ENVIRONMENT, check=True, timeout=120
    )


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "tightrec.snapshot", *words, LOOSE]


def test_a_kill_before_any_step_leaves_whole_snapshots_and_the_next_run_ends_the_work(tmp_path: Path) -> None:
    run, work = tmp_path / "run", tmp_path / "work"
    make(run, 1)
    first, second = (run / "checkpoints" / f"step-0000000{step}" for step in (1, 2))
    watched, exported = tmp_path / "watch", tmp_path / "export"
    for words in (
        ["watch", f"run={run}", f"out={watched / 'out'}", "once=true"],
        ["export", f"checkpoint={first}", f"out={exported / 'out'}"],
    ):
        subprocess.run(command(*words), env=ENVIRONMENT, check=True, timeout=120, stdout=subprocess.DEVNULL)
    (watched / "watched").touch()
    make(run, 2)
    jobs = {
        watched: ["watch", f"run={run}", f"out={work / 'out'}", "once=true", "keep=1"],
        exported: ["export", f"checkpoint={second}", f"out={work / 'out'}", "replace=true"],
    }
    for template, words in jobs.items():
        ran = subprocess.run(
            [sys.executable, str(HERE / "snapshot_killed.py"), str(template), str(work), *words, LOOSE],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert ran.returncode == 0, ran.stderr
        found = json.loads(ran.stdout)
        assert found["problems"] == [], ran.stderr
        # Two tables, a dense file, the manifest twice, renames and flushes: fewer would miss some.
        assert found["kills"] > 20, found
        # One step lies between the two renames.
        assert found["between"] == (template == exported), found


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_watcher_at_once(tmp_path: Path, number: signal.Signals, status: int) -> None:
    out = tmp_path / "out"
    make(tmp_path / "run", 1)
    words = ["watch", f"run={tmp_path / 'run'}", f"out={out}", "follow=true", "poll_s=1000"]
    watcher = subprocess.Popen(
        command(*words),
        # Jobs that a shell starts in the background are born with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert watcher.stdout
        for line in watcher.stdout:
            if "points at" in line:
                break
        watcher.send_signal(number)
        _, errors = watcher.communicate(timeout=60)
    finally:
        watcher.kill()
        watcher.wait()
    assert watcher.returncode == status, errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in out.iterdir()) == [".lock", "current", "step-00000001"]
