"""The only file that reaches below torchrec's public surface, and the versions that was checked on.

What is touched:

- the module attribute ``dist`` of ``torchrec.distributed.comm_ops`` (exchange of pooled embeddings) and of
  ``torchrec.distributed.dist_data`` (exchange of ids), through which torchrec calls every collective;
- attributes of a ``ShardedEmbeddingBagCollection`` and of its shardings: which slots each rank holds, the
  order of the output, process groups;
- its step: the lookups are called with features padded to one number of bags, and torchrec's output
  distribution and its divisor of mean pooling are not used.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from torch import distributed as dist
from torchrec.distributed import comm_ops, dist_data
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.sharding.cw_sharding import CwPooledEmbeddingSharding
from torchrec.distributed.sharding.dp_sharding import DpPooledEmbeddingSharding
from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingSharding
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingSharding
from torchrec.distributed.types import ShardingEnv2D
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from tightrec.sharding.parts import Part, Peers, Slot

CHECKED_VERSIONS = ("1.6.1", "1.7.0", "1.8.0", "1.9.0", "1.9.1", "1.9.2")
"""torchrec releases whose source has the names used here; the tests run on the pinned one."""


def require_checked_torchrec() -> None:
    """Refuse torchrec releases that this file was not checked on.

    Raises:
        ValueError: naming the release found and those checked.
    """
    found = version("torchrec")
    if found not in CHECKED_VERSIONS:
        raise ValueError(
            f"torchrec {found} is not one that sharding/compat.py was checked on "
            f"({', '.join(CHECKED_VERSIONS)}). Install the pinned one with `make setup`."
        )


@contextmanager
def replaced_collectives(embeddings: Any, inputs: Any) -> Iterator[None]:
    """Let torchrec call ``embeddings`` and ``inputs`` where it would call ``torch.distributed``.

    Both must offer torch.distributed's functions. The originals return on exit.
    """
    require_checked_torchrec()
    before = comm_ops.dist, dist_data.dist
    comm_ops.dist, dist_data.dist = embeddings, inputs
    try:
        yield
    finally:
        comm_ops.dist, dist_data.dist = before


def parts_of(module: ShardedEmbeddingBagCollection) -> list[Part]:
    """What each sharding of a module holds where, in the order of its lookups.

    Raises:
        ValueError: a sharding whose exchange is not ours to replace, by name.
    """
    require_checked_torchrec()
    return [
        _part(sharding, name)
        for sharding, name in zip(module._embedding_shardings, module._sharding_types, strict=True)
    ]


def _part(sharding: Any, name: str) -> Part:
    if isinstance(sharding, DpPooledEmbeddingSharding):
        held = _slots(sharding._grouped_embedding_configs, summed=False)
        return Part(sharding_type=name, kind="local", sources=(held,), source=0, peers=())
    if isinstance(sharding, RwPooledEmbeddingSharding):
        held = _slots(sharding._grouped_embedding_configs, summed=True)
        peers = (_peers(sharding._pg),)
        return Part(sharding_type=name, kind="sum", sources=(held,), source=0, peers=peers)
    if isinstance(sharding, TwRwPooledEmbeddingSharding | GridPooledEmbeddingSharding):
        inner, outer = _peers(sharding._intra_pg), _peers(sharding._cross_pg)
        nodes = tuple(_slots(c, summed=True) for c in sharding._grouped_embedding_configs_per_node)
        return Part(
            sharding_type=name, kind="two_level", sources=nodes, source=outer.rank, peers=(inner, outer)
        )
    if isinstance(sharding, TwPooledEmbeddingSharding | CwPooledEmbeddingSharding):
        peers = (_peers(sharding._pg),)
        ranks = tuple(_slots(c, summed=False) for c in sharding._grouped_embedding_configs_per_rank)
        return Part(sharding_type=name, kind="spread", sources=ranks, source=peers[0].rank, peers=peers)
    raise ValueError(
        f"sharding type {name} ({type(sharding).__name__}) is not one whose exchange is replaced: "
        "table_wise, column_wise, row_wise, table_row_wise, table_column_wise, grid_shard and data_parallel "
        "are."
    )


def _slots(configs: Iterable[GroupedEmbeddingConfig], summed: bool) -> tuple[Slot, ...]:
    return tuple(
        Slot(
            name=name,
            feature=feature,
            table=table.name,
            dim=table.local_cols,
            column=_first_column(table),
            mean=summed and table.pooling == PoolingType.MEAN,
        )
        for config in configs
        for table in config.embedding_tables
        for name, feature in zip(table.embedding_names, table.feature_names, strict=True)
    )


def _first_column(table: ShardedEmbeddingTable) -> int:
    return int(table.local_metadata.shard_offsets[1]) if table.local_metadata is not None else 0


def _peers(group: Any) -> Peers:
    ranks = tuple(dist.get_process_group_ranks(group))
    return Peers(group=group, rank=dist.get_rank(group), size=dist.get_world_size(group), ranks=ranks)


def output_columns(module: ShardedEmbeddingBagCollection) -> tuple[list[str], list[int]]:
    """Names and dims of the pooled output, in order."""
    return list(module._embedding_names), list(module._embedding_dims)


def leave_mean_to_us(module: ShardedEmbeddingBagCollection) -> None:
    """Keep torchrec from dividing sums of MEAN pooling: its divisor is wrong where types of sharding mix."""
    module._has_mean_pooling_callback = False


def module_tables(module: ShardedEmbeddingBagCollection) -> list[Any]:
    """The configurations of a module's tables."""
    return list(module._embedding_bag_configs)


def module_world(module: ShardedEmbeddingBagCollection) -> tuple[Any, int]:
    """Process group and number of ranks that a module is sharded over."""
    return module._env.process_group, module._env.world_size


def module_lookups(module: ShardedEmbeddingBagCollection) -> list[Any]:
    """The lookups of a module's parts, in the order of ``parts_of``."""
    return module._lookups


def unsupported(module: Any, env: Any) -> str | None:
    """Why the exchange of a module cannot be replaced, from what it is sharded with; None if it can."""
    if isinstance(env, ShardingEnv2D):
        return "2D-parallel sharding environments (DMPCollection) are not supported"
    if type(module) is not EmbeddingBagCollection:
        return f"{type(module).__name__} is not torchrec's EmbeddingBagCollection"
    return None
