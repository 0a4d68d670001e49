"""A tiny DLRM on torchrec, trained on made-up rows, for the checkpoint tests."""

import os
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    grid_shard,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.trainer.checkpoint_state import leaves_of

ROWS = {"a": 12, "b": 10, "c": 15}
DIM = 8
BATCH = 8
DENSE = 4
TABLES = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}
DENSES = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}


def unsharded(rows: dict[str, int] = ROWS, dim: int = DIM, device: str = "cpu") -> nn.Module:
    tables = [
        EmbeddingBagConfig(name=n, embedding_dim=dim, num_embeddings=r, feature_names=[f"f_{n}"])
        for n, r in rows.items()
    ]
    return DLRM(
        EmbeddingBagCollection(device=torch.device(device), tables=tables),
        dense_in_features=DENSE,
        dense_arch_layer_sizes=[8, dim],
        over_arch_layer_sizes=[8, 1],
    )


def batch_of(step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, KeyedJaggedTensor, Tensor]:
    """This rank's rows of the global batch of ``step``: dense [B, 4], bags of 1 to 3 ids, labels [B]."""
    generator = torch.Generator().manual_seed(1000 + step)
    dense = torch.rand(BATCH, DENSE, generator=generator)
    labels = torch.randint(2, (BATCH,), generator=generator).float()
    bags = {
        n: [torch.randint(r, (1 + i % 3,), generator=generator) for i in range(BATCH)]
        for n, r in ROWS.items()
    }
    rows = range(rank * BATCH // world, (rank + 1) * BATCH // world)
    mine = [bags[name][i] for name in ROWS for i in rows]
    sparse = KeyedJaggedTensor.from_lengths_sync(
        keys=[f"f_{n}" for n in ROWS],
        values=torch.cat(mine),
        lengths=torch.tensor([len(bag) for bag in mine]),
    )
    return dense[rows], sparse, labels[rows]


class Job:
    """Model, optimizers and steps; ``sharding`` is one type, or one letter-coded type for each table.

    t: table-wise on rank 0, u: on the last rank, r: row-wise, c: column-wise, d: data-parallel,
    g: grid over two nodes of half the ranks each.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        sharding: str,
        tables: str = "rowwise",
        dense: str = "adagrad",
        rows: dict[str, int] = ROWS,
        dim: int = DIM,
        seed: int = 0,
        kernel: str = "fused",
    ) -> None:
        self.rank, self.world = rank, world
        torch.manual_seed(100 * seed + 7)
        model = unsharded(rows, dim, "meta")
        kinds = {
            "t": lambda: table_wise(0),
            "u": lambda: table_wise(world - 1),
            "r": row_wise,
            "c": lambda: column_wise(ranks=list(range(min(world, dim // 4)))),
            "d": data_parallel,
            "g": lambda: grid_shard(host_indexes=[0, 1]),
        }
        sharding = sharding * len(rows) if len(sharding) == 1 else sharding
        local_world = world // 2 if "g" in sharding else world
        # torchrec tells nodes apart by it.
        os.environ["LOCAL_WORLD_SIZE"] = str(local_world)
        sharder = EmbeddingBagCollectionSharder(
            fused_params={"optimizer": TABLES[tables], "learning_rate": 0.1}
        )
        plan = construct_module_sharding_plan(
            model.sparse_arch.embedding_bag_collection,
            {name: kinds[kind]() for name, kind in zip(rows, sharding, strict=True)},
            sharder=sharder,
            world_size=world,
            local_size=local_world,
            device_type="cpu",
        )
        for name, kind in zip(rows, sharding, strict=True):
            plan[name].compute_kernel = "dense" if kind == "d" else kernel
        self.model = DistributedModelParallel(
            model,
            device=torch.device("cpu"),
            plan=ShardingPlan({"sparse_arch.embedding_bag_collection": plan}),
            sharders=[sharder],
        )
        parameters = dict(in_backward_optimizer_filter(self.model.named_parameters()))
        self.optimizer = CombinedOptimizer(
            [
                self.model.fused_optimizer,
                KeyedOptimizerWrapper(parameters, lambda p: DENSES[dense](p, lr=0.05)),
            ]
        )
        self.state = {"model": self.model, "optimizer": self.optimizer}

    def train(self, first: int, count: int) -> list[float]:
        return [self.step(first + i) for i in range(count)]

    def step(self, number: int) -> float:
        dense, sparse, labels = batch_of(number, self.rank, self.world)
        self.optimizer.zero_grad()
        logits = self.model(dense, sparse).squeeze(-1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def predict(self) -> list[float]:
        return predictions_of(self.model)

    def local(self) -> dict[str, Tensor]:
        """Copies of all tensors of this rank, weights and optimizer state, by name (and shard)."""
        found = {}
        for name, leaf in leaves_of({k: v.state_dict() for k, v in self.state.items()}).items():
            if isinstance(leaf.value, ShardedTensor):
                for shard in leaf.value.local_shards():
                    found[f"{name}@{tuple(shard.metadata.shard_offsets)}"] = shard.tensor.clone()
            else:
                found[name] = leaf.value.clone()
        return found


def predictions_of(model: nn.Module) -> list[float]:
    """Logits of a fixed batch, the same on every rank."""
    dense, sparse, _ = batch_of(999_999)
    with torch.no_grad():
        return model(dense, sparse).squeeze(-1).tolist()


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ in any bit, or are in one only."""
    differing: list[Any] = sorted(one.keys() ^ other.keys())
    return differing + [name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])]
