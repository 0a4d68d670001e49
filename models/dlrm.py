"""DLRM and DLRM-DCNv2 built from torchrec's modules, for any number of dense features, none included.

Legend: B rows, F sparse features, D embedding dim, N = F + 1 vectors a row (the first from the dense part).
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
from tightrec.models.interaction import DotInteraction, side_by_side


class CrossInteraction(nn.Module):
    """A low-rank cross network over a row's N vectors side by side (Wang et al. 2021, DCN v2)."""

    def __init__(self, vectors: int, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        width = vectors * config.embedding_dim
        self.crossnet = LowRankCrossNet(width, config.cross_layers, config.cross_rank).to(device)

    def forward(self, dense: Tensor, sparse: Sequence[Tensor]) -> Tensor:
        """Map [B, D] and F times [B, D] to [B, N * D], N = F + 1."""
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
    """Embedding tables, bottom MLP, interaction (dot or cross network) and top MLP; returns logits.

    Module and parameter names are those of ``torchrec.models.dlrm.DLRM``, so that state dicts of the
    ``dlrm`` architecture interchange with it. Everything behind the tables is a module of its own,
    because torchrec's pipeline traces this forward symbolically and stops at modules without tables.

    Args:
        tables: an EmbeddingBagCollection whose tables all have dim ``config.embedding_dim``; sharding
            replaces it in place.
        dense_features: number of dense columns, possibly 0.
        device: where the MLPs are made.
    """

    def __init__(
        self,
        tables: EmbeddingBagCollection,
        dense_features: int,
        config: ModelConfig,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        names = [name for table in tables.embedding_bag_configs() for name in table.feature_names]
        # Known here rather than asked of a tensor, which is a proxy while torchrec traces the forward.
        self.device_type = device.type if device else "cpu"
        self.autocast_bf16 = config.dense_precision == "bf16"
        self.sparse_arch = _SparseArch(tables, names)
        self.dense_arch: nn.Module
        if dense_features:
            layers = [*config.bottom_layers, config.embedding_dim]
            self.dense_arch = DenseArch(dense_features, layer_sizes=layers, device=device)
        else:
            self.dense_arch = LearnedConstant(config.embedding_dim, device)
        vectors = 1 + len(names)
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
        return self.from_pooled(dense, self.sparse_arch.embedding_bag_collection(sparse))

    def from_pooled(self, dense: Tensor, pooled: KeyedTensor) -> Tensor:
        """The logits [B] that follow from pooled embeddings, which may still be on their way."""
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.autocast_bf16):
            vector = self.dense_arch(dense)
        # Only now are the embeddings waited for: the bottom MLP overlaps with their exchange, its backward
        # with that of their gradients.
        embedded = self.sparse_arch.pooled(pooled)
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.autocast_bf16):
            logits = self.over_arch(self.inter_arch(vector, embedded))
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
    columns: Sequence[tuple[str, int]], config: ModelConfig, device: torch.device | None = None
) -> EmbeddingBagCollection:
    """One table a sparse column: ``columns`` holds (name, cardinality); table ``t_NAME``, feature NAME."""
    pooling = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}[config.pooling]
    return EmbeddingBagCollection(
        device=device or torch.device("meta"),
        tables=[
            EmbeddingBagConfig(
                name=table_name(name),
                feature_names=[name],
                num_embeddings=cardinality,
                embedding_dim=config.embedding_dim,
                pooling=pooling,
            )
            for name, cardinality in columns
        ],
    )
