"""Batches of ranks that run out at different times, through torchrec's sharded tables on gloo."""

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist

from tightrec.trainer.data.synthetic import SyntheticConfig, SyntheticSource

pytestmark = pytest.mark.multiprocess

Counts = dict[str, float]


def source_of(rows: int) -> SyntheticSource:
    config = SyntheticConfig(
        train_rows=rows, row_group_rows=8, max_cardinality=50, multi_hot=5, multi_hot_mean=1.5, dense=0
    )
    return SyntheticSource(config, "train")


def pooled_in_steps(rank: int, world: int, cases: list[tuple[int, int]]) -> list[tuple[int, Counts]]:
    """For each (rows, batch size): its real batches, and each column's ids, counted by tables of ones."""
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
    from torchrec.distributed.types import ShardingPlan
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    from tightrec.trainer.data.loader import Loader, LoaderConfig

    columns = source_of(1).schema.sparse
    tables = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=c.name,
                embedding_dim=4,
                num_embeddings=c.cardinality,
                feature_names=[c.name],
                init_fn=torch.nn.init.ones_,
            )
            for c in columns
        ]
    )
    kinds = [row_wise(), table_wise(rank=0), table_wise(rank=1)]
    placed = {column.name: kinds[i % 3] for i, column in enumerate(columns)}
    sharder = EmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(tables, placed, sharder, world, world, "cpu")
    model = DistributedModelParallel(
        tables,
        device=torch.device("cpu"),
        plan=ShardingPlan({"": plan}),
        sharders=[sharder],
    )
    results = []
    for rows, batch_size in cases:
        loader = Loader(source_of(rows), LoaderConfig(batch_size=batch_size), rank, world)
        start = loader.start(0)
        real = loader.batches(start)
        steps = torch.tensor(real)
        dist.all_reduce(steps, op=dist.ReduceOp.MAX)
        counts = dict.fromkeys((column.name for column in columns), 0.0)
        for batch in loader.iterate(start, int(steps)):
            for name, pooled in model(batch.sparse).wait().to_dict().items():
                counts[name] += pooled[:, 0].sum().item()
        results.append((real, counts))
    return results


def test_uneven_ranks_step_together_and_padding_adds_nothing() -> None:
    cases = {(21, 4): [3, 3], (9, 4): [2, 1], (1, 3): [1, 0], (0, 3): [0, 0]}
    ranks = run_ranks(2, pooled_in_steps, list(cases))
    for case, ((rows, _), batches) in enumerate(cases.items()):
        assert [rank[case][0] for rank in ranks] == batches
        source = source_of(rows)
        read = [source.read(group) for group in range(len(source.row_counts))]
        for i, column in enumerate(source.schema.sparse):
            expected = sum(len(columns.sparse[i].ids) for columns in read)
            assert sum(rank[case][1][column.name] for rank in ranks) == expected, (rows, column.name)
