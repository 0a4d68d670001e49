"""DLRM and DLRM-DCNv2 built from torchrec's modules, for any number of dense features, none included.

Legend: B rows, D embedding dim, V vectors of the sparse features, N = V + 1 vectors a row: the one from the
dense part, those from tables, those from deep hash embeddings (DHE). A hybrid feature gives two of the V.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DenseArch, OverArch
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from tightrec.models.config import ModelConfig, table_name
from tightrec.models.hashed_arch import HashedArch
from tightrec.models.interaction import DotInteraction, side_by_side
from tightrec.models.representation import Cardinalities, with_table


class CrossInteraction(nn.Module):
    """A low-rank cross network over a row's N vectors side by side (Wang et al. 2021, DCN v2)."""

    def __init__(self, vectors: int, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        width = vectors * config.embedding_dim
        self.crossnet = LowRankCrossNet(width, config.cross_layers, config.cross_rank).to(device)

    def forward(self, dense: Tensor, sparse: Sequence[Tensor]) -> Tensor:
        """Map [B, D] and V times [B, D] to [B, N * D], N = V + 1."""
        return self.crossnet(side_by_side(dense, sparse))


class LearnedConstant(nn.Module):
    """Stands in for the bottom MLP where the data has no dense columns: one learned vector for every row.

    Its dot product with an embedding is that id's first-order effect, which a dot interaction of
    embeddings alone cannot express.
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        super().__init__()
        # Of a length near 1, as embeddings are scaled by the products with it.
        self.vector = nn.Parameter(torch.randn(width, device=device) * width**-0.5)

    def forward(self, dense: Tensor) -> Tensor:
        """[B, D] for dense features [B, 0]."""
        return self.vector.expand(len(dense), -1)


class DLRM(nn.Module):
    """Embeddings, bottom MLP, interaction (dot or cross network) and top MLP; returns logits.

    With tables alone, module and parameter names are those of ``torchrec.models.dlrm.DLRM``, so that state
    dicts of the ``dlrm`` architecture interchange with it. Everything behind the tables is a module of its
    own, because torchrec's pipeline traces this forward symbolically and stops at modules without tables.

    Args:
        tables: an EmbeddingBagCollection whose tables all have dim ``config.embedding_dim``; sharding
            replaces it in place. None: no feature has a table.
        dense_features: number of dense columns, possibly 0.
        device: where the MLPs are made.
        hashed: the deep hash embeddings; None: no feature has one.
    """

    def __init__(
        self,
        tables: EmbeddingBagCollection | None,
        dense_features: int,
        config: ModelConfig,
        device: torch.device | None = None,
        *,
        hashed: HashedArch | None = None,
    ) -> None:
        super().__init__()
        configs = [] if tables is None else tables.embedding_bag_configs()
        names = [name for table in configs for name in table.feature_names]
        # Known here rather than asked of a tensor, which is a proxy while torchrec traces the forward.
        self.device_type = device.type if device else "cpu"
        self.autocast_bf16 = config.dense_precision == "bf16"
        self.sparse_arch = None if tables is None else _SparseArch(tables, names)
        self.hashed_arch = hashed
        self.dense_arch: nn.Module
        if dense_features:
            layers = [*config.bottom_layers, config.embedding_dim]
            self.dense_arch = DenseArch(dense_features, layer_sizes=layers, device=device)
        else:
            self.dense_arch = LearnedConstant(config.embedding_dim, device)
        vectors = 1 + len(names) + (len(hashed.names) if hashed is not None else 0)
        self.inter_arch: nn.Module
        if config.architecture == "dlrm":
            self.inter_arch = DotInteraction(vectors, device)
            width = config.embedding_dim + vectors * (vectors - 1) // 2
        else:
            self.inter_arch = CrossInteraction(vectors, config, device)
            width = vectors * config.embedding_dim
        self.over_arch = OverArch(width, layer_sizes=[*config.top_layers, 1], device=device)

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Logits [B] of rows with dense features [B, dense_features] and bags ``sparse`` (stride B)."""
        pooled = None if self.sparse_arch is None else self.sparse_arch.embedding_bag_collection(sparse)
        return self.from_pooled(dense, pooled, self.hashed(sparse))

    def hashed(self, sparse: KeyedJaggedTensor) -> list[Tensor]:
        """The deep hash embeddings [B, D] of bags; none where no feature has one."""
        return [] if self.hashed_arch is None else self.hashed_arch(sparse)

    def from_pooled(self, dense: Tensor, pooled: KeyedTensor | None, hashed: list[Tensor]) -> Tensor:
        """The logits [B] that follow from a batch's vectors.

        Args:
            dense: [B, dense_features]
            pooled: rows of the tables, which may still be on their way; None: no feature has a table.
            hashed: what :meth:`hashed` gave.
        """
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.autocast_bf16):
            vector = self.dense_arch(dense)
        # Only now are the tables' rows waited for: bottom MLP and deep hash embeddings overlap with their
        # exchange, the backward of both with that of their gradients.
        embedded = [] if self.sparse_arch is None else self.sparse_arch.pooled(pooled)
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.autocast_bf16):
            logits = self.over_arch(self.inter_arch(vector, embedded + hashed))
        return logits.float().squeeze(-1)


class _SparseArch(nn.Module):
    """Holds the tables, under the name that torchrec's DLRM gives them; :class:`DLRM` calls them."""

    def __init__(self, tables: EmbeddingBagCollection, names: list[str]) -> None:
        super().__init__()
        self.embedding_bag_collection = tables
        self.pooled = _PooledColumns(names)


class _PooledColumns(nn.Module):
    """Pooled embeddings [B, D] a feature, as views, in the order of ``names``.

    Sharding leaves the features in another order; taking views puts off the copy that restores it to the
    one that the interaction makes anyway.
    """

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, pooled: KeyedTensor) -> list[Tensor]:
        columns = pooled.to_dict()
        return [columns[name] for name in self.names]


def build_tables(
    columns: Cardinalities, config: ModelConfig, device: torch.device | None = None
) -> EmbeddingBagCollection | None:
    """One table a sparse column that has one: table ``t_NAME``, feature NAME; None: no column has a table.

    Args:
        columns: name and cardinality of every sparse column.
        device: where the tables are made; None: on meta, without memory.

    Raises:
        ValueError: ``config.representation`` names a feature that is not there.
    """
    pooling = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}[config.pooling]
    names = with_table(columns, config.representation)
    tables = [
        EmbeddingBagConfig(
            name=table_name(name),
            feature_names=[name],
            num_embeddings=cardinality,
            embedding_dim=config.embedding_dim,
            pooling=pooling,
        )
        for name, cardinality in columns
        if name in names
    ]
    return EmbeddingBagCollection(device=device or torch.device("meta"), tables=tables) if tables else None
