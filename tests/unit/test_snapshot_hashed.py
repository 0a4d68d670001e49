"""Deep hash embeddings as they are served: against plain torch, of any types, in any batch."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from snapshot_forged import forge_manifest
from snapshot_made import config_of, layer_shapes, make_snapshot
from torch import Tensor, nn

from tightrec.models import dhe
from tightrec.models.config import ModelConfig, RepresentationConfig
from tightrec.models.representation import with_table
from tightrec.snapshot import hashed as hashed_module
from tightrec.snapshot import load
from tightrec.snapshot.hashed import HashedLookup, activated, decoder_layers, hashed_lookup
from tightrec.snapshot.manifest import DamagedSnapshot, read_manifest
from tightrec.snapshot.model import layer_specs
from tightrec.snapshot.precision import Plan

CPU = torch.device("cpu")
COLUMNS = [("a", 9), ("b.0", 14), ("b", 5)]
SMALL: dict[str, Any] = {"hashes": 16, "buckets": 97, "decoder": (12, 7)}
ACTIVATIONS = ("sigmoid", "relu", "mish", "linear")

KINDS = {
    "dhe": RepresentationConfig(kind="dhe", **SMALL),
    "hybrid": RepresentationConfig(kind="hybrid", transform="gaussian", activation="mish", **SMALL),
    "select": RepresentationConfig(kind="select", select=2, activation="relu", **SMALL),
    "mixed": RepresentationConfig(features={"f0": "hybrid", "f2": "dhe"}, activation="linear", **SMALL),
}


def linear(weight: Tensor, bias: Tensor, relu: bool) -> nn.Module:
    """A float32 layer."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight, bias
    return nn.Sequential(layer, nn.ReLU()) if relu else layer


def made(
    shape: RepresentationConfig, pooling: str = "sum", columns: Sequence[tuple[str, int]] = COLUMNS
) -> tuple[HashedLookup, dhe.Decoders]:
    """A lookup on float32 layers, and training's decoders with the same weights."""
    config = ModelConfig(embedding_dim=4, pooling=pooling, representation=shape)  # type: ignore[arg-type]
    torch.manual_seed(3)
    decoders = dhe.Decoders(len(columns), 4, shape)
    layers = {
        name: linear(decoders.weights[i][place].detach(), decoders.biases[i][place].detach(), i < 2)
        for place, (feature, _) in enumerate(columns)
        for i, name in enumerate(decoder_layers(feature, config))
    }
    lookup = hashed_lookup(columns, config, layers, CPU)
    assert lookup is not None
    return lookup.requires_grad_(False), decoders


def bags(columns: Sequence[tuple[str, int]], rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and offsets of bags of 0 to 3 ids, the overflow id among them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 4, (len(columns), rows), generator=generator)
    ids = [
        torch.randint(0, count + 1, (int(own.sum()),), generator=generator)
        for (_, count), own in zip(columns, sizes, strict=True)
    ]
    return torch.cat(ids), nn.functional.pad(sizes.flatten().cumsum(0), (1, 0))


def expected(shape: RepresentationConfig, pooling: str, decoders: dhe.Decoders, rows: int) -> Tensor:
    """The same bag by bag, id by id, by the hashes' definition."""
    ids, offsets = bags(COLUMNS, rows)
    pooled = torch.zeros(rows, len(COLUMNS), 4)
    for place, (name, count) in enumerate(COLUMNS):
        hashes = dhe.Hashes(name, count, shape)
        for row in range(rows):
            bag = ids[offsets[place * rows + row] : offsets[place * rows + row + 1]]
            for one in bag[bag < count]:
                numbers = hashes.buckets_of(one[None]).double()
                values = (numbers * 2 / (shape.buckets - 1) - 1).float()
                if shape.transform == "gaussian":
                    values = hashes(one[None])
                for i, (weight, bias) in enumerate(zip(decoders.weights, decoders.biases, strict=True)):
                    values = nn.functional.linear(values.relu() if i else values, weight[place], bias[place])
                pooled[row, place] += dhe.activate(values, shape.activation)[0].detach()
            if pooling == "mean":
                pooled[row, place] /= max(len(bag), 1)
    return pooled.flatten(1)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize(
    ("transform", "activation"), zip(["uniform", "gaussian"] * 2, ACTIVATIONS, strict=True)
)
def test_bags_are_pooled_as_the_definition_says(pooling: str, transform: Any, activation: Any) -> None:
    shape = RepresentationConfig(kind="dhe", transform=transform, activation=activation, **SMALL)
    lookup, decoders = made(shape, pooling)
    found = lookup(*bags(COLUMNS, 20), 20)
    assert found.shape == (20, 12)
    assert found.std() > 0.05
    torch.testing.assert_close(found, expected(shape, pooling, decoders, 20), rtol=1e-5, atol=1e-6)


def test_empty_bags_empty_batches_and_the_overflow_id_are_zeros() -> None:
    lookup, _ = made(RepresentationConfig(kind="dhe", **SMALL))
    none = torch.empty(0, dtype=torch.int64)
    assert lookup(none, torch.zeros(1, dtype=torch.int64), 0).shape == (0, 12)
    assert torch.equal(lookup(none, torch.zeros(7, dtype=torch.int64), 2), torch.zeros(2, 12))
    overflow = torch.tensor([count for _, count in COLUMNS])
    assert torch.equal(lookup(overflow, torch.arange(4), 1), torch.zeros(1, 12))
    # Sum: it adds nothing. Mean: it counts.
    mean, _ = made(RepresentationConfig(kind="dhe", **SMALL), "mean")
    mixed, offsets = torch.tensor([9, 3, 3, 0, 0]), torch.tensor([0, 2, 3, 4, 4, 5, 5])
    for one, share in ((lookup, 1.0), (mean, 0.5)):
        both = one(mixed, offsets, 2)[:, :4]
        assert torch.equal(both[0], both[1] * share)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_does_not_depend_on_where_a_value_stands(activation: str) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 4
    whole = activated(values, activation)
    torch.testing.assert_close(whole, dhe.activate(values, activation), rtol=1e-6, atol=1e-6)
    for start in range(0, 60, 3):
        for size in (1, 4, 8, 20, 100):
            part = values[start : start + size].clone()
            assert torch.equal(activated(part, activation), whole[start : start + size])
    assert activated(torch.tensor([-1e30, -200.0, 0.0, 200.0]), activation).isfinite().all()


def test_each_distinct_id_is_asked_for_once_and_the_overflow_id_never() -> None:
    lookup, _ = made(RepresentationConfig(kind="dhe", **SMALL))
    ids, offsets = bags(COLUMNS, 30)
    wanted, asked = lookup(ids, offsets, 30), {}

    def vectors(feature: int, given: Tensor) -> Tensor:
        assert feature not in asked
        asked[feature] = given
        return lookup.compute(feature, given)

    lookup.vectors = vectors
    assert torch.equal(lookup(ids, offsets, 30), wanted)
    ends = offsets[::30].tolist()
    for feature, (_, count) in enumerate(COLUMNS):
        own = ids[ends[feature] : ends[feature + 1]].unique()
        assert count in own, "or the overflow id is not tried"
        assert torch.equal(asked[feature], own[own < count])


def test_a_replacement_may_be_asked_for_all_ids_at_once() -> None:
    lookup, _ = made(RepresentationConfig(kind="dhe", **SMALL))
    ids, offsets = bags(COLUMNS, 30)
    wanted = lookup(ids, offsets, 30)

    class Whole:
        """All vectors of every feature and its overflow id, kept."""

        def __init__(self) -> None:
            self.kept = [
                torch.cat([lookup.compute(place, torch.arange(count)), torch.zeros(1, 4)])
                for place, (_, count) in enumerate(COLUMNS)
            ]

        def __call__(self, feature: int, ids: Tensor) -> Tensor:
            raise AssertionError("it is asked for all at once")

        def together(self, ids: Tensor, owners: Tensor) -> Tensor:
            return torch.stack([self.kept[owner][one] for one, owner in zip(ids, owners, strict=True)])

    lookup.vectors = Whole()
    torch.testing.assert_close(lookup(ids, offsets, 30), wanted, rtol=1e-6, atol=1e-6)


def test_many_ids_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    lookup, _ = made(RepresentationConfig(kind="dhe", **SMALL))
    ids = torch.arange(14)
    whole, seen = lookup.compute(1, ids), []
    real = HashedLookup.encode
    monkeypatch.setattr(hashed_module, "_CHUNK_VALUES", 80)
    monkeypatch.setattr(HashedLookup, "encode", lambda *a: seen.append(len(a[2])) or real(*a))
    torch.testing.assert_close(lookup.compute(1, ids), whole, rtol=1e-6, atol=1e-6)
    assert seen == [5, 5, 4]


# ---- whole snapshots


def snapshot_of(folder: Path, name: str, kind: str, ranges: str = "dynamic", **settings: Any) -> Path:
    """A snapshot of ``KINDS[name]`` on three features, layers of ``kind``, tables int8."""
    shape, columns = KINDS[name], [("f0", 50), ("f1", 7), ("f2", 110)]
    config = config_of(4, settings.get("architecture", "dlrm"), settings.get("pooling", "sum"))
    config = dataclasses.replace(config, representation=shape)
    layers = layer_shapes(config, settings.setdefault("dense", 3), 3, columns)
    plan = Plan(
        tables={f"t_{f}": "int8" for f in with_table(columns, shape)},
        layers=dict.fromkeys(layers, kind),
        ranges=ranges,
    )
    counts = [count for _, count in columns]
    return make_snapshot(folder, cardinalities=counts, dim=4, plan=plan, representation=shape, **settings)


def rows_of(count: int) -> tuple[np.ndarray, dict[str, list[list[int]]]]:
    """Dense values and bags of 0 to 3 ids, some of them out of range."""
    drawn = np.random.default_rng(5)
    dense = drawn.normal(size=(count, 3)).astype(np.float32)
    sizes = {"f0": 53, "f1": 8, "f2": 112}
    return dense, {
        name: [drawn.integers(0, most, drawn.integers(0, 4)).tolist() for _ in range(count)]
        for name, most in sizes.items()
    }


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize(("kind", "ranges"), [("int8", "dynamic"), ("int8", "min_max"), ("fp16", "dynamic")])
def test_a_score_does_not_depend_on_the_rows_beside_it(
    tmp_path: Path, name: str, kind: str, ranges: str
) -> None:
    pooling, architecture = ("mean", "dcnv2") if ranges == "min_max" else ("sum", "dlrm")
    folder = snapshot_of(tmp_path / "a", name, kind, ranges, pooling=pooling, architecture=architecture)
    snapshot = load(folder, out_of_range="overflow")
    dense, sparse = rows_of(45)
    together = snapshot.logits(*given(snapshot, dense, sparse))
    assert together.std() > 0.01
    for start, stop in [(0, 1), (1, 2), (2, 9), (9, 30), (30, 45)]:
        part = given(snapshot, dense[start:stop], {f: ids[start:stop] for f, ids in sparse.items()})
        assert torch.equal(snapshot.logits(*part), together[start:stop])


def given(snapshot: Any, dense: np.ndarray, sparse: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    batch = snapshot._inputs.convert(dense, sparse)
    return batch.dense, batch.ids, batch.offsets


@pytest.mark.parametrize("name", list(KINDS))
def test_parts_of_a_batch_are_those_of_the_features_they_belong_to(tmp_path: Path, name: str) -> None:
    snapshot = load(snapshot_of(tmp_path / "a", name, "fp32"), out_of_range="overflow")
    scorer = snapshot.scorer
    dense, sparse = rows_of(20)
    stages = dict(scorer.stages(*given(snapshot, dense, sparse)))
    tables = [int(table.name[-1]) for table in snapshot.manifest.tables]
    assert ("tables" in stages) == bool(tables)
    assert (scorer.lookup is None) == (name == "dhe")
    assert scorer.hashed is not None
    for feature, (hashed, count) in enumerate(
        zip(scorer.hashed.names, scorer.hashed.cardinalities, strict=True)
    ):
        found = stages["hashed"][:, 4 * feature : 4 * feature + 4]
        for row, bag in enumerate(sparse[hashed]):
            known = torch.tensor([one for one in bag if one < count], dtype=torch.int64)
            wanted = scorer.hashed.compute(feature, known).sum(0)
            torch.testing.assert_close(found[row], wanted, rtol=1e-5, atol=1e-6)
    if tables:
        # Each table's columns move with the ids of its own feature alone.
        for place, feature in enumerate(tables):
            other = {**sparse, f"f{feature}": [[]] * 20}
            changed = dict(scorer.stages(*given(snapshot, dense, other)))["tables"] != stages["tables"]
            assert changed.view(20, -1, 4).any(2).any(0).nonzero().flatten().tolist() == [place]


def test_a_manifest_of_tables_alone_stays_one_that_older_loaders_read(tmp_path: Path) -> None:
    old = json.loads((make_snapshot(tmp_path / "old") / "manifest.json").read_text())
    assert (old["format_version"], "representation" in old["model"]) == (1, False)
    assert read_manifest(tmp_path / "old").config.representation == RepresentationConfig()
    unused = RepresentationConfig(kind="dhe", features={"f0": "table", "f1": "table", "f2": "table"})
    same = json.loads((make_snapshot(tmp_path / "s", representation=unused) / "manifest.json").read_text())
    assert same == old
    new = json.loads((snapshot_of(tmp_path / "new", "select", "int8") / "manifest.json").read_text())
    assert new["format_version"] == 2
    assert read_manifest(tmp_path / "new").config.representation == KINDS["select"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "cube"}, "representation 'cube' of f1 is not known"),
        ({"features": {"f9": "dhe"}}, "there is no such feature"),
        ({"features": {"f0": "dhe"}}, "tables and features differ"),
        ({"features": {"f1": "hybrid"}}, "the decoder of f1 is not 16 -> 12 -> 7 -> 4"),
        ({"hashes": 10**12}, "the decoder of f0 is not 1000000000000 -> 12"),
        ({"decoder": [12]}, "the decoder of f0 is not 16 -> 12 -> 4"),
        ({"transform": "cubic"}, "transform 'cubic' is not known"),
        ({"activation": "tanh"}, "activation 'tanh' is not known"),
        ({"buckets": 97.5}, "hashes and buckets are not counts"),
        ({"hash_seed": "x"}, "hash_seed is no number"),
        ({"depth": 3}, "unexpected keyword argument 'depth'"),
    ],
)
def test_a_manifest_that_does_not_describe_its_hashes_is_refused(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    folder = snapshot_of(tmp_path / "a", "mixed", "int8")
    load(folder)
    forge_manifest(folder, lambda values: values["model"]["representation"].update(change))
    with pytest.raises(DamagedSnapshot, match=says):
        load(folder)


def test_names_of_layers_keep_features_with_dots_apart(tmp_path: Path) -> None:
    names = ["a", "a.0", "dhe.a"]
    folder = make_snapshot(tmp_path / "a", representation=KINDS["dhe"], names=names)
    snapshot = load(folder)
    specs = layer_specs(snapshot.manifest.config, 3, snapshot.manifest.columns)
    assert [spec.name for spec in specs][:9] == [f"dhe.{name}.{i}" for name in names for i in range(3)]
    assert [spec.place for spec in specs][:9] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [spec.nonnegative for spec in specs][:9] == [False, True, True] * 3
    assert list(snapshot.scorer.layers) == [spec.name for spec in specs]
    assert len(snapshot.predict([[1, 2, 3]], {name: [1] for name in names})) == 1
