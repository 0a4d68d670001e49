"""codec.transport=capacity: fixed slots, overflows repaired in the same step, the very same values."""

import hashlib
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.sharding.arrival import Arrival
from tightrec.sharding.config import CodecConfig, ShardingConfig
from tightrec.sharding.plan import Cluster, make_plan
from tightrec.sharding.sharder import CompressedEmbeddingBagCollectionSharder

ROWS, DIM, BATCH, STEPS = 4000, 8, 48, 60
KEYS = [f"f{i}" for i in range(4)]
JUMPS = frozenset(range(12, STEPS, 12))
"""Steps whose batches hold many rows; all others hold two, long enough for slots to shrink."""


def _model(world: int, kind: str, transport: Any) -> DistributedModelParallel:
    tables = EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingBagConfig(name=f"t{i}", feature_names=[key], num_embeddings=ROWS, embedding_dim=DIM)
            for i, key in enumerate(KEYS)
        ],
    )
    codec = CodecConfig(
        forward="lossy",
        backward="lossy",
        transport=transport,
        checksums=True,
        stats_every=0,
        shadow_every=0,
        refresh_every=20,
    )
    cpu = torch.device("cpu")
    sharder = CompressedEmbeddingBagCollectionSharder(codec=codec, fused_params={"learning_rate": 0.1})
    cluster = Cluster(world=world, local_world=world, device=cpu)
    plan = make_plan(tables, sharder, ShardingConfig(type=kind), cluster, BATCH)
    return DistributedModelParallel(tables, device=cpu, plan=ShardingPlan({"": plan}), sharders=[sharder])


def _digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def _train(rank: int, world: int, kind: str, everybody: bool) -> tuple[list[str], list[str], list[int]]:
    """Digests of every step for both transports, and the overflows of each step on this rank."""
    overflows = [0] * STEPS
    step = 0
    real = Arrival.complete

    def complete(self: Arrival, rests, buffers):
        overflows[step] += sum(rest.numel() > 0 for rest in rests)
        return real(self, rests, buffers)

    Arrival.complete = complete  # type: ignore[method-assign]
    digests = []
    for transport in ("sizes", "capacity"):
        torch.manual_seed(rank)
        model = _model(world, kind, transport)
        generator = torch.Generator().manual_seed(rank)
        of_steps = []
        for step in range(STEPS):
            wild = step in JUMPS and (everybody or rank == step // 12 % world)
            ids = torch.randint(0, ROWS if wild else 2, (len(KEYS) * BATCH,), generator=generator)
            lengths = torch.ones(len(KEYS) * BATCH, dtype=torch.int32)
            pooled = model(KeyedJaggedTensor(keys=KEYS, values=ids, lengths=lengths)).values()
            (pooled * torch.randn(pooled.shape, generator=generator)).sum().backward()
            shards = [s.tensor for v in model.state_dict().values() for s in v.local_shards()]
            of_steps.append(_digest(pooled, *(shards if step % 10 == 9 else [])))
            if step % 16 == 15:
                with torch.no_grad():
                    few = KeyedJaggedTensor(
                        keys=KEYS, values=ids[: 4 * 5], lengths=torch.ones(4 * 5, dtype=torch.int32)
                    )
                    of_steps.append(_digest(model(few).values()))
        digests.append(of_steps)
    return digests[0], digests[1], overflows


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("world", "kind", "everybody"),
    [(2, "table_wise", True), (4, "row_wise", True), (4, "table_wise", False)],
)
def test_values_are_those_of_told_sizes_whatever_overflows(world, kind, everybody):
    for rank, (told, slotted, overflows) in enumerate(run_ranks(world, _train, kind, everybody, timeout=90)):
        assert told == slotted
        jumped = {step for step, count in enumerate(overflows) if count}
        assert len(jumped & JUMPS) >= 3, (rank, overflows)
        if everybody:
            # Everybody sent more than fits to everybody in the same exchange, both ways.
            assert all(overflows[step] >= 2 * (world - 1) for step in JUMPS), (rank, overflows)
