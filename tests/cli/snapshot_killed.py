"""Kills a command of the exporter before each of its steps on the disk, one after the other.

``python snapshot_killed.py TEMPLATE WORK COMMAND key=value ...``: for n = 1, 2, ..., TEMPLATE is copied to
WORK and the command runs in a forked child that kills itself with SIGKILL before its n-th step on a file
below WORK: an open, a rename, a link, a new or removed file or folder, as the interpreter's audit hooks tell
them. Then the folder is looked at; on every fifth n, and where an old snapshot stands beside ``out``, a
second run must end the work by itself and leave nothing else in WORK. It is over when a child ends by itself.
Prints one JSON object: the kills, how many were between the two renames of a replacement, and a line for
everything that was not as it must be.

Forks, since every child would else import torch anew: nothing here may start a thread before.
"""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from tightrec.snapshot import commands, load

WATCHED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate")
EVERY = 5
LEFT = re.compile(r"\.partial|\.old-|^\.current\.")
"""Names of what is to be gone once a run has ended."""


def main(template: Path, work: Path, words: list[str]) -> None:
    kills, between, problems = 0, 0, []
    while True:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(template, work, symlinks=True)
        killed = forked(words, work, kills + 1) == -signal.SIGKILL
        problems += [f"kill {kills + 1}: {problem}" for problem in wrong(work / "out")]
        between += not (work / "out").exists()
        if not killed or kills % EVERY == 0 or taken_away(work / "out"):
            status = forked(words, work, 0)
            left = [str(path.relative_to(work)) for path in work.rglob("*") if LEFT.search(path.name)]
            if status or left:
                problems.append(f"kill {kills + 1}: the next run ended with {status} and left {left}")
            problems += [f"kill {kills + 1}, next run: {problem}" for problem in wrong(work / "out")]
        if not killed:
            print(json.dumps({"kills": kills, "between": between, "problems": problems}))
            return
        kills += 1


def forked(words: list[str], work: Path, number: int) -> int:
    """Exit status of the command in a child that is killed before step ``number``; 0: never. Below 0: the
    signal that ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    steps, read = 0, set()

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if event not in WATCHED:
            return
        # shutil.rmtree names what it removes by open folder and name.
        if not str(arguments[0]).startswith(str(work)) and event not in ("os.remove", "os.rmdir"):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            # Only the first: it comes after the file was written, which the hooks do not tell of safetensors.
            if arguments[0] in read:
                return
            read.add(arguments[0])
        steps += 1
        if steps == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    try:
        os._exit(commands.run(words))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(99)


def wrong(out: Path) -> list[str]:
    """What of the folder ``out``, a snapshot or a watcher's folder, is not as it must be at any moment."""
    problems = []
    link = out / "current"
    if (out.parent / "watched").exists():
        if not link.is_symlink() or not link.exists():
            return ["current is no link to a snapshot"]
        for path in [link, *out.glob("step-*")]:
            if ".partial-" not in path.name and not verified(path):
                problems.append(f"{path.name} is not a whole, verified snapshot")
        return problems
    # Between the two renames of a replacement the old one stands beside.
    standing = [out] if out.exists() else taken_away(out)
    if not standing:
        return ["neither the old snapshot nor the new one is there"]
    return [f"{path.name} is not a whole, verified snapshot" for path in standing if not verified(path)]


def taken_away(out: Path) -> list[Path]:
    """Old snapshots that stand beside ``out``, to be put back or deleted."""
    return list(out.parent.glob(f"{out.name}.old-*"))


def verified(path: Path) -> bool:
    """Whether a snapshot loads, every file compared with its hash, and its manifest says that it passed."""
    try:
        verification = load(path).manifest.verification
    except ValueError as error:
        print(error, file=sys.stderr)
        return False
    return bool(verification and verification["passed"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
