"""Which rank holds which part of which table: planned by torchrec, forced per type, printed, predicted."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    grid_shard,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingType
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from tightrec.sharding.codecs import Held, bytes_per_value
from tightrec.sharding.config import CodecConfig, ShardingConfig, ShardingName

_GB = 1024**3
_COLUMN_BLOCK = 4
"""fbgemm's operators want shard dims in multiples of 4."""


ROW_SPLIT: tuple[ShardingName, ...] = ("row_wise", "table_row_wise", "grid_shard")
"""Types that split the rows of a table over ranks."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The ranks that tables are spread over."""

    world: int
    """Number of ranks."""

    local_world: int
    """Ranks on one machine."""

    device: torch.device
    """Where tables live."""

    @property
    def hosts(self) -> int:
        """Number of machines."""
        return max(1, self.world // self.local_world)


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One table of a plan, as printed and saved."""

    table: str
    type: str
    ranks: tuple[int, ...]
    rows: int
    dim: int
    memory_bytes: int
    """Weights and optimizer state, all ranks together."""

    forward_bytes: int
    """Predicted pooled embeddings sent in one step, all ranks together."""

    backward_bytes: int
    """Predicted gradients sent in one step, all ranks together."""


def make_plan(
    tables: EmbeddingBagCollection,
    sharder: EmbeddingBagCollectionSharder,
    config: ShardingConfig,
    cluster: Cluster,
    batch_size: int,
) -> EmbeddingModuleShardingPlan:
    """Plan ``tables`` (unsharded, may be on meta) over ``cluster``; every rank gets the same plan.

    A collective with ``type=auto``: rank 0 plans and broadcasts.

    Raises:
        ValueError: a type that this cluster or table cannot take, a table name that matches nothing,
            or tables that do not fit. Tables with too few rows for a row-splitting ``type`` go table-wise;
            named in ``tables``, they are refused.
    """
    configs = tables.embedding_bag_configs()
    forced = _forced_types(configs, config, cluster)
    plan = EmbeddingModuleShardingPlan()
    if config.type == "auto" and len(forced) < len(configs):
        plan = _planned(tables, sharder, config, cluster, batch_size)
    if forced:
        generators = _generators(configs, forced, cluster)
        left_to_planner = {c.name: data_parallel() for c in configs if c.name not in forced}
        explicit = construct_module_sharding_plan(
            tables,
            {c.name: (generators | left_to_planner)[c.name] for c in configs},
            sharder=sharder,
            local_size=cluster.local_world,
            world_size=cluster.world,
            device_type=cluster.device.type,
        )
        for name, kind in forced.items():
            # The generators choose the dense kernel unless an optimizer hangs on the parameter; ours is
            # given to the sharder instead, and only data-parallel tables have no fused kernel.
            explicit[name].compute_kernel = "dense" if kind == "data_parallel" else "fused"
            plan[name] = explicit[name]
    return plan


def _forced_types(
    configs: Sequence[BaseEmbeddingConfig], config: ShardingConfig, cluster: Cluster
) -> dict[str, ShardingName]:
    names = [c.name for c in configs]
    forced: dict[str, ShardingName] = {}
    if config.type != "auto":
        forced = dict.fromkeys(names, config.type)
        if config.type in ROW_SPLIT:
            # A rank with none of a table's rows fails in fbgemm's CPU backward, and sharing out a handful
            # of rows gains nothing.
            small = [
                c.name for c in configs if not fills_ranks(c.num_embeddings, _holders(config.type, cluster))
            ]
            forced |= dict.fromkeys(small, "table_wise")
    for pattern, kind in config.tables.items():
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise ValueError(
                f"sharding.tables: {pattern!r} matches no table. Tables: {', '.join(names[:30])}"
                f"{', ...' if len(names) > 30 else ''}."
            )
        forced.update(dict.fromkeys(matches, kind))
    for table in configs:
        kind_of = forced.get(table.name)
        if kind_of in ROW_SPLIT and not fills_ranks(table.num_embeddings, _holders(kind_of, cluster)):
            raise ValueError(
                f"sharding.tables: table {table.name} has {table.num_embeddings} rows, too few to give "
                f"each of {_holders(kind_of, cluster)} ranks a part by {kind_of}. Use table_wise or "
                "column_wise for it."
            )
    return forced


def fills_ranks(rows: int, ranks: int) -> bool:
    """Whether torchrec's equal blocks of ceil(rows / ranks) rows leave no rank without one."""
    return -(-rows // ranks) * (ranks - 1) < rows


def _holders(kind: ShardingName, cluster: Cluster) -> int:
    """Ranks that the rows of one table are spread over."""
    return cluster.world if kind == "row_wise" else cluster.local_world


def _planned(
    tables: EmbeddingBagCollection,
    sharder: EmbeddingBagCollectionSharder,
    config: ShardingConfig,
    cluster: Cluster,
    batch_size: int,
) -> EmbeddingModuleShardingPlan:
    allowed = [t.value for t in ShardingType if t.value not in config.exclude]
    memory: dict[str, Any] = {}
    if config.memory_gb is not None:
        memory = {"hbm_cap": int(config.memory_gb * _GB), "ddr_cap": int(config.memory_gb * _GB)}
    elif cluster.device.type == "cpu":
        memory = {"ddr_cap": 16 * _GB}
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=cluster.world,
            local_world_size=cluster.local_world,
            compute_device=cluster.device.type,
            **memory,
        ),
        batch_size=batch_size,
        constraints={
            c.name: ParameterConstraints(sharding_types=allowed) for c in tables.embedding_bag_configs()
        },
        stats=[],
        debug=False,
    )
    try:
        if cluster.world > 1:
            found = planner.collective_plan(tables, [sharder], dist.group.WORLD)
        else:
            found = planner.plan(tables, [sharder])
    except PlannerError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"torchrec's planner found no plan: {reason} Raise sharding.memory_gb, use more ranks, a smaller "
            "model.embedding_dim or data.loader.batch_size, or force a type with sharding.type."
        ) from None
    (plan,) = found.plan.values()
    return plan


def _generators(
    configs: Sequence[BaseEmbeddingConfig], forced: Mapping[str, ShardingName], cluster: Cluster
) -> dict[str, ParameterShardingGenerator]:
    """Spread the forced tables: the widest and tallest first, each to the least loaded place."""
    rank_load = [(0, 0)] * cluster.world
    host_load = [(0, 0)] * cluster.hosts

    def lightest(load: list[tuple[int, int]], config: BaseEmbeddingConfig) -> int:
        place = min(range(len(load)), key=load.__getitem__)
        dim, cells = load[place]
        # The wire carries dims, memory holds cells: balance the first, break ties by the second.
        load[place] = (dim + config.embedding_dim, cells + config.num_embeddings * config.embedding_dim)
        return place

    made: dict[str, ParameterShardingGenerator] = {}
    for config in sorted(configs, key=lambda c: (-c.embedding_dim, -c.num_embeddings, c.name)):
        kind = forced.get(config.name)
        if kind is None:
            continue
        if kind == "table_wise":
            made[config.name] = table_wise(rank=lightest(rank_load, config))
        elif kind == "column_wise":
            made[config.name] = column_wise(ranks=_column_ranks(config, cluster))
        elif kind == "row_wise":
            made[config.name] = row_wise()
        elif kind == "table_row_wise":
            made[config.name] = table_row_wise(host_index=lightest(host_load, config))
        elif kind == "grid_shard":
            if config.embedding_dim < 128 * cluster.hosts:
                raise ValueError(
                    f"sharding: table {config.name} cannot be grid_shard: torchrec cuts columns in blocks "
                    f"of 128 and needs one a machine, but dim is {config.embedding_dim} on "
                    f"{cluster.hosts} machine(s). "
                    "Use table_row_wise, or a wider model.embedding_dim."
                )
            made[config.name] = grid_shard(host_indexes=list(range(cluster.hosts)))
        else:
            made[config.name] = data_parallel()
    return made


def _column_ranks(config: BaseEmbeddingConfig, cluster: Cluster) -> list[int]:
    """All ranks if every shard gets a multiple of 4 columns, else the largest number that divides."""
    blocks = config.embedding_dim // _COLUMN_BLOCK
    shards = next(n for n in range(min(blocks, cluster.world), 0, -1) if blocks % n == 0)
    return list(range(shards))


def held_columns(plan: EmbeddingModuleShardingPlan) -> list[Held]:
    """Which rank holds how many columns of which table; data-parallel tables stand with rank 0 and none."""
    found = []
    for name, sharding in plan.items():
        if sharding.sharding_spec is None:
            found.append(Held(name, sharding.sharding_type, 0, 0))
            continue
        for rank, shard in zip(sharding.ranks, sharding.sharding_spec.shards, strict=True):
            found.append(Held(name, sharding.sharding_type, rank, shard.shard_sizes[1]))
    return found


def plan_rows(
    plan: EmbeddingModuleShardingPlan,
    tables: Sequence[BaseEmbeddingConfig],
    cluster: Cluster,
    codec: CodecConfig,
    batch_size: int,
    optimizer_floats_per_value: float,
) -> list[PlanRow]:
    """Describe ``plan``; bytes are payload sent between ranks, ``batch_size`` rows a rank.

    The gradients of data-parallel tables travel in the dense layers' all-reduce and are not counted.
    """
    rows = []
    for config in tables:
        sharding = plan[config.name]
        kind = sharding.sharding_type
        cells = config.num_embeddings * config.embedding_dim
        copies = cluster.world if kind == "data_parallel" else 1
        values = _vectors_sent(kind, cluster) * batch_size * config.embedding_dim
        forward = round(values * bytes_per_value(codec.forward, config.embedding_dim))
        backward = round(values * bytes_per_value(codec.backward, config.embedding_dim))
        rows.append(
            PlanRow(
                table=config.name,
                type=kind,
                ranks=tuple(sorted(set(sharding.ranks or range(cluster.world)))),
                rows=config.num_embeddings,
                dim=config.embedding_dim,
                memory_bytes=round(copies * cells * 4 * (1 + optimizer_floats_per_value)),
                forward_bytes=forward,
                backward_bytes=backward,
            )
        )
    return rows


def _vectors_sent(kind: str, cluster: Cluster) -> int:
    """How many times a table's [batch_size, dim] leaves a rank for another in one direction, all ranks."""
    world, local, hosts = cluster.world, cluster.local_world, cluster.hosts
    if kind == "data_parallel":
        return 0
    if kind == "row_wise":
        return world * (world - 1)
    if kind in ("table_row_wise", "grid_shard"):
        # A reduce-scatter of everybody's rows inside the machine, then the sums to the other machines.
        return (local - 1) * world + local * (hosts - 1)
    return world - 1
