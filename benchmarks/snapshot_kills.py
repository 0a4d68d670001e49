"""Exporter and watcher of snapshots, killed at random moments: is what they leave always whole and verified?

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/snapshot_kills.py FOLDER [kills=20] [seed=0] [key=value ...]

Trains once (one rank, synthetic data, a checkpoint every few steps) unless FOLDER holds that run already, and
then kills with SIGKILL, in turns: the watcher, when the run has a new checkpoint, between its first line and
a little after the time that it needs undisturbed; and the exporter, with ``replace=true``, between the moment
at which its folder appears and a little after its end. After every kill ``current`` must point at a snapshot
that loads with all its hashes compared and whose manifest says that it was verified, every other folder with
a final name must be such a one, and so must what the exporter replaces. The next life goes on with what the
kill left. Other words go to both commands.

Prints a line for every kill and a summary; the exit status is 1 if any check failed.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tightrec.formats.checkpoint_files import find_checkpoints
from tightrec.snapshot import load

STEPS_APART = 20
UNDISTURBED = 2
"""Checkpoints of the first, undisturbed life of the watcher."""

LATE = 1.3
"""Kills come up to this many times the undisturbed time after the start."""

PATIENCE_S = 120.0

EXPORTERS_BUDGET = "budget_ne=0.01"
"""The exporter does not search types, and a model of few steps may lose more than it should."""


def main(words: list[str]) -> int:
    """Kill and check; returns the exit status."""
    folder, kills, seed, settings = parse(words)
    draw = random.Random(seed)
    run = folder / "run"
    if not (run / "run.json").is_file():
        train(run, checkpoints=kills + UNDISTURBED + 1)
    for made in ("served", "watched", "exported"):
        shutil.rmtree(folder / made, ignore_errors=True)
    waiting = iter(find_checkpoints(run / "checkpoints"))
    served = folder / "served"
    (served / "checkpoints").mkdir(parents=True)
    watched, exported = folder / "watched", folder / "exported" / "snapshot"
    watch = command("watch", f"run={served}", f"out={watched}", "keep=2", "poll_s=0.1", *settings)
    times = []
    for _ in range(UNDISTURBED):
        hand_over(next(waiting), served)
        times.append(watch_once([*watch, "once=true"], None))
        if trouble(watched / "current"):
            print(f"the undisturbed watcher failed: {trouble(watched / 'current')}")
            return 1
    newest = find_checkpoints(served / "checkpoints")[-1]
    loose = [] if any(word.startswith("budget_ne=") for word in settings) else [EXPORTERS_BUDGET]
    exporting = command(
        "export", f"checkpoint={newest}", f"out={exported}", "replace=true", *loose, *settings
    )
    times.append(export_once(exporting, exported, None))
    if trouble(exported):
        print(f"the undisturbed exporter failed: {trouble(exported)}")
        return 1
    print(
        f"undisturbed: watcher {times[1]:.2f} s a checkpoint, exporter {times[2]:.2f} s from its first file"
    )
    bad, moments = 0, {"while it wrote": 0, "before or after it wrote": 0}
    for kill in range(kills):
        of_watcher = kill % 2 == 0
        if of_watcher:
            hand_over(next(waiting), served)
            at = watch_once(watch, draw.uniform(0, LATE * times[1]))
        else:
            at = export_once(exporting, exported, draw.uniform(0, LATE * times[2]))
        out = watched if of_watcher else exported.parent
        half = [path.name for path in out.iterdir() if ".partial-" in path.name]
        moments["while it wrote" if half else "before or after it wrote"] += 1
        found = list(wrong(watched, exported))
        bad += bool(found)
        who = "watcher" if of_watcher else "exporter"
        points = os.readlink(watched / "current")
        left = f"left {', '.join(half)}" if half else "left nothing half-written"
        print(
            f"kill {kill + 1}: {who} after {at:.2f} s, {left}, current -> {points}: {found or 'fine'}",
            flush=True,
        )
    watch_once([*watch, "once=true"], None)
    export_once(exporting, exported, None)
    problems = [*wrong(watched, exported), *left_over(watched, exported)]
    left = [path.name for path in watched.iterdir() if path.name.startswith("step-")]
    print(f"{kills} kills, {moments}; afterwards the watcher ended its work and kept {sorted(left)}")
    print(f"{bad} of {kills} kills left something that is not whole and verified")
    print(f"after one more life of each: {problems or 'fine, and nothing is left over'}")
    return 1 if bad or problems else 0


def parse(words: list[str]) -> tuple[Path, int, int, list[str]]:
    """Folder, number of kills, seed, other words.

    Raises:
        SystemExit: no folder is given.
    """
    folders = [word for word in words if "=" not in word]
    if len(folders) != 1:
        raise SystemExit("snapshot_kills.py: give one folder; see the top of the file.")
    given = {"kills": "20", "seed": "0"}
    given |= {word.split("=")[0]: word.split("=")[1] for word in words if word.split("=")[0] in given}
    settings = [word for word in words if "=" in word and word.split("=")[0] not in given]
    return Path(folders[0]), int(given["kills"]), int(given["seed"]), settings


def train(run: Path, checkpoints: int) -> None:
    """A run that keeps as many checkpoints."""
    steps = checkpoints * STEPS_APART
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"),
        *("-m", "tightrec.trainer", f"run_folder={run}", "train.device=cpu", f"train.steps={steps}"),
        *(f"train.checkpoint.every_steps={STEPS_APART}", f"train.checkpoint.keep={checkpoints + 1}"),
        *(f"data.synthetic.train_rows={steps * 1024}", "data.loader.batch_size=1024"),
        *("data.synthetic.valid_rows=10000", "data.synthetic.test_rows=20000", "logging.tensorboard=false"),
    ]
    run.parent.mkdir(parents=True, exist_ok=True)
    with run.with_name("train.log").open("w") as log:
        if subprocess.run(words, stdout=log, stderr=log).returncode:
            raise SystemExit(f"training failed: see {log.name}")


def hand_over(checkpoint: Path, served: Path) -> None:
    """Let ``checkpoint`` appear in the run folder that is watched, as the trainer does: by a rename."""
    partial = served / "checkpoints" / f"{checkpoint.name}.partial"
    shutil.copytree(checkpoint, partial)
    partial.rename(partial.with_suffix(""))


def command(name: str, *words: str) -> list[str]:
    return [sys.executable, "-u", "-m", "tightrec.snapshot", name, *words]


def watch_once(words: list[str], kill_after_s: float | None) -> float:
    """Start a watcher and kill it so long after its first line, or wait for its end; seconds in between."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("watching"):
                break
        return _lived(process, kill_after_s)


def export_once(words: list[str], out: Path, kill_after_s: float | None) -> float:
    """Start an exporter and kill it so long after its folder appeared, or wait for its end; as above."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        until = time.monotonic() + PATIENCE_S
        before = out.with_name(f"{out.name}.partial-{process.pid}")
        while not before.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        return _lived(process, kill_after_s)


def _lived(process: subprocess.Popen[str], kill_after_s: float | None) -> float:
    began = time.monotonic()
    try:
        process.communicate(timeout=PATIENCE_S if kill_after_s is None else kill_after_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.wait()
    return time.monotonic() - began


def wrong(watched: Path, exported: Path) -> Iterator[str]:
    """What is not as it must be, in words."""
    for path in (watched / "current", *watched.glob("step-*")):
        if ".partial-" not in path.name and (problem := trouble(path)):
            yield f"{path.name}: {problem}"
    # Between the two renames of a replacement the old one stands beside; the next exporter puts it back.
    standing = [exported] if exported.exists() else list(exported.parent.glob(f"{exported.name}.old-*"))
    for path in standing or [exported]:
        if problem := trouble(path):
            yield f"{path.name}: {problem}"


def left_over(watched: Path, exported: Path) -> Iterator[str]:
    """What an undisturbed watcher and exporter should have removed, in words."""
    expected = {watched: ("current", "step-", "rejected", ".lock"), exported.parent: (exported.name,)}
    for folder, starts in expected.items():
        for path in folder.iterdir():
            if not path.name.startswith(starts) or ".partial-" in path.name or ".old-" in path.name:
                yield f"{path.name} is left over in {folder.name}"


def trouble(path: Path) -> str | None:
    """Why ``path`` is no whole and verified snapshot; None: it is one."""
    try:
        verification = load(path).manifest.verification
    except ValueError as error:
        return str(error)
    return None if verification and verification["passed"] else f"not verified: {json.dumps(verification)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
