"""From configuration and schema to a sharded model with its optimizer."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer

from tightrec.formats.columns import Source
from tightrec.formats.parquet import ParquetSource
from tightrec.formats.schema import Schema, load_schema
from tightrec.models.dlrm import DLRM, build_tables
from tightrec.models.hashed_arch import build_hashed
from tightrec.sharding.codecs import require_runnable
from tightrec.sharding.config import CodecConfig
from tightrec.sharding.plan import Cluster, PlanRow, held_columns, make_plan, plan_rows
from tightrec.sharding.sharded import CompressedShardedEmbeddingBagCollection
from tightrec.sharding.sharder import CompressedEmbeddingBagCollectionSharder
from tightrec.sharding.steering import Steering
from tightrec.trainer.config import DataConfig, JobConfig
from tightrec.trainer.data.synthetic import SyntheticSource
from tightrec.trainer.model_size import ModelSize, size_of
from tightrec.trainer.optimizer import LearningRate, build_optimizer, fused_parameters
from tightrec.trainer.ranks import Ranks
from tightrec.trainer.task import ClickTask

TABLES_PATH = "model.sparse_arch.embedding_bag_collection"
"""Where the tables stand in a ClickTask."""


@dataclass(frozen=True)
class Built:
    """A model ready to train."""

    task: DistributedModelParallel
    optimizer: CombinedOptimizer
    learning_rate: LearningRate
    size: ModelSize
    plan: list[PlanRow]
    """One row a table; empty where no feature has a table."""
    plain_plan: list[PlanRow]
    """The same, with the bytes that plain float32 would send."""
    steering: Steering | None
    """Of the exchange, where it is the project's own and there is a table to exchange rows of."""


def derived_seed(seed: int, rank: int, purpose: str) -> int:
    """A seed for ``purpose`` on ``rank``; different purposes and ranks get unrelated streams."""
    return (seed * 1_000_003 + rank * 7_919 + zlib.crc32(purpose.encode())) % 2**63


def open_sources(config: DataConfig) -> dict[str, Source]:
    """Every split that the data has, by name.

    Raises:
        ValueError: the prepared folder is missing (with the command that makes it) or damaged.
    """
    if config.source == "synthetic":
        splits = ("train", "valid", "test")
        synthetic = {split: SyntheticSource(config.synthetic, split) for split in splits}
        return {split: source for split, source in synthetic.items() if source.row_counts}
    folder = Path(config.path or "")
    if not folder.is_dir() and config.prepare:
        raise ValueError(f"data.path={folder} does not exist. Make it with\n    {config.prepare}")
    schema = load_schema(folder)
    return {split: ParquetSource(folder, split) for split in schema.rows}


def build_task(config: JobConfig, ranks: Ranks, schema: Schema) -> Built:
    """Build, plan and shard the model that ``config`` describes for data of ``schema``; a collective.

    Initial weights come from (seed, "dense") on every rank and (seed, rank, "tables"), whatever global
    random state there was.

    Raises:
        ValueError: a combination of codec, sharding, optimizer and device that cannot run.
    """
    if not schema.sparse:
        raise ValueError("the data has no sparse column, so there is no embedding to train.")
    columns = [(column.name, column.cardinality) for column in schema.sparse]
    tables = build_tables(columns, config.model)
    cluster = Cluster(world=ranks.world, local_world=ranks.local_world, device=ranks.device)
    placed = None if tables is None else _place(tables, config, cluster)
    with torch.random.fork_rng(devices=[ranks.device] if ranks.device.type == "cuda" else []):
        torch.manual_seed(derived_seed(config.seed, 0, "dense"))
        hashed = build_hashed(columns, config.model, ranks.device)
        task = ClickTask(DLRM(tables, len(schema.dense), config.model, ranks.device, hashed=hashed))
        torch.manual_seed(derived_seed(config.seed, ranks.rank, "tables"))
        sharded = _shard(task, placed, ranks)
    optimizer = build_optimizer(sharded, config.optimizer.dense)
    found = [m for m in sharded.modules() if isinstance(m, CompressedShardedEmbeddingBagCollection)]
    return Built(
        task=sharded,
        optimizer=optimizer,
        learning_rate=LearningRate(optimizer, config.optimizer, config.schedule),
        size=size_of(sharded, columns, config.model),
        plan=[] if placed is None else _rows(placed, config, cluster, config.codec),
        plain_plan=[] if placed is None else _rows(placed, config, cluster, CodecConfig()),
        steering=found[0].steering if found else None,
    )


@dataclass(frozen=True)
class _Placed:
    """Tables, who shards them, and where to."""

    tables: EmbeddingBagCollection
    sharder: CompressedEmbeddingBagCollectionSharder
    plan: EmbeddingModuleShardingPlan


def _place(tables: EmbeddingBagCollection, config: JobConfig, cluster: Cluster) -> _Placed:
    batch_size = config.data.loader.batch_size
    sharder = CompressedEmbeddingBagCollectionSharder(
        fused_parameters(config.optimizer.tables, cluster.device), codec=config.codec
    )
    plan = make_plan(tables, sharder, config.sharding, cluster, batch_size)
    if cluster.world > 1:
        require_runnable(config.codec, held_columns(plan), batch_size, cluster.device)
    return _Placed(tables, sharder, plan)


def _rows(placed: _Placed, config: JobConfig, cluster: Cluster, codec: CodecConfig) -> list[PlanRow]:
    configs, batch_size = placed.tables.embedding_bag_configs(), config.data.loader.batch_size
    state_floats = config.optimizer.tables.floats_per_value(config.model.embedding_dim)
    return plan_rows(placed.plan, configs, cluster, codec, batch_size, state_floats)


def _shard(task: ClickTask, placed: _Placed | None, ranks: Ranks) -> DistributedModelParallel:
    if placed is None:
        # Nothing to shard: every parameter is data-parallel.
        return DistributedModelParallel(task, device=ranks.device, plan=ShardingPlan({}))
    return DistributedModelParallel(
        task,
        device=ranks.device,
        plan=ShardingPlan({TABLES_PATH: placed.plan}),
        sharders=[placed.sharder],
    )
