"""A small torchrec program that shards tables over ranks and trains them, twice: with torchrec's own exchange
(minimal_torchrec.py) and with tightrec's (compressed_torchrec.py). The two differ in one line, an import.

    torchrun --standalone --nproc-per-node 2 examples/minimal_torchrec.py --save plain
    torchrun --standalone --nproc-per-node 2 examples/compressed_torchrec.py --load plain

Two tables, random clicks that depend on the ids, gloo on CPU or NCCL on GPUs. It prints the loss as it falls.
"""

import argparse
import os
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import distributed as dist
from torch.distributed import checkpoint
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

# isort: split
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

ROWS, DIM, BATCH, STEPS = 1_000, 16, 256, 101


class ClickModel(torch.nn.Module):
    """Sum of the two embeddings through one linear layer."""

    def __init__(self, tables: EmbeddingBagCollection, device: torch.device) -> None:
        super().__init__()
        self.tables = tables
        self.head = torch.nn.Linear(2 * DIM, 1, device=device)

    def forward(self, clicks: KeyedJaggedTensor) -> torch.Tensor:
        pooled = self.tables(clicks).to_dict()
        return self.head(torch.cat([pooled["user"], pooled["item"]], dim=1)).squeeze(-1)


def state_of(model: DistributedModelParallel) -> dict[str, Any]:
    """Weights, and what the fused optimizer keeps of the tables."""
    return {"model": model.state_dict(), "tables": model.fused_optimizer.state_dict()}


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--load", help="folder of a checkpoint to start from")
    words.add_argument("--save", help="folder for a checkpoint at the end")
    arguments = words.parse_args()
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    tables = EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingBagConfig(name=f"t_{name}", feature_names=[name], num_embeddings=ROWS, embedding_dim=DIM)
            for name in ("user", "item")
        ],
    )
    sharder = EmbeddingBagCollectionSharder(
        fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1}
    )
    placement = construct_module_sharding_plan(
        tables,
        {"t_user": table_wise(rank=0), "t_item": table_wise(rank=1 % world)},
        sharder=sharder,
        device_type=device.type,
    )
    for parameter in placement.values():
        parameter.compute_kernel = "fused"
    model = DistributedModelParallel(
        ClickModel(tables, device),
        device=device,
        plan=ShardingPlan({"tables": placement}),
        sharders=[sharder],
    )
    # Tables update themselves inside backward; what is left is the head.
    left = dict(in_backward_optimizer_filter(model.named_parameters()))
    head = torch.optim.Adagrad(left.values(), lr=0.05)

    if arguments.load:
        state = state_of(model)
        checkpoint.load(state, checkpoint_id=arguments.load)
        model.load_state_dict(state["model"])
        model.fused_optimizer.load_state_dict(state["tables"])

    random = torch.Generator().manual_seed(rank)
    for step in range(STEPS):
        ids = torch.randint(0, ROWS, (2 * BATCH,), generator=random)
        user, item = ids.view(2, BATCH)
        labels = ((user % 10 < 3) | (item % 10 < 3)).float().to(device)
        clicks = KeyedJaggedTensor(
            keys=["user", "item"], values=ids, lengths=torch.ones(2 * BATCH, dtype=torch.int32)
        ).to(device)
        head.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(clicks), labels)
        loss.backward()
        head.step()
        if rank == 0 and step % 20 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}")
    if arguments.save:
        checkpoint.save(state_of(model), checkpoint_id=arguments.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
