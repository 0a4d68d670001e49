"""A trained model in float32, with only those table rows that some held-out rows look up.

A deep hash embedding has no rows, so its decoder is kept whole and told which ids the few stand for.
Everything that a search, a verification or the debugger asks is answered on these few rows, so that no
table needs to stay in memory whole: quantisation works row by row, hence a row of a part of a table is
quantised as in the whole one.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from tightrec.formats.columns import Bags, Columns
from tightrec.formats.schema import Schema
from tightrec.models.config import ModelConfig, table_name
from tightrec.models.representation import with_dhe, with_table
from tightrec.snapshot.hashed import HashedLookup
from tightrec.snapshot.layers import StoredLayer, layer_bytes, make_layer, store_layer
from tightrec.snapshot.lookup import Lookup, TableShape
from tightrec.snapshot.model import LayerSpec, Scorer, extra_keys, layer_specs, places_of
from tightrec.snapshot.packed import pack, row_bytes
from tightrec.snapshot.precision import Plan
from tightrec.snapshot.rows import replay
from tightrec.snapshot.source import Checkpoint

CPU = torch.device("cpu")

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits [B] of dense values, ids and offsets."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A dense layer in float32."""

    spec: LayerSpec
    """Name and place."""

    weight: Tensor
    """[out, in]"""

    bias: Tensor | None
    """[out]"""

    def stored(self, kind: str, activation: tuple[float, float] | None = None) -> StoredLayer:
        """The layer at a type.

        Raises:
            ValueError: the type cannot hold its weights; names the layer.
        """
        try:
            return store_layer(self.weight, self.bias, kind, activation)
        except ValueError as error:
            raise ValueError(f"layer {self.spec.name}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The float32 model on a part of its tables."""

    config: ModelConfig
    """Shape of the model."""

    schema: Schema
    """Its features, in order."""

    tables: dict[str, Tensor]
    """float32 [rows looked up, D], by table's name, in the order of the features that have one."""

    ids: dict[str, np.ndarray]
    """The ids that are looked up, ascending, by :func:`table_name` of every feature, even of one without a
    table: those of the rows in ``tables``."""

    layers: dict[str, Layer]
    """By name, in the order in which they run."""

    extras: dict[str, Tensor]
    """See :func:`tightrec.snapshot.model.extra_keys`."""

    @property
    def columns(self) -> list[tuple[str, int]]:
        """Name and cardinality of the sparse features, in order."""
        return columns_of(self.schema)

    @property
    def exact(self) -> Plan:
        """The plan that keeps everything in float32."""
        return Plan(tables=dict.fromkeys(self.tables, "fp32"), layers=dict.fromkeys(self.layers, "fp32"))

    def part_bytes(self, part: str, kind: str) -> int:
        """Size of a whole ``table:NAME`` or ``layer:NAME`` at a type."""
        what, name = part.split(":", 1)
        if what == "layer":
            layer = self.layers[name]
            outputs, inputs = layer.weight.shape
            return layer_bytes(kind, outputs, inputs, layer.bias is not None)
        rows = {table_name(feature): cardinality for feature, cardinality in self.columns}
        return rows[name] * row_bytes(kind, self.config.embedding_dim)

    def bytes(self, types: Mapping[str, str]) -> int:
        """Size of the model's weights at ``types`` of its parts, small float32 tensors included."""
        extras = sum(4 * extra.numel() for extra in self.extras.values())
        return extras + sum(self.part_bytes(part, kind) for part, kind in types.items())

    def plan_bytes(self, plan: Plan) -> int:
        """The same of a plan."""
        types = {f"table:{name}": kind for name, kind in plan.tables.items()}
        return self.bytes(types | {f"layer:{name}": kind for name, kind in plan.layers.items()})

    def narrowed(self, columns: Columns) -> Columns:
        """The same rows with ids that count within ``ids``, among which they must be."""
        sparse = tuple(
            Bags(np.searchsorted(known, bags.ids).astype(np.int64), bags.offsets)
            for known, bags in zip(self.ids.values(), columns.sparse, strict=True)
        )
        return replace(columns, sparse=sparse)

    def lookup(self, tables: Mapping[str, str], row_search: str) -> Lookup | None:
        """The operator over the part of each of ``tables`` (types by name), in that order; None: of none."""
        if not tables:
            return None
        dim = self.config.embedding_dim
        shapes = [
            TableShape(name=name, kind=kind, rows=len(self.tables[name]), dim=dim)
            for name, kind in tables.items()
        ]
        lookup = Lookup(shapes, self.config.pooling, CPU)
        for name, kind in tables.items():
            lookup.fill(name, pack_table(name, self.tables[name], kind, row_search))
        return lookup

    def layer(self, name: str, kind: str, activation: tuple[float, float] | None = None) -> nn.Module:
        """A dense layer at a type, ready to run."""
        spec = self.layers[name].spec
        stored = self.layers[name].stored(kind, activation)
        return make_layer(stored, relu=spec.relu, device=CPU, nonnegative=spec.nonnegative)

    def hashed(self, layers: Mapping[str, nn.Module], features: Sequence[str]) -> HashedLookup | None:
        """The deep hash embeddings of ``features`` on decoder ``layers`` by name; None: of none."""
        chosen = [column for column in self.columns if column[0] in features]
        known = [torch.from_numpy(self.ids[table_name(feature)]) for feature, _ in chosen]
        return HashedLookup(chosen, self.config, layers, CPU, known) if chosen else None

    def scorer(self, plan: Plan, ranges: Mapping[str, tuple[float, float]] | None = None) -> Scorer:
        """The model at the types of ``plan``.

        Args:
            ranges: of int8 layers' inputs by layer's name; a layer that is not in it has dynamic ones.
        """
        ranges = ranges or {}
        layers = {name: self.layer(name, plan.layers[name], ranges.get(name)) for name in self.layers}
        return Scorer(
            self.config,
            len(self.columns),
            self.lookup({name: plan.tables[name] for name in self.tables}, plan.row_search),
            layers,
            self.extras,
            CPU,
            hashed=self.hashed(layers, with_dhe(self.columns, self.config.representation)),
            places=places_of(self.columns, self.config),
        )


def columns_of(schema: Schema) -> list[tuple[str, int]]:
    """Name and cardinality of the sparse features, in order."""
    return [(column.name, column.cardinality) for column in schema.sparse]


def pack_table(name: str, rows: Tensor, kind: str, row_search: str) -> Tensor:
    """The rows of the table ``name`` at a type, see :func:`tightrec.snapshot.packed.pack`.

    Raises:
        ValueError: the type cannot hold a row; names the table and the row's place in ``rows``.
    """
    try:
        return pack(rows, kind, row_search)
    except ValueError as error:
        raise ValueError(f"table {name} ({len(rows):,} rows): {error}") from None


def read_parts(checkpoint: Checkpoint, rows: Sequence[Columns]) -> Parts:
    """Read a checkpoint table by table, keeping the rows that ``rows`` look up.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    schema = checkpoint.schema
    ids = {
        table_name(column.name): _distinct([part.sparse[place].ids for part in rows])
        for place, column in enumerate(schema.sparse)
    }
    columns = columns_of(schema)
    specs = layer_specs(checkpoint.model, len(schema.dense), columns)
    # Decoders of all features stand in one parameter: it is read once.
    read = functools.cache(checkpoint.parameter)
    tables = [table_name(feature) for feature in with_table(columns, checkpoint.model.representation)]
    return Parts(
        config=checkpoint.model,
        schema=schema,
        tables={name: checkpoint.table(name)[torch.from_numpy(ids[name])] for name in tables},
        ids=ids,
        layers={spec.name: _layer(read, spec) for spec in specs},
        extras={name: checkpoint.parameter(key) for name, key in extra_keys(len(schema.dense)).items()},
    )


def _distinct(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)


def _layer(read: Callable[[str], Tensor], spec: LayerSpec) -> Layer:
    weight, bias = read(spec.weight), read(spec.bias) if spec.bias else None
    if spec.place is not None:
        weight, bias = weight[spec.place], None if bias is None else bias[spec.place]
    return Layer(spec=spec, weight=weight, bias=bias)


def logits_of(scorer: Run, columns: Columns, batch_size: int) -> Tensor:
    """Logits float32 [n] of all rows, in batches."""
    with torch.inference_mode():
        parts = [scorer(*batch) for batch in batches(columns, batch_size)]
    return torch.cat(parts) if parts else torch.empty(0)


def batches(columns: Columns, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Dense values, ids and offsets of one batch after the other, as :class:`Scorer` takes them."""
    for dense, ids, offsets, _ in replay(columns, batch_size):
        yield dense, ids, offsets
