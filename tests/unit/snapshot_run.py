"""A run folder as the trainer leaves it, with small random models, and a watcher over it in this process."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tightrec.formats.columns import Bags, Columns
from tightrec.formats.schema import Schema, SparseColumn
from tightrec.models.config import ModelConfig, RepresentationConfig
from tightrec.models.dlrm import DLRM, build_tables
from tightrec.models.hashed_arch import build_hashed
from tightrec.snapshot import export, store
from tightrec.snapshot.manifest import SnapshotManifest
from tightrec.snapshot.watch import WatchConfig, watch
from tightrec.trainer.checkpoint import CheckpointConfig, Checkpointer
from tightrec.trainer.handover import description, held_out
from tightrec.trainer.task import ClickTask

CPU = torch.device("cpu")
CONFIG = ModelConfig(embedding_dim=8, bottom_layers=(6,), top_layers=(5,))
ROWS = 300

Once = Callable[..., tuple[int, list[str]]]

LOOSE = 0.5
"""A budget that no random model breaks."""


class Rows:
    """A split of ``ROWS`` random rows."""

    def __init__(self, seed: int) -> None:
        self.schema = Schema(
            dense=("age", "price"),
            sparse=(SparseColumn(name="user", cardinality=40), SparseColumn(name="item", cardinality=30)),
            label="click",
            rows={"valid": ROWS, "test": ROWS},
            source="random",
        )
        self.row_counts = [ROWS]
        self._seed = seed

    def read(self, group: int) -> Columns:
        drawn = np.random.default_rng([self._seed, group])
        return Columns(
            dense=drawn.normal(size=(ROWS, 2)).astype(np.float32),
            labels=(drawn.random(ROWS) < 0.4).astype(np.float32),
            sparse=tuple(Bags(drawn.integers(0, c.cardinality, ROWS)) for c in self.schema.sparse),
        )


def model_of(seed: int, config: ModelConfig) -> DLRM:
    """A model for such rows with random weights."""
    schema = Rows(0).schema
    columns = [(column.name, column.cardinality) for column in schema.sparse]
    torch.manual_seed(seed)
    tables = build_tables(columns, config, CPU)
    return DLRM(tables, len(schema.dense), config, CPU, hashed=build_hashed(columns, config, CPU))


def represented(kind: str, **settings: Any) -> ModelConfig:
    """``CONFIG`` with another representation, of small decoders."""
    small = {"hashes": 16, "buckets": 97, "decoder": (7,), **settings}
    return dataclasses.replace(CONFIG, representation=RepresentationConfig(kind=kind, **small))  # type: ignore[arg-type]


def save(
    run: Path,
    step: int,
    *,
    keep: int = 3,
    broken: bool = False,
    seed: int | None = None,
    config: ModelConfig | None = None,
) -> Path:
    """Add the checkpoint of ``step`` to the run's folder ``run``; returns its path.

    Args:
        keep: complete checkpoints that stay.
        broken: the model holds a value that is not a number.
        seed: of its weights; None: ``step``.
        config: of the model; None: ``CONFIG``.
    """
    config = config or CONFIG
    model = model_of(step if seed is None else seed, config)
    splits = {"valid": Rows(1), "test": Rows(2)}
    data = held_out(splits, None, run)  # type: ignore[arg-type]
    schema = splits["valid"].schema
    holder = nn.Module()
    holder.task = ClickTask(model)
    if broken:
        next(model.over_arch.parameters()).data[0] = float("nan")
    saver = Checkpointer(run / "checkpoints", CheckpointConfig(keep=keep))
    about = {"step": step, **description(config, schema, data)}
    saver.save(step, {"model": holder.task}, about, wait=True)
    return run / "checkpoints" / f"step-{step:08d}"


def set_status(run: Path, status: str, reason: str | None = None) -> None:
    """Let the run say how it stands."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text(json.dumps({"status": status, "reason": reason}))


def watch_once(run: Path, out: Path, **settings: Any) -> tuple[int, list[str]]:
    """Watch ``run`` once; exit status and lines."""
    lines: list[str] = []
    config = WatchConfig(**{"run": run, "out": out, "once": True, "budget_ne": LOOSE, **settings})
    return watch(config, lines.append), lines


def names(out: Path) -> list[str]:
    """What stands in a watcher's folder, the lock left out."""
    return sorted(path.name for path in out.iterdir() if path.name != ".lock")


def points_at(out: Path) -> str:
    """What stands in the link ``current``."""
    return os.readlink(out / "current")


def manifest_of(path: Path) -> SnapshotManifest:
    """The manifest of a snapshot, all of whose files are compared with it."""
    manifest = store.read_manifest(path)
    store.check(path, manifest)
    return manifest


def verdicts(monkeypatch: pytest.MonkeyPatch, *passed: bool) -> None:
    """Let the next verifications come out so, whatever they measure."""
    left = iter(passed)
    real = export.verify

    def fixed(*args: Any, **settings: Any) -> Any:
        return dataclasses.replace(real(*args, **settings), passed=next(left))

    monkeypatch.setattr(export, "verify", fixed)
