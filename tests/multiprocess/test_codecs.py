"""torchrec's codecs in its own collectives on two gloo ranks: with every sharding type, in both directions,
each keeps its error or is refused by name. In our exchange only the device can refuse one."""

from typing import get_args

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from ranks import run_ranks
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.sharding.codecs import Held, codec_registry, refusal, require_runnable
from tightrec.sharding.config import FRAMED, CodecConfig, CodecName, ShardingConfig
from tightrec.sharding.plan import Cluster, make_plan, plan_rows
from tightrec.sharding.traffic import counted_traffic

DIM, BATCH, ROWS, TABLES = 16, 32, 64, 4
CODECS = tuple(name for name in get_args(CodecName) if name not in FRAMED)
EXCHANGED = ("table_wise", "column_wise", "row_wise", "table_row_wise")
TYPES = (*EXCHANGED, "data_parallel")
FEATURES = [f"f{i}" for i in range(TABLES)]

# Largest error of one value drawn from N(0, 1) scaled by 1, as each format's step allows.
TOLERANCE = {"none": 1e-6, "fp16": 2e-3, "bf16": 2e-2, "int8": 3e-2, "mx4": 0.55}


def _tables(device: str) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        device=torch.device(device),
        tables=[
            EmbeddingBagConfig(name=f"t{i}", feature_names=[f], num_embeddings=ROWS, embedding_dim=DIM)
            for i, f in enumerate(FEATURES)
        ],
    )


def _step(
    world: int, rank: int, kind: str, codec: CodecConfig
) -> tuple[float, float, dict[str, int], list[int]]:
    """Worst forward error, worst error of the SGD update, bytes sent, and predicted bytes of all ranks."""
    tables = _tables("meta")
    cpu = torch.device("cpu")
    cluster = Cluster(world=world, local_world=world, device=cpu)
    sharder = EmbeddingBagCollectionSharder(
        fused_params={"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.1},
        qcomm_codecs_registry=codec_registry(codec, DIM),
    )
    plan = make_plan(tables, sharder, ShardingConfig(type=kind), cluster, BATCH)
    rows = plan_rows(plan, tables.embedding_bag_configs(), cluster, codec, BATCH, 0.0)
    weights = torch.randn(TABLES, ROWS, DIM, generator=torch.Generator().manual_seed(7))
    model = DistributedModelParallel(tables, device=cpu, plan=ShardingPlan({"": plan}), sharders=[sharder])
    for value, table in zip(model.state_dict().values(), weights, strict=True):
        for shard in value.local_shards():
            shard.tensor.detach().copy_(_slice(table, shard))
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, ROWS, (TABLES, BATCH), generator=generator)
    lengths = torch.ones(TABLES * BATCH, dtype=torch.int32)
    with counted_traffic() as traffic:
        pooled = model(KeyedJaggedTensor(keys=FEATURES, values=ids.flatten(), lengths=lengths)).to_dict()
        out = torch.stack([pooled[f] for f in FEATURES])
        expected = torch.stack([weights[i][ids[i]] for i in range(TABLES)])
        gradient = torch.randn(out.shape, generator=generator)
        (out * gradient).sum().backward()
    update = torch.zeros_like(weights)
    for i in range(TABLES):
        update[i].index_add_(0, ids[i], gradient[i], alpha=-0.1 / world)
    torch.distributed.all_reduce(update)
    worst = 0.0
    for value, table, change in zip(model.state_dict().values(), weights, update, strict=True):
        for shard in value.local_shards():
            difference = shard.tensor - _slice(table + change, shard)
            worst = max(worst, float(difference.abs().max()))
    predicted = [sum(r.forward_bytes for r in rows), sum(r.backward_bytes for r in rows)]
    return float((out.detach() - expected).abs().max()), worst, traffic.take(), predicted


def _slice(table: torch.Tensor, shard) -> torch.Tensor:
    (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
    return table[row : row + rows, column : column + columns]


def _matrix(rank: int, world: int, kind: str):
    results = {}
    for direction in ("forward", "backward"):
        for name in CODECS:
            if refusal(name, direction, kind, "cpu") is None:
                codec = CodecConfig(dedup=False, **{direction: name})
                results[direction, name] = _step(world, rank, kind, codec)
    return results


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", EXCHANGED)
def test_every_codec_that_is_not_refused_keeps_its_error_and_its_predicted_size(kind):
    first, second = run_ranks(2, _matrix, kind, timeout=120)
    assert len(first) >= 6
    for (direction, name), (forward_error, update_error, sent, predicted) in first.items():
        tolerance = TOLERANCE[name]
        forward = tolerance if direction == "forward" else TOLERANCE["none"]
        # A row of the update adds several gradients, each with its own error, times 0.1 / 2.
        backward = 16 * 0.05 * tolerance if direction == "backward" else 1e-6
        assert forward_error <= forward, (direction, name)
        assert update_error <= backward, (direction, name)
        if name == "bf16" and direction == "forward":
            assert forward_error > 2 * TOLERANCE["fp16"], "bf16 was asked for, a finer format was sent"
        if name != "none":
            error = forward_error if direction == "forward" else update_error
            assert error > 1e-5, f"{direction} {name} changed nothing, so it was not applied"
        both = [sent[p] + second[direction, name][2][p] for p in ("forward", "backward")]
        assert both == predicted, (direction, name)
        assert sent["input"] > 0


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", CODECS)
def test_a_refused_combination_names_codec_direction_table_and_type(kind, name):
    cpu = torch.device("cpu")
    for direction in ("forward", "backward"):
        codec = CodecConfig(dedup=False, **{direction: name})
        if refusal(name, direction, kind, "cpu") is None:
            require_runnable(codec, [Held("t0", kind, 0, DIM)], BATCH, cpu)
            continue
        with pytest.raises(ValueError, match=rf"codec.{direction}={name} .*t0 sharded {kind}"):
            require_runnable(codec, [Held("t0", kind, 0, DIM)], BATCH, cpu)


def test_int8_refuses_a_batch_that_does_not_fill_its_groups():
    cpu, int8 = torch.device("cpu"), CodecConfig(forward="int8", dedup=False)
    halves = [Held("t0", "column_wise", 0, 4), Held("t0", "column_wise", 1, 4)]
    with pytest.raises(ValueError, match=r"column_wise tables of rank 0 send 4 rows of 4 columns"):
        require_runnable(int8, halves, 4, cpu)
    require_runnable(
        int8, [*halves, Held("t1", "column_wise", 0, 4), Held("t1", "column_wise", 1, 4)], 4, cpu
    )


@pytest.mark.parametrize("name", [*CODECS, *FRAMED])
def test_our_exchange_refuses_what_the_device_cannot_do_and_nothing_else(name):
    cpu, plan = torch.device("cpu"), [Held("t0", kind, 0, 3) for kind in TYPES]
    for direction in ("forward", "backward"):
        codec = CodecConfig(**{direction: name})
        require_runnable(codec, plan, 5, torch.device("cuda"))
        if name == "fp8":
            with pytest.raises(ValueError, match=rf"codec.{direction}=fp8 cannot run on cpu"):
                require_runnable(codec, plan, 5, cpu)
        else:
            require_runnable(codec, plan, 5, cpu)
    checked = CodecConfig(forward=name, checksums=True)
    with pytest.raises(ValueError, match=r"codec\.checksums=true works on CPU"):
        require_runnable(checked, plan, 5, torch.device("cuda"))


def _refused_one_really_fails(rank: int, world: int) -> bool:
    """row-wise fp8 on CPU does not crash: it adds up bytes. The refusal must not be lifted unnoticed."""
    error, *_ = _step(world, rank, "row_wise", CodecConfig(forward="fp8", dedup=False))
    return error > 1


@pytest.mark.multiprocess
def test_row_wise_fp8_is_refused_because_torchrec_returns_garbage():
    assert run_ranks(2, _refused_one_really_fails) == [True, True]
