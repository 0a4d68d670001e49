"""Sharded tables trained on made-up bags, beside plain torchrec and beside whole tables."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
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
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.compression.policy.config import BoundConfig
from tightrec.sharding.config import CodecConfig
from tightrec.sharding.sharder import CompressedEmbeddingBagCollectionSharder

CPU = torch.device("cpu")
LR, EPS = 0.05, 1e-6
OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}
# t1 serves two features, f0 stands in two tables, dims differ, the last rank has fewer rows of t3.
FEATURES = (
    (("f0",), 20, 8),
    (("f1", "f2"), 30, 16),
    (("f0", "f3"), 20, 8),
    (("f4",), 11, 24),
    (("f5",), 25, 8),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training run."""

    kinds: str = "t"
    """Sharding by table, in turn: t table-wise on rank i, 0 on rank 0, c column-wise, r row-wise, h
    table_row_wise on host i, k table_column_wise, g grid, d data-parallel."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    optimizer: str = "sgd"
    pooling: str = "s"
    """By table, in turn: s SUM, m MEAN."""
    weighted: bool = False
    batches: tuple[int, ...] = (13, 13, 13, 13)
    """Rows of each rank's batch; ranks take turns where there are several steps and ``turning``."""
    turning: bool = False
    steps: int = 6
    shapes: tuple[tuple[tuple[str, ...], int, int], ...] = FEATURES
    """Features, rows and dim of each table."""
    longest: int = 3
    evaluate: tuple[int, ...] = ()
    """Batches of so many rows are evaluated after each step."""

    @property
    def features(self) -> list[str]:
        return sorted({name for names, _, _ in self.shapes for name in names})

    @property
    def names(self) -> list[str]:
        return [f"t{i}" for i in range(len(self.shapes))]

    def kind(self, table: int) -> str:
        return self.kinds[table % len(self.kinds)]

    def mean(self, table: int) -> bool:
        return self.pooling[table % len(self.pooling)] == "m"

    def rows(self, step: int, rank: int, world: int) -> int:
        return self.batches[(rank + step * self.turning) % world]

    @property
    def columns(self) -> list[str]:
        """Keys of the pooled output, table after table; torchrec's own order follows the ranks."""
        every = [name for names, _, _ in self.shapes for name in names]
        pairs = [
            (name, table)
            for table, (names, _, _) in zip(self.names, self.shapes, strict=True)
            for name in names
        ]
        return [f"{name}@{table}" if every.count(name) > 1 else name for name, table in pairs]

    @property
    def width(self) -> int:
        return sum(dim * len(names) for names, _, dim in self.shapes)


def lossy(forward: str, backward: str | None = None, **more: Any) -> CodecConfig:
    bound = BoundConfig(forward=forward, backward=backward or forward)
    return CodecConfig(forward="lossy", backward="lossy", bound=bound, **more)


def bags(case: Case, rows: int, seed: int) -> tuple[KeyedJaggedTensor, Tensor]:
    """Half as many different bags as rows, so that they repeat; and targets [rows, width]."""
    generator = torch.Generator().manual_seed(seed)

    def below(most: int, count: int) -> Tensor:
        return torch.randint(most, (count,), generator=generator)

    values, lengths, weights = [], [], []
    for name in case.features:
        fewest = min(held for names, held, _ in case.shapes if name in names)
        pool = max(1, rows // 2)
        sizes = below(case.longest + 1, pool)
        ids, scales = below(fewest, int(sizes.sum())), torch.rand(int(sizes.sum()), generator=generator)
        picked = below(pool, rows).tolist()
        cut, scaled = ids.split(sizes.tolist()), scales.split(sizes.tolist())
        values += [cut[i] for i in picked]
        weights += [scaled[i] for i in picked]
        lengths.append(sizes[picked])
    batch = KeyedJaggedTensor(
        keys=case.features,
        values=torch.cat(values) if values else torch.zeros(0, dtype=torch.int64),
        lengths=torch.cat(lengths),
        weights=(torch.cat(weights) if weights else torch.zeros(0)) if case.weighted else None,
        stride=rows,
    )
    return batch, torch.randn(rows, case.width, generator=generator)


def batch_of(case: Case, step: int, rank: int, world: int) -> tuple[KeyedJaggedTensor, Tensor]:
    return bags(case, case.rows(step, rank, world), 1000 * step + rank)


def loss_of(pooled: Tensor, target: Tensor) -> Tensor:
    return (pooled - target).square().sum() / 100


def initial(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = zip(case.names, case.shapes, strict=True)
    return {name: torch.rand(rows, dim, generator=generator) - 0.5 for name, (_, rows, dim) in shapes}


def collection(case: Case, device: str = "meta") -> EmbeddingBagCollection:
    tables = [
        EmbeddingBagConfig(
            name=name,
            feature_names=list(names),
            num_embeddings=rows,
            embedding_dim=dim,
            pooling=PoolingType.MEAN if case.mean(i) else PoolingType.SUM,
        )
        for i, (name, (names, rows, dim)) in enumerate(zip(case.names, case.shapes, strict=True))
    ]
    return EmbeddingBagCollection(device=torch.device(device), is_weighted=case.weighted, tables=tables)


def plain_sharder(case: Case) -> EmbeddingBagCollectionSharder:
    return EmbeddingBagCollectionSharder(fused_params=fused(case))


def our_sharder(case: Case) -> CompressedEmbeddingBagCollectionSharder:
    return CompressedEmbeddingBagCollectionSharder(codec=case.codec, fused_params=fused(case))


def fused(case: Case) -> dict[str, Any]:
    return {"optimizer": OPTIMIZERS[case.optimizer], "learning_rate": LR, "eps": EPS}


def plan_of(case: Case, world: int, sharder: EmbeddingBagCollectionSharder, tables: Any) -> Any:
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    makers: dict[str, Callable[[int], Any]] = {
        "t": lambda i: table_wise(rank=i % world),
        "0": lambda i: table_wise(rank=0),
        "c": lambda i: column_wise(ranks=list(range(2))),
        "k": lambda i: column_wise(ranks=[(local * i) % world + j % local for j in range(2)]),
        "r": lambda i: row_wise(),
        "h": lambda i: table_row_wise(host_index=i % (world // local)),
        "g": lambda i: grid_shard(host_indexes=list(range(world // local))),
        "d": lambda i: data_parallel(),
    }
    chosen = {name: makers[case.kind(i)](i) for i, name in enumerate(case.names)}
    plan = construct_module_sharding_plan(
        tables, chosen, sharder=sharder, local_size=local, world_size=world, device_type="cpu"
    )
    for i, name in enumerate(case.names):
        plan[name].compute_kernel = "dense" if case.kind(i) == "d" else "fused"
        if case.kind(i) == "k":
            plan[name].sharding_type = "table_column_wise"
    return plan


class Holder(nn.Module):
    """A model of tables only: the sum of the pooled outputs of its collections."""

    def __init__(self, made: list[EmbeddingBagCollection], columns: list[str]) -> None:
        super().__init__()
        self.columns, self.keys = columns, [""]
        for i, one in enumerate(made):
            self.add_module(f"e{i}", one)
        self.count = len(made)

    def forward(self, batch: KeyedJaggedTensor) -> Tensor:
        pooled = [getattr(self, f"e{i}")(batch) for i in range(self.count)]
        self.keys = pooled[0].keys()
        return torch.stack([torch.cat([one[name] for name in self.columns], dim=1) for one in pooled]).sum(0)


class Trained:
    """A sharded model with the optimizer of its data-parallel tables."""

    def __init__(self, case: Case, world: int, sharder: Any, copies: int = 1) -> None:
        self.case = case
        made = [collection(case) for _ in range(copies)]
        plans = {f"e{i}": plan_of(case, world, sharder, one) for i, one in enumerate(made)}
        self.model = DistributedModelParallel(
            Holder(made, case.columns), device=CPU, plan=ShardingPlan(plans), sharders=[sharder]
        )
        given = initial(case)
        for name, part, slices in self.shards():
            part.copy_(given[name][slices])
        dense = [p for _, p in in_backward_optimizer_filter(self.model.named_parameters())]
        kind = torch.optim.SGD if case.optimizer == "sgd" else torch.optim.Adagrad
        self.dense = kind(dense, lr=LR) if dense else None

    @property
    def module(self) -> Any:
        """The first sharded collection."""
        return self.model.module.e0

    def shards(self) -> Iterator[tuple[str, Tensor, tuple[slice, ...]]]:
        """Table, this rank's tensor of it, and which rows and columns those are."""
        for key, value in self.model.state_dict().items():
            name = key.split(".")[-2]
            if isinstance(value, ShardedTensor):
                for shard in value.local_shards():
                    starts, sizes = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                    yield (
                        name,
                        shard.tensor.detach(),
                        tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True)),
                    )
            else:
                yield name, value.detach(), (slice(None), slice(None))

    def step(self, batch: KeyedJaggedTensor, target: Tensor) -> tuple[float, Tensor]:
        pooled = self.model(batch)
        loss = loss_of(pooled, target)
        loss.backward()
        self.update()
        return loss.item(), pooled.detach()

    def update(self) -> None:
        if self.dense is not None:
            self.dense.step()
            self.dense.zero_grad()

    def evaluate(self, batch: KeyedJaggedTensor) -> Tensor:
        with torch.no_grad():
            return self.model(batch)


class Unsharded:
    """The same by whole tables and plain autograd, on the batches of all ranks; SGD."""

    def __init__(self, case: Case, world: int, division: int | None = None, copies: int = 1) -> None:
        self.case, self.copies = case, copies
        self.tables = {name: value.requires_grad_() for name, value in initial(case).items()}
        self.division = division or world

    def pooled(self, batch: KeyedJaggedTensor) -> Tensor:
        columns = []
        for i, (name, (features, _, _)) in enumerate(zip(self.case.names, self.case.shapes, strict=True)):
            for feature in features:
                bag = batch[feature]
                lengths = bag.lengths().long()
                owners = torch.repeat_interleave(lengths)
                rows = self.tables[name][bag.values()]
                if self.case.weighted:
                    rows = rows * bag.weights().unsqueeze(1)
                sums = torch.zeros(len(lengths), rows.shape[1]).index_add(0, owners, rows)
                columns.append(sums / lengths.clamp_min(1).unsqueeze(1) if self.case.mean(i) else sums)
        return torch.cat(columns, dim=1) * self.copies

    def step(self, batches: list[tuple[KeyedJaggedTensor, Tensor]], rank: int) -> tuple[float, Tensor]:
        pooled = [self.pooled(batch) for batch, _ in batches]
        losses = [loss_of(out, target) for out, (_, target) in zip(pooled, batches, strict=True)]
        # A rank's gradient reaches every collection of tables by itself.
        (torch.stack(losses).sum() / self.division / self.copies).backward()
        with torch.no_grad():
            for table in self.tables.values():
                table -= LR * table.grad
                table.grad = None
        return losses[rank].item(), pooled[rank].detach()

    def evaluate(self, batch: KeyedJaggedTensor) -> Tensor:
        with torch.no_grad():
            return self.pooled(batch)


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape, (one.shape, other.shape)
    return float((one - other).abs().max()) if one.numel() else 0.0


Worst = dict[str, float]
"""Largest relative difference of losses, and absolute one of outputs, table shards and evaluated outputs."""


def against_plain(case: Case, rank: int, world: int) -> Worst:
    """Our exchange beside torchrec's on the same batches; ranks must have equally many rows."""
    return _beside(case, Trained(case, world, plain_sharder(case)), rank, world)


def against_exact(case: Case, rank: int, world: int) -> Worst:
    """Our exchange with the case's codec beside ours with none."""
    exact = replace(case, codec=CodecConfig())
    return _beside(case, Trained(exact, world, our_sharder(exact)), rank, world)


def _beside(case: Case, other: Trained, rank: int, world: int) -> Worst:
    ours = Trained(case, world, our_sharder(case))
    worst: Worst = dict.fromkeys(("loss", "output", "weights"), 0.0)
    for step in range(case.steps):
        batch, target = batch_of(case, step, rank, world)
        mine, theirs = ours.step(batch, target), other.step(batch, target)
        worst["loss"] = max(worst["loss"], abs(mine[0] / theirs[0] - 1) if theirs[0] else abs(mine[0]))
        worst["output"] = max(worst["output"], difference(mine[1], theirs[1]))
    assert ours.model.module.keys == other.model.module.keys
    for (_, one, _), (_, same, _) in zip(ours.shards(), other.shards(), strict=True):
        worst["weights"] = max(worst["weights"], difference(one, same))
    return worst


def against_unsharded(case: Case, rank: int, world: int, copies: int = 1) -> Worst:
    """Our exchange beside whole tables; batches may differ between ranks and be empty."""
    ours, whole = Trained(case, world, our_sharder(case), copies), Unsharded(case, world, copies=copies)
    worst: Worst = dict.fromkeys(("loss", "output", "weights", "evaluated"), 0.0)
    for step in range(case.steps):
        mine = ours.step(*batch_of(case, step, rank, world))
        theirs = whole.step([batch_of(case, step, r, world) for r in range(world)], rank)
        worst["loss"] = max(worst["loss"], abs(mine[0] / theirs[0] - 1) if theirs[0] else abs(mine[0]))
        worst["output"] = max(worst["output"], difference(mine[1], theirs[1]))
        for number, rows in enumerate(case.evaluate):
            batch, _ = bags(case, rows, 77 * step + rank + 1000 * number)
            worst["evaluated"] = max(
                worst["evaluated"], difference(ours.evaluate(batch), whole.evaluate(batch))
            )
    for name, part, slices in ours.shards():
        worst["weights"] = max(worst["weights"], difference(part, whole.tables[name].detach()[slices]))
    return worst


def in_hosts_of(ranks: int, rank: int) -> None:
    """Let torchrec see machines of so many ranks each; before it makes its groups."""
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    os.environ["LOCAL_RANK"] = str(rank % ranks)


def each(rank: int, world: int, compared: Callable[..., Worst], cases: list[Case], local: int) -> list[Worst]:
    """Several cases in the same processes, to save their start."""
    in_hosts_of(local, rank)
    found = []
    for case in cases:
        try:
            found.append(compared(case, rank, world))
        except Exception as error:
            raise RuntimeError(f"rank {rank}: {case}: {type(error).__name__}: {error}") from error
    return found


def worst_of(found: list[list[Worst]]) -> list[Worst]:
    """By case, the largest difference of any rank."""
    return [{key: max(one[key] for one in same) for key in same[0]} for same in zip(*found, strict=True)]


def without_dedup(case: Case) -> Case:
    return replace(case, codec=replace(case.codec, dedup=False))
