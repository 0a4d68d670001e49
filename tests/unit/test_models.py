"""DLRM and DLRM-DCNv2: the numbers and names of torchrec's, any number of dense features."""

import pytest
import torch
from torchrec.models import dlrm as torchrec_dlrm
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from tightrec.models.config import ModelConfig
from tightrec.models.dlrm import DLRM, DotInteraction, build_tables

CPU = torch.device("cpu")
COLUMNS = [("user", 50), ("item", 20), ("genre", 7)]
CONFIG = {"embedding_dim": 8, "bottom_layers": (12,), "top_layers": (16, 8)}


def bags(rows: int = 6) -> KeyedJaggedTensor:
    random = torch.Generator().manual_seed(3)
    lengths = torch.cat(
        [torch.ones(2 * rows, dtype=torch.int32), torch.randint(0, 4, (rows,), generator=random).int()]
    )
    ids = torch.randint(0, 7, (int(lengths.sum()),), generator=random)
    return KeyedJaggedTensor(keys=["user", "item", "genre"], values=ids, lengths=lengths)


def model(dense: int, **config) -> DLRM:
    torch.manual_seed(0)
    made = ModelConfig(**(CONFIG | config))
    return DLRM(build_tables(COLUMNS, made, CPU), dense, made, CPU)


def test_dlrm_is_torchrecs_bit_for_bit_forward_and_backward():
    ours = model(5)
    theirs = torchrec_dlrm.DLRM(build_tables(COLUMNS, ModelConfig(**CONFIG), CPU), 5, [12, 8], [16, 8, 1])
    theirs.load_state_dict(ours.state_dict())
    dense = torch.randn(6, 5)
    a, b = ours(dense, bags()), theirs(dense, bags()).squeeze(-1)
    assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, gradients[name].grad), name


def test_dcnv2_is_the_cross_network_of_torchrec():
    ours = model(5, architecture="dcnv2", cross_layers=2, cross_rank=4)
    theirs = torchrec_dlrm.DLRM_DCN(
        build_tables(COLUMNS, ModelConfig(**CONFIG), CPU), 5, [12, 8], [16, 8, 1], dcn_num_layers=2,
        dcn_low_rank_dim=4,
    )  # fmt: skip
    assert isinstance(ours.inter_arch.crossnet, LowRankCrossNet)
    theirs.load_state_dict(ours.state_dict())
    dense = torch.randn(6, 5)
    assert torch.equal(ours(dense, bags()), theirs(dense, bags()).squeeze(-1))


@pytest.mark.parametrize("architecture", ["dlrm", "dcnv2"])
def test_data_without_dense_columns_trains(architecture):
    ours = model(0, architecture=architecture)
    logits = ours(torch.empty(6, 0), bags())
    assert logits.shape == (6,)
    logits.sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_without_dense_columns_an_id_keeps_a_first_order_effect():
    config = ModelConfig(**CONFIG)
    ours = DLRM(build_tables([("user", 5)], config, CPU), 0, config, CPU)
    users = KeyedJaggedTensor(keys=["user"], values=torch.arange(5), lengths=torch.ones(5).int())
    (rows,) = ours.sparse_arch.embedding_bag_collection.parameters()
    seen = []
    ours.inter_arch.register_forward_hook(lambda module, args, out: seen.append(out))
    ours(torch.empty(5, 0), users)
    assert torch.allclose(seen[0][:, -1], rows @ ours.dense_arch.vector)


def test_mean_pooling_divides_by_the_bag():
    config = ModelConfig(**CONFIG, pooling="mean")
    tables = build_tables([("genre", 4)], config, CPU)
    bag = KeyedJaggedTensor(keys=["genre"], values=torch.tensor([0, 1, 3]), lengths=torch.tensor([2, 1, 0]))
    rows = next(iter(tables.parameters()))
    expected = torch.stack([(rows[0] + rows[1]) / 2, rows[3], torch.zeros(8)])
    assert torch.allclose(tables(bag).values(), expected)


def test_bf16_touches_the_dense_part_only():
    ours = model(5, dense_precision="bf16")
    seen = []
    ours.over_arch.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    ours.sparse_arch.pooled.register_forward_hook(lambda module, args, out: seen.append(out[0].dtype))
    logits = ours(torch.randn(6, 5), bags())
    assert seen == [torch.float32, torch.bfloat16]
    assert logits.dtype == torch.float32


def test_features_in_another_order_come_out_in_the_models_order():
    ours = model(0)
    values = torch.randn(2, 24)
    reordered = KeyedTensor(["item", "genre", "user"], [8, 8, 8], values)
    expected = torch.stack([values[:, 16:], values[:, :8], values[:, 8:16]])
    assert torch.equal(torch.stack(ours.sparse_arch.pooled(reordered)), expected)


def test_dot_interaction_follows_its_example():
    d, a, b = torch.randn(3, 1, 4)
    out = DotInteraction(3)(d, [a, b])
    products = [(d * a).sum(), (d * b).sum(), (a * b).sum()]
    assert torch.allclose(out, torch.cat([d, torch.stack(products).view(1, 3)], dim=1))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"embedding_dim": 10}, "multiple of 4"),
        ({"embedding_dim": 0}, "at least 1"),
        ({"top_layers": ()}, "top_layers"),
        ({"bottom_layers": (8, 0)}, "at least 1"),
        ({"cross_rank": 0}, "cross_rank"),
    ],
)
def test_a_model_that_cannot_be_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**fields)
