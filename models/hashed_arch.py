"""Deep hash embeddings of a batch of bags: each distinct id is hashed and decoded once.

Legend: B rows, H features with a deep hash embedding, D embedding dim, N ids in all their bags, U distinct
(feature, id) pairs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.models.config import ModelConfig
from tightrec.models.dhe import Decoders, Hashes
from tightrec.models.representation import Cardinalities, with_dhe

_ID_BITS = 32
"""A feature's number stands above the bits of its ids, of which there are fewer than 2**31."""


class HashedArch(nn.Module):
    """The vectors of features with a deep hash embedding (Kang et al. 2021), multi-hot bags pooled.

    Its parameters are the decoders', which every rank holds and DistributedDataParallel keeps equal: nothing
    of it is exchanged. Its hashes follow from the configuration and are in no state dict.

    Args:
        columns: name and number of ids of the H features.
        config: of the model; ``representation``, ``pooling`` and ``embedding_dim`` count here.
        device: where the decoders are made.

    Raises:
        ValueError: a feature with too many ids to hash.
    """

    def __init__(
        self, columns: Cardinalities, config: ModelConfig, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.names = tuple(name for name, _ in columns)
        self.pooling = config.pooling
        self.hashes = nn.ModuleList(
            Hashes(name, cardinality, config.representation, device) for name, cardinality in columns
        )
        self.decoders = Decoders(len(self.names), config.embedding_dim, config.representation, device)

    def forward(self, sparse: KeyedJaggedTensor) -> list[Tensor]:
        """The pooled vector [B, D] of each row, a feature at a time in the order of ``names``.

        An empty bag is the zero vector. Rows that share a bag share its vector, and their gradients add up
        before the decoder sees them.

        Args:
            sparse: bags of ids from 0 to below the cardinality, keys of other features allowed: B bags a
                feature, or distinct bags with inverse indices int64 [F, B].
        """
        keys = sparse.keys()
        places = [keys.index(name) for name in self.names]
        bounds, strides = sparse.offset_per_key(), sparse.stride_per_key()
        counts = [bounds[place + 1] - bounds[place] for place in places]
        ids = torch.cat([sparse.values()[bounds[place] : bounds[place + 1]] for place in places]).long()
        parts = sparse.lengths().view(-1).split(strides)
        lengths = torch.cat([parts[place] for place in places]).long()
        vectors, numbers = self._distinct(ids, counts)
        pooled = functional.embedding_bag(
            numbers, vectors, offsets=lengths.cumsum(0) - lengths, mode=self.pooling
        )
        inverse = sparse.inverse_indices_or_none()
        if inverse is not None:
            pooled = pooled.index_select(0, self._rows(inverse, [strides[place] for place in places]))
        return list(pooled.view(len(places), -1, pooled.shape[1]).unbind(0))

    def _distinct(self, ids: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Vectors [U, D] of the distinct ones of ``ids`` [N], and the number of each id among them [N]."""
        features = torch.arange(len(counts), device=ids.device)
        owners = torch.repeat_interleave(
            features, torch.tensor(counts, device=ids.device), output_size=sum(counts)
        )
        pairs, numbers = torch.unique((owners << _ID_BITS) + ids, return_inverse=True)
        shares = torch.bincount(pairs >> _ID_BITS, minlength=len(counts)).tolist()
        distinct = (pairs & ((1 << _ID_BITS) - 1)).split(shares)
        codes = torch.cat([hashes(own) for hashes, own in zip(self.hashes, distinct, strict=True)])
        return self.decoders(codes, shares), numbers

    def _rows(self, inverse: tuple[list[str], Tensor], strides: Sequence[int]) -> Tensor:
        """int64 [H * B]: for each feature and row the place of its bag among all H features' bags."""
        keys, numbers = inverse
        starts = [sum(strides[:feature]) for feature in range(len(strides))]
        wanted = [numbers[keys.index(name)] + start for name, start in zip(self.names, starts, strict=True)]
        return torch.cat(wanted)


def build_hashed(
    columns: Cardinalities, config: ModelConfig, device: torch.device | None = None
) -> HashedArch | None:
    """The deep hash embeddings of those of ``columns`` (name, cardinality) that have one; None: none has.

    Raises:
        ValueError: ``config.representation`` names a feature that is not among them, or one has too many ids.
    """
    names = with_dhe(columns, config.representation)
    chosen = [column for column in columns if column[0] in names]
    return HashedArch(chosen, config, device) if chosen else None
