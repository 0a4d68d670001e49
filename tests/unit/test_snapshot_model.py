"""The served model on float32 tables and layers is the trained one."""

import dataclasses
from typing import Any

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.models.config import ModelConfig
from tightrec.models.dlrm import DLRM, build_tables
from tightrec.snapshot.layers import make_layer, store_layer
from tightrec.snapshot.lookup import Lookup, TableShape
from tightrec.snapshot.model import Scorer, extra_keys, layer_specs
from tightrec.snapshot.packed import pack

CPU = torch.device("cpu")
COLUMNS = [("user", 11), ("item", 7), ("genre", 5)]
ROWS = 33


def trained(dense: int, **shape: Any) -> DLRM:
    torch.manual_seed(1)
    config = ModelConfig(embedding_dim=8, bottom_layers=(12,), top_layers=(16, 9), cross_layers=2, **shape)
    model = DLRM(build_tables(COLUMNS, config, CPU), dense, config)
    with torch.no_grad():
        for parameter in model.parameters():
            # torchrec begins with biases of zero, which would hide one that is left out.
            parameter.normal_(std=0.4)
    return model


def served(model: DLRM, config: ModelConfig, dense: int, kind: str = "fp32", promised: bool = True) -> Scorer:
    """The model on fp32 tables and layers of ``kind``, told which inputs are nonnegative if ``promised``."""
    state = model.state_dict()
    lookup = Lookup(
        [
            TableShape(name=f"t_{name}", kind="fp32", rows=rows, dim=config.embedding_dim)
            for name, rows in COLUMNS
        ],
        config.pooling,
        CPU,
    )
    for name, _ in COLUMNS:
        key = f"sparse_arch.embedding_bag_collection.embedding_bags.t_{name}.weight"
        lookup.fill(f"t_{name}", pack(state[key], "fp32"))
    layers = {}
    for spec in layer_specs(config, dense):
        stored = store_layer(state[spec.weight], state[spec.bias] if spec.bias else None, kind)
        nonnegative = promised and spec.nonnegative
        layers[spec.name] = make_layer(stored, relu=spec.relu, device=CPU, nonnegative=nonnegative)
    extras = {name: state[key] for name, key in extra_keys(dense).items()}
    return Scorer(config, len(COLUMNS), lookup, layers, extras, CPU)


def batch(dense: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bags of 0 to 4 ids, feature-major."""
    generator = torch.Generator().manual_seed(2)
    sizes = torch.randint(0, 5, (len(COLUMNS) * ROWS,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    counts = sizes.view(len(COLUMNS), ROWS).sum(1).tolist()
    parts = [
        torch.randint(0, rows, (count,), generator=generator)
        for (_, rows), count in zip(COLUMNS, counts, strict=True)
    ]
    return torch.randn(ROWS, dense, generator=generator), torch.cat(parts), offsets


SHAPES = [
    (3, {"architecture": "dlrm"}),
    (0, {"architecture": "dlrm", "pooling": "mean"}),
    (3, {"architecture": "dcnv2", "pooling": "mean"}),
    (0, {"architecture": "dcnv2"}),
]


@pytest.mark.parametrize(("dense", "shape"), SHAPES)
def test_in_float32_it_gives_the_trained_models_logits(dense: int, shape: dict[str, Any]) -> None:
    model = trained(dense, **shape)
    config = ModelConfig(embedding_dim=8, bottom_layers=(12,), top_layers=(16, 9), cross_layers=2, **shape)
    values, ids, offsets = batch(dense)
    keyed = KeyedJaggedTensor(
        keys=[name for name, _ in COLUMNS], values=ids, lengths=offsets.diff().to(torch.int32)
    )
    with torch.inference_mode():
        expected = model(values, keyed)
        found = served(model, config, dense)(values, ids, offsets)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dense", "shape"), SHAPES)
def test_what_is_promised_of_inputs_changes_no_bit_of_an_int8_model(
    dense: int, shape: dict[str, Any]
) -> None:
    model = trained(dense, **shape)
    config = ModelConfig(embedding_dim=8, bottom_layers=(12,), top_layers=(16, 9), cross_layers=2, **shape)
    scorers = [served(model, config, dense, "int8", promised) for promised in (False, True)]
    for scorer, count in zip(scorers, (0, 3 if dense else 2), strict=True):
        assert sum(layer.nonnegative for layer in (*scorer.bottom, *scorer.cross, *scorer.top)) == count
    with torch.inference_mode():
        told_nothing, told = (scorer(*batch(dense)) for scorer in scorers)
    assert told.std() > 0.01
    assert torch.equal(told, told_nothing)


@pytest.mark.parametrize(("dense", "shape"), SHAPES)
def test_specs_name_every_dense_parameter_of_the_trained_model_once(
    dense: int, shape: dict[str, Any]
) -> None:
    config = dataclasses.replace(
        ModelConfig(embedding_dim=8, bottom_layers=(12,), top_layers=(16, 9), cross_layers=2), **shape
    )
    specs = layer_specs(config, dense)
    named = [key for spec in specs for key in (spec.weight, spec.bias) if key]
    named += extra_keys(dense).values()
    assert sorted(named) == sorted(
        name for name, _ in trained(dense, **shape).named_parameters() if "sparse_arch" not in name
    )
    assert len({spec.name for spec in specs}) == len(specs)


@pytest.mark.parametrize(("dense", "shape"), SHAPES)
def test_stages_and_inputs_follow_one_another(dense: int, shape: dict[str, Any]) -> None:
    config = dataclasses.replace(
        ModelConfig(embedding_dim=8, bottom_layers=(12,), top_layers=(16, 9), cross_layers=2), **shape
    )
    scorer = served(trained(dense, **shape), config, dense)
    names = [spec.name for spec in layer_specs(config, dense)]
    values, ids, offsets = batch(dense)
    with torch.inference_mode():
        stages = dict(scorer.stages(values, ids, offsets))
        inputs = dict(scorer.layer_inputs(values, ids, offsets))
        logits = scorer(values, ids, offsets)
    assert list(inputs) == names
    assert [name for name in stages if name in inputs] == names
    assert torch.equal(stages["logits"], logits)
    promised = {spec.name for spec in layer_specs(config, dense) if spec.nonnegative}
    assert promised == {name for name, taken in inputs.items() if bool((taken >= 0).all())}
    assert torch.equal(inputs["top.1"], stages["top.0"])
    assert torch.equal(inputs["top.0"], stages["interaction"])
    if dense:
        assert torch.equal(inputs["bottom.0"], values)
    if "cross.1.w" in inputs:
        assert torch.equal(inputs["cross.1.w"], stages["cross.1.v"])
    assert stages["tables"].shape == (ROWS, len(COLUMNS) * 8)
