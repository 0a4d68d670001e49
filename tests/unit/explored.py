"""Paths, sets of paths, prepared rows and a snapshot with deep hash embeddings, made up for tests."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet

from tightrec.formats.schema import Schema, SparseColumn
from tightrec.models.config import ModelConfig, RepresentationConfig
from tightrec.serving.paths import CacheConfig, Device, PathSet, Profile, ServingPath
from tightrec.snapshot.layers import store_layer
from tightrec.snapshot.model import layer_specs
from tightrec.snapshot.precision import Plan
from tightrec.snapshot.store import SnapshotWriter

SIZES = (1, 128, 4096)


def profile(*latency_ms: float) -> Profile:
    return Profile(rows=SIZES, latency_ms=latency_ms, tail_ms=tuple(2 * ms for ms in latency_ms))


def path(
    name: str = "table-int8-cpu-1",
    *,
    ms: tuple[float, ...] = (1.0, 2.0, 20.0),
    accuracy: float = 0.75,
    threads: int = 1,
    **more: Any,
) -> ServingPath:
    """A path of SIZES on the device cpu; its snapshot is its own unless ``fingerprint`` says otherwise."""
    values = {
        "snapshot": "snapshots/a",
        "fingerprint": name,
        "representation": "table",
        "precision": "int8",
        "device": "cpu",
        "auc": accuracy + 0.05,
        "ne": 1.5 - accuracy,
        "memory_bytes": 1000,
        "cache": CacheConfig(),
    }
    return ServingPath(name=name, threads=threads, accuracy=accuracy, profile=profile(*ms), **(values | more))


def path_set(*paths: ServingPath, slots: int = 2, **more: Any) -> PathSet:
    return PathSet(devices=(Device(name="cpu", slots=slots),), paths=paths or (path(),), **more)


def prepare(
    folder: Path,
    *,
    dense: int = 3,
    cardinalities: Sequence[int] = (5, 7, 11),
    rows: int = 600,
    splits: Sequence[str] = ("valid", "test"),
    clicks: float = 0.4,
) -> Path:
    """Write a prepared folder with the columns of ``snapshot_made.make_snapshot`` and random rows."""
    schema = Schema(
        dense=tuple(f"d{i}" for i in range(dense)),
        sparse=tuple(SparseColumn(name=f"f{i}", cardinality=count) for i, count in enumerate(cardinalities)),
        label="click",
        rows=dict.fromkeys(splits, rows),
        source="random",
    )
    for number, split in enumerate(splits):
        (folder / split).mkdir(parents=True)
        drawn = np.random.default_rng(number)
        columns = {"click": (drawn.random(rows) < clicks).astype(np.float32)}
        columns |= {name: drawn.normal(size=rows).astype(np.float32) for name in schema.dense}
        columns |= {c.name: drawn.integers(0, c.cardinality, rows) for c in schema.sparse}
        parquet.write_table(pa.table(columns), folder / split / "part-0.parquet")
    schema.save(folder)
    return folder


def hashed_snapshot(folder: Path, *, cardinalities: Sequence[int] = (5, 7, 11), seed: int = 0) -> Path:
    """Write a snapshot as ``snapshot_made.make_snapshot`` does, in float32, whose features have deep hash
    embeddings and no tables."""
    shape = RepresentationConfig(kind="dhe", hashes=16, decoder=(12,))
    config = ModelConfig(embedding_dim=8, bottom_layers=(6,), top_layers=(10,), representation=shape)
    columns = [(f"f{i}", count) for i, count in enumerate(cardinalities)]
    vectors = 1 + len(columns)
    widths = {"dhe": [16, 12, 8], "bottom": [3, 6, 8], "top": [8 + vectors * (vectors - 1) // 2, 10, 1]}
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for spec in layer_specs(config, 3, columns):
        part, _, rest = spec.name.partition(".")
        place = int(rest.rpartition(".")[2])
        inputs, outputs = widths[part][place : place + 2]
        weight = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        layers[spec.name] = store_layer(weight, torch.zeros(outputs), "fp32", None)
    writer = SnapshotWriter(folder)
    writer.write_dense(layers, {})
    writer.finish(
        step=1,
        source={"fingerprint": "0" * 64, "checkpoint": "made by a test"},
        model=config,
        features={
            "dense": ["d0", "d1", "d2"],
            "sparse": [{"name": name, "cardinality": count, "multi_hot": False} for name, count in columns],
        },
        plan=asdict(Plan(tables={}, layers=dict.fromkeys(layers, "fp32"))),
        score_histogram=None,
    )
    return folder
