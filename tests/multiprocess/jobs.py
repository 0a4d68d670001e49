"""Runs whole training jobs on gloo ranks, for tests."""

import json
from pathlib import Path
from typing import Any

from ranks import run_ranks

SMALL = [
    "data.synthetic.max_cardinality=40",
    "data.synthetic.train_rows=640",
    "data.synthetic.valid_rows=100",
    "data.synthetic.test_rows=90",
    "data.synthetic.row_group_rows=64",
    "data.loader.batch_size=32",
    "model.embedding_dim=8",
    "model.top_layers=[16]",
    "logging.every_steps=1",
    "logging.split_every=0",
    "logging.tensorboard=false",
    "train.checkpoint.every_steps=0",
]


def run_job(rank: int, world: int, words: list[str]) -> int:
    from tightrec.trainer.config import load
    from tightrec.trainer.job import run

    config, plain = load(words)
    return run(config, plain, words)


def job(world: int, folder: Path, *words: str, small: bool = True) -> list[int]:
    given = [*(SMALL if small else []), *words]
    if not any(word.startswith("resume=") for word in words):
        given.append(f"run_folder={folder}")
    return run_ranks(world, run_job, given, connect=False, timeout=120)


def records(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in records(folder)}


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())
