"""Folders of finished runs as the trainer leaves them, for the tests of comparisons."""

from pathlib import Path
from typing import Any

from tightrec.trainer.report.records import RecordFile, write_run

CONFIG = {
    "name": "trial",
    "seed": 0,
    "run_folder": "somewhere",
    "resume": "auto",
    "data": {"source": "synthetic", "path": None},
    "model": {"embedding_dim": 16},
    "codec": {"forward": "none", "backward": "none", "dedup": False},
    "train": {"epochs": 2, "checkpoint": {"keep": 3}},
    "logging": {"every_steps": 20},
}


def changed(config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """``config`` with values by dotted name."""
    for key, value in settings.items():
        head, _, rest = key.partition(".")
        config = {**config, head: changed(config[head], {rest: value}) if rest else value}
    return config


def finished_run(
    folder: Path,
    seed: int = 0,
    ne: float = 0.8,
    settings: dict[str, Any] | None = None,
    steps: tuple[int, ...] = (20, 40),
    **facts: Any,
) -> Path:
    """Write the folder of a run whose scores are made of ``ne``; ``facts`` go to ``run.json``."""
    folder.mkdir(parents=True)
    scores = {
        "rows": 900,
        "auc": 1.5 - ne,
        "ne": ne,
        "log_loss": ne / 2,
        "calibration": 1.0,
        "base_rate": 0.2,
    }
    run = {
        "status": "finished",
        "started": "2026-01-01T00:00:00+00:00",
        "command": "torchrun -m tightrec.trainer",
        "seed": seed,
        "world": 2,
        "rows": {"train": 9000},
        "config": changed({**CONFIG, "seed": seed, "run_folder": str(folder)}, settings or {}),
        "scores": {"valid": {**scores, "ne": ne + 0.1}, "test": scores},
        "steps": 40,
        "rows_per_s": 1000.0,
        "bytes_per_step": {"input": 100.0, "forward": 2000.0, "backward": 4000.0},
        "time_split_ms": {"lookup": 1.0, "embedding_exchange": 2.0, "dense": 3.0},
        "versions": {"torch": "2.13.0"},
        "git": "abc",
    }
    write_run(folder, run | facts)
    records = RecordFile(folder)
    for step in steps:
        records.write({"kind": "train", "step": step, "loss": ne / 2 + 1 / step, "ne": ne + 1 / step})
        records.write({"kind": "eval", "split": "valid", "step": step, "ne": ne, "auc": 1.5 - ne})
    records.close()
    return folder
