"""Trained runs for exchange_bytes.py and exchange_quality.py: made in one job, left out where finished."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tightrec.trainer.compare.runs import Run, read_runs
from tightrec.trainer.config import load
from tightrec.trainer.job import run
from tightrec.trainer.report.records import RUN_FILE, read_run

PLAIN = "plain"
PLAIN_WORDS = ("codec=none", "codec.dedup=false")
"""torchrec as it is."""

EXPERIMENTS = {"movielens": "ab_movielens", "jester": "ab_jester"}
"""Data sets, and the experiment that trains on each."""

_LEAN = (
    "ab.codecs=[]",
    "logging.tensorboard=false",
    "logging.split_every=0",
    "train.checkpoint.every_steps=0",
    "train.checkpoint.background=false",
    # Evaluated once, on the test split at the end.
    "train.eval_every=1000000000",
)
"""What every run is told: nothing that costs time beside training and the bytes' measurement."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run to make."""

    data: str
    """Of ``EXPERIMENTS``."""

    variant: str
    """Name of the way of sending."""

    words: tuple[str, ...]
    """Hydra overrides of that way."""

    seed: int
    """Of weights and data order."""

    def folder(self, root: Path) -> Path:
        """Where the run goes."""
        return root / self.data / f"{self.variant}_{self.seed}"


def make(planned: Sequence[Planned], root: Path, prepared: Path, more: Sequence[str]) -> None:
    """Train those runs that are not finished, in order; every rank calls this.

    Args:
        planned: the runs.
        root: folder that theirs go to.
        prepared: holds a folder of prepared data for each name of ``EXPERIMENTS``.
        more: overrides of all runs.

    Raises:
        ValueError: what the trainer refuses.
        RuntimeError: a run was stopped; made again with the same words, the job goes on with it.
    """
    # Before the first run: its process group makes the ranks wait for each other, so all read the same.
    left = [one for one in planned if not finished(one.folder(root))]
    for number, one in enumerate(left, start=1):
        folder = one.folder(root)
        if os.environ.get("RANK", "0") == "0":
            print(f"run {number} of {len(left)}: {one.data} {folder.name}", flush=True)
        words = [
            f"experiment={EXPERIMENTS[one.data]}",
            f"data.path={prepared / one.data}",
            *_LEAN,
            *more,
            *one.words,
            f"seed={one.seed}",
            f"run_folder={folder}",
            "resume=auto",
        ]
        config, plain = load(words)
        run(config, plain, words)
        if not finished(folder):
            raise RuntimeError(f"{folder} was stopped; the same command goes on with it.")


def finished(folder: Path) -> bool:
    """Whether the run in ``folder`` came to its end."""
    return (folder / RUN_FILE).is_file() and read_run(folder).get("status") == "finished"


def named_words(text: str) -> tuple[str, tuple[str, ...]]:
    """Name and overrides of a way of sending, from ``NAME: OVERRIDE OVERRIDE ...``.

    Raises:
        ValueError: there is no name, or it cannot be a folder's.
    """
    name, colon, words = text.partition(":")
    if not colon or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError(f'--also {text!r} names no way of sending. Write "NAME: OVERRIDE OVERRIDE ...".')
    return name, tuple(words.split())


def made(planned: Iterable[Planned], root: Path) -> dict[tuple[str, str, int], Run]:
    """The finished ones of the runs, by data set, variant and seed."""
    found = {}
    for one in planned:
        if finished(one.folder(root)):
            found[one.data, one.variant, one.seed] = read_runs([one.folder(root)])[0]
    return found


def sent(run_: Run, direction: str, last: int) -> float:
    """Bytes a step, all ranks together, of the ``last`` steps; windows that begin before them are left out.

    Raises:
        ValueError: no window lies within the last steps.
    """
    records = sorted((r for r in run_.records if r["kind"] == "train"), key=lambda r: r["step"])
    end = records[-1]["step"] if records else 0
    total, steps = 0.0, 0
    for before, record in zip([0, *(r["step"] for r in records)], records, strict=False):
        if before >= end - last:
            total += record[f"{direction}_bytes"] * (record["step"] - before)
            steps += record["step"] - before
    if not steps:
        raise ValueError(
            f"{run_.folder} has no window of logging.every_steps within its last {last} steps. "
            "Take --last higher."
        )
    return total / steps


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as RESULTS.md holds it."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables_of(run_: Run, direction: str, last: int) -> dict[str, Mapping[str, float | str]]:
    """What frames held by table: means of bytes and rows over the last steps' samples, mode of the last."""
    records = [r for r in run_.records if r["kind"] == "codec" and r["direction"] == direction]
    end = max((r["step"] for r in records), default=0)
    sampled = [r["tables"] for r in records if r["step"] > end - last and r["tables"]]
    names = dict.fromkeys(name for tables in sampled for name in tables)
    found: dict[str, Mapping[str, float | str]] = {}
    for name in names:
        entries = [tables[name] for tables in sampled if name in tables]
        means = {
            key: sum(entry[key] for entry in entries) / len(entries)
            for key in ("rows", "distinct", "plain_bytes", "sent_bytes")
        }
        found[name] = {**means, "bound": entries[-1]["bound"], "mode": entries[-1]["mode"]}
    return found
