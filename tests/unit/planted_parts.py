"""Small float32 models whose tables are as sensitive as asked for, and rows that click as they predict."""

from collections.abc import Sequence

import numpy as np
import torch

from tightrec.formats.columns import Bags, Columns, offsets_of
from tightrec.formats.schema import Schema, SparseColumn
from tightrec.models.config import ModelConfig
from tightrec.snapshot.model import extra_keys, layer_specs
from tightrec.snapshot.parts import Layer, Parts, logits_of

DIM, WIDTH = 8, 12


def plant(
    stds: Sequence[float],
    *,
    rows: int = 2000,
    cardinalities: Sequence[int] | None = None,
    dense: int = 0,
    multi_hot: bool = False,
    pooling: str = "sum",
    seed: int = 0,
) -> tuple[Parts, Columns]:
    """A model with a table t_0, t_1, ... for each of ``stds``, and rows to search on.

    Args:
        stds: standard deviation of each table's values; with ``multi_hot`` the last one has bags of 0 to 3.
        cardinalities: rows of each table; 40 if not given.
    """
    generator = torch.Generator().manual_seed(seed)
    random = np.random.default_rng(seed)
    counts = list(cardinalities or [40] * len(stds))
    config = ModelConfig(embedding_dim=DIM, bottom_layers=(6,), top_layers=(WIDTH,), pooling=pooling)
    last = len(stds) - 1
    sparse = tuple(
        SparseColumn(name=str(i), cardinality=count, multi_hot=multi_hot and i == last)
        for i, count in enumerate(counts)
    )
    names = tuple(f"d{i}" for i in range(dense))
    schema = Schema(dense=names, sparse=sparse, label="label", rows={}, source="planted")
    vectors = len(stds) + 1
    widths = {"bottom": [dense, 6, DIM], "top": [DIM + vectors * (vectors - 1) // 2, WIDTH, 1]}

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    layers = {}
    for spec in layer_specs(config, dense):
        part, at = spec.name.split(".")
        inputs, outputs = widths[part][int(at) : int(at) + 2]
        weight = normal(outputs, inputs) * inputs**-0.5
        layers[spec.name] = Layer(spec=spec, weight=weight, bias=0.1 * normal(outputs))
    tables = {f"t_{i}": std * normal(counts[i], DIM) for i, std in enumerate(stds)}
    parts = Parts(
        config=config,
        schema=schema,
        tables=tables,
        ids={f"t_{i}": np.arange(count) for i, count in enumerate(counts)},
        layers=layers,
        extras={name: normal(DIM) for name in extra_keys(dense)},
    )
    bags = []
    for column, count in zip(sparse, counts, strict=True):
        offsets = offsets_of(random.integers(0, 4, rows)) if column.multi_hot else None
        size = rows if offsets is None else int(offsets[-1])
        bags.append(Bags(random.integers(0, count, size), offsets))
    values = random.standard_normal((rows, dense)).astype(np.float32)
    columns = Columns(values, np.zeros(rows, np.float32), tuple(bags))
    chances = logits_of(parts.scorer(parts.exact), columns, rows).sigmoid()
    labels = torch.bernoulli(chances, generator=generator).numpy()
    return parts, Columns(values, labels, tuple(bags))
