"""A small snapshot from random weights, written as the exporter writes one."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tightrec.models.config import ModelConfig, RepresentationConfig
from tightrec.models.representation import Cardinalities, with_table
from tightrec.snapshot.layers import store_layer
from tightrec.snapshot.model import CONSTANT, layer_specs, places_of
from tightrec.snapshot.monitor import score_histogram
from tightrec.snapshot.packed import pack
from tightrec.snapshot.precision import Plan
from tightrec.snapshot.store import SnapshotWriter

BOTTOM, TOP, CROSS_LAYERS, CROSS_RANK = (6,), (10,), 2, 4


def config_of(dim: int, architecture: str, pooling: str) -> ModelConfig:
    return ModelConfig(
        architecture=architecture,
        embedding_dim=dim,
        bottom_layers=BOTTOM,
        top_layers=TOP,
        cross_layers=CROSS_LAYERS,
        cross_rank=CROSS_RANK,
        pooling=pooling,
    )


def layer_shapes(
    config: ModelConfig, dense: int, sparse: int, columns: Cardinalities = ()
) -> dict[str, tuple[int, int]]:
    """[out, in] of every dense layer, by name, in order; ``columns`` is left out where all have tables."""
    dim, vectors = config.embedding_dim, 1 + sparse
    if columns:
        vectors = 1 + sum(map(len, places_of(columns, config)))
    shapes = {}
    width = vectors * dim
    for spec in layer_specs(config, dense, columns):
        part, *rest = spec.name.split(".")
        if part == "dhe":
            widths = [config.representation.hashes, *config.representation.decoder, dim]
            shapes[spec.name] = list(itertools.pairwise(widths))[int(rest[-1])][::-1]
        elif part == "bottom":
            widths = [dense, *config.bottom_layers, dim]
            shapes[spec.name] = (widths[int(rest[0]) + 1], widths[int(rest[0])])
        elif part == "cross":
            rank = config.cross_rank
            shapes[spec.name] = (rank, width) if rest[1] == "v" else (width, rank)
        else:
            first = width if config.architecture == "dcnv2" else dim + vectors * (vectors - 1) // 2
            widths = [first, *config.top_layers, 1]
            shapes[spec.name] = (widths[int(rest[0]) + 1], widths[int(rest[0])])
    return shapes


def make_snapshot(
    folder: Path,
    *,
    dense: int = 3,
    cardinalities: Sequence[int] = (5, 7, 11),
    dim: int = 8,
    plan: Plan | None = None,
    architecture: str = "dlrm",
    multi_hot: Sequence[str] = (),
    pooling: str = "sum",
    representation: RepresentationConfig | None = None,
    names: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """Write a snapshot with features ``f0``, ... and dense columns ``d0``, ... into ``folder``.

    Args:
        plan: None: tables and layers int8.
        representation: None: tables.
        names: of the features, if not ``f0``, ...
        multi_hot: names of the features that the manifest says held lists.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    config = config_of(dim, architecture, pooling)
    config = replace(config, representation=representation or config.representation)
    features = list(names) or [f"f{i}" for i in range(len(cardinalities))]
    columns = list(zip(features, cardinalities, strict=True))
    shapes = layer_shapes(config, dense, len(cardinalities), columns)
    tabled = with_table(columns, config.representation)
    plan = plan or Plan(tables={f"t_{f}": "int8" for f in tabled}, layers=dict.fromkeys(shapes, "int8"))
    writer = SnapshotWriter(folder)
    for feature, rows in columns:
        if feature not in tabled:
            continue
        kind = plan.tables[f"t_{feature}"]
        table = 0.5 * torch.randn(rows, dim, generator=generator)
        writer.write_table(f"t_{feature}", kind, dim, pack(table, kind, plan.row_search))
    layers = {}
    for spec in layer_specs(config, dense, columns):
        shape = shapes[spec.name]
        activation = None if plan.ranges == "dynamic" or plan.layers[spec.name] != "int8" else (-4.0, 4.0)
        bias = random(shape[0]) if spec.bias else None
        layers[spec.name] = store_layer(random(*shape), bias, plan.layers[spec.name], activation)
    writer.write_dense(layers, {} if dense else {CONSTANT: random(dim)})
    scores = torch.sigmoid(torch.randn(20_000, generator=generator) - 1)
    labels = (torch.rand(20_000, generator=generator) < scores).float()
    writer.finish(
        step=1,
        source={"fingerprint": "0" * 64, "checkpoint": "made by a test"},
        model=config,
        features={
            "dense": [f"d{i}" for i in range(dense)],
            "sparse": [{"name": f, "cardinality": rows, "multi_hot": f in multi_hot} for f, rows in columns],
        },
        plan=asdict(plan),
        score_histogram=score_histogram(scores, labels),
    )
    return folder
