"""Models whose features have tables, deep hash embeddings or both: vectors, their order, names, gradients."""

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.models.config import ModelConfig, RepresentationConfig
from tightrec.models.dlrm import DLRM, build_tables
from tightrec.models.hashed_arch import HashedArch, build_hashed
from tightrec.sharding.dedup import dedup_bags

CPU = torch.device("cpu")
COLUMNS = [("user", 50), ("item", 20), ("genre", 7)]
SMALL = {"hashes": 6, "buckets": 500, "decoder": (5,)}
BAGS = {
    # Rows 0 and 3 are equal in every feature; a bag may be empty, and hold an id twice.
    "user": [[3], [49], [0], [3], [7]],
    "item": [[1], [1], [19], [1], []],
    "genre": [[6, 0, 2], [], [5, 5], [6, 0, 2], [0]],
}
NOTHING: dict[str, list[list[int]]] = {name: [[], [], [], [], []] for name, _ in COLUMNS}


def kjt(bags: dict[str, list[list[int]]]) -> KeyedJaggedTensor:
    flat = [bag for feature in bags.values() for bag in feature]
    return KeyedJaggedTensor(
        keys=list(bags),
        values=torch.tensor([i for bag in flat for i in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in flat], dtype=torch.int32),
        stride=len(next(iter(bags.values()))),
    )


def config_of(pooling="sum", architecture="dlrm", **representation) -> ModelConfig:
    return ModelConfig(
        embedding_dim=8,
        bottom_layers=(12,),
        top_layers=(16,),
        pooling=pooling,
        architecture=architecture,
        representation=RepresentationConfig(**(SMALL | representation)),
    )


def model(config: ModelConfig, dense: int = 0) -> DLRM:
    torch.manual_seed(0)
    hashed = build_hashed(COLUMNS, config, CPU)
    return DLRM(build_tables(COLUMNS, config, CPU), dense, config, CPU, hashed=hashed)


def arch(config: ModelConfig) -> HashedArch:
    torch.manual_seed(0)
    made = build_hashed(COLUMNS, config)
    assert made is not None
    return made


def by_hand(made: HashedArch, bags: dict[str, list[list[int]]]) -> list[Tensor]:
    """Every id of every bag decoded by itself."""
    vectors = []
    for number, name in enumerate(made.names):
        rows = []
        for bag in bags[name]:
            counts = [0] * len(made.names)
            counts[number] = 1
            found = [made.decoders(made.hashes[number](torch.tensor([i])), counts)[0] for i in bag]
            total = torch.stack(found).sum(0) if found else torch.zeros(8)
            rows.append(total / len(bag) if bag and made.pooling == "mean" else total)
        vectors.append(torch.stack(rows))
    return vectors


@pytest.mark.parametrize("form", ["plain", "distinct"])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("transform", ["uniform", "gaussian"])
def test_vectors_and_gradients_are_those_of_ids_decoded_one_by_one(form, pooling, transform):
    made = arch(config_of(pooling, kind="dhe", transform=transform))
    sparse = kjt(BAGS) if form == "plain" else dedup_bags(kjt(BAGS))
    weights = [torch.randn(5, 8) for _ in COLUMNS]
    gradients = []
    expected = by_hand(made, BAGS)
    for vectors in (made(sparse), expected):
        loss = sum((v * w).sum() for v, w in zip(vectors, weights, strict=True))
        gradients.append(torch.autograd.grad(loss, list(made.parameters())))
    for one, other in zip(made(sparse), expected, strict=True):
        assert one.shape == (5, 8)
        assert torch.allclose(one, other, atol=1e-6)
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "distinct"])
def test_a_batch_without_an_id_gives_zeros_and_every_parameter_a_gradient(form):
    made = arch(config_of(kind="dhe"))
    vectors = made(kjt(NOTHING) if form == "plain" else dedup_bags(kjt(NOTHING)))
    assert [v.shape for v in vectors] == [(5, 8)] * 3
    assert not any(v.any() for v in vectors)
    sum(v.sum() for v in vectors).backward()
    assert all(p.grad is not None and not p.grad.any() for p in made.parameters())


def test_one_row():
    made = arch(config_of(kind="dhe"))
    bags = {name: rows[:1] for name, rows in BAGS.items()}
    for one, other in zip(made(kjt(bags)), by_hand(made, bags), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_keys_may_come_in_another_order_and_among_others():
    made = arch(config_of(kind="select", select=("genre", "user")))
    assert made.names == ("user", "genre")
    expected = by_hand(made, BAGS)
    reordered = {name: BAGS[name] for name in ("genre", "item", "user")}
    for sparse in (kjt(reordered), dedup_bags(kjt(reordered)), kjt(BAGS)):
        for one, other in zip(made(sparse), expected, strict=True):
            assert torch.allclose(one, other, atol=1e-6)


def test_each_distinct_id_of_a_feature_is_decoded_once():
    made = arch(config_of(kind="dhe"))
    seen: list[tuple[int, list[int]]] = []
    made.decoders.register_forward_hook(lambda module, args, out: seen.append((len(args[0]), args[1])))
    made(kjt(BAGS))
    # user 0, 3, 7, 49; item 1, 19; genre 0, 2, 5, 6
    assert seen == [(10, [4, 2, 4])]


def test_the_interaction_sees_dense_then_tables_then_hashed_vectors():
    made = model(config_of(features={"item": "hybrid", "user": "dhe"}), dense=3)
    assert made.hashed_arch is not None and made.sparse_arch is not None
    seen: list[tuple[Tensor, list[Tensor]]] = []
    made.inter_arch.register_forward_hook(lambda module, args, out: seen.append(args))
    dense = torch.randn(5, 3)
    made(dense, kjt(BAGS))
    ((vector, vectors),) = seen
    pooled = made.sparse_arch.embedding_bag_collection(kjt(BAGS)).to_dict()
    expected = [pooled["item"], pooled["genre"], *by_hand(made.hashed_arch, BAGS)]
    assert torch.equal(vector, made.dense_arch(dense))
    assert len(vectors) == 4
    for one, other in zip(vectors, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("architecture", ["dlrm", "dcnv2"])
@pytest.mark.parametrize("kind", ["dhe", "hybrid", "select"])
@pytest.mark.parametrize("dense", [0, 3])
def test_every_parameter_of_every_kind_is_trained(architecture, kind, dense):
    made = model(config_of(architecture=architecture, kind=kind, select=1), dense=dense)
    assert (made.sparse_arch is None) == (kind == "dhe")
    logits = made(torch.randn(5, dense), kjt(BAGS))
    assert logits.shape == (5,)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


def test_names_of_a_model_with_tables_alone_stay_those_of_torchrec():
    plain = set(model(config_of()).state_dict())
    assert plain == {
        "dense_arch.vector",
        *(f"sparse_arch.embedding_bag_collection.embedding_bags.t_{n}.weight" for n, _ in COLUMNS),
        *(f"over_arch.model.{at}" for at in ("0._mlp.0._linear.weight", "0._mlp.0._linear.bias")),
        *(f"over_arch.model.1.{name}" for name in ("weight", "bias")),
    }
    hybrid = set(model(config_of(kind="hybrid")).state_dict())
    assert hybrid - plain == {
        f"hashed_arch.decoders.{name}.{layer}" for name in ("weights", "biases") for layer in (0, 1)
    }
    assert plain - set(model(config_of(kind="dhe")).state_dict()) == {n for n in plain if "sparse_arch" in n}


def test_nothing_is_built_for_features_without_it():
    assert build_hashed(COLUMNS, config_of()) is None
    assert build_tables(COLUMNS, config_of(kind="dhe")) is None
    tables = build_tables(COLUMNS, config_of(features={"item": "dhe"}))
    assert tables is not None
    assert [config.name for config in tables.embedding_bag_configs()] == ["t_user", "t_genre"]


def test_hashed_vectors_stay_float32_where_the_dense_part_is_bf16():
    config = ModelConfig(
        embedding_dim=8, dense_precision="bf16", representation=RepresentationConfig(kind="dhe", **SMALL)
    )
    made = model(config)
    assert made.hashed_arch is not None
    seen: list[torch.dtype] = []
    made.hashed_arch.register_forward_hook(lambda module, args, out: seen.append(out[0].dtype))
    made.over_arch.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    made(torch.empty(5, 0), kjt(BAGS)).sum().backward()
    assert seen == [torch.float32, torch.bfloat16]


def test_a_feature_that_is_not_there_is_told_when_the_model_is_built():
    with pytest.raises(ValueError, match="features names 'usr'"):
        build_tables(COLUMNS, config_of(features={"usr": "dhe"}))
    with pytest.raises(ValueError, match="features names 'usr'"):
        build_hashed(COLUMNS, config_of(features={"usr": "dhe"}))
