"""Deep hash embeddings as a snapshot serves them (Kang et al. 2021, used by MP-Rec, arXiv 2302.10872).

Training's are in :mod:`tightrec.models.hashed_arch`: the same hashes, decoded by one grouped product over all
features. Here every decoder layer has a number type of its own, and runs once on the distinct ids of a batch.

Legend: B rows, H features with a deep hash embedding, D embedding dim, k hashes, U distinct ids of a feature.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from tightrec.models.config import ModelConfig
from tightrec.models.dhe import Hashes
from tightrec.models.representation import Cardinalities, with_dhe

DECODERS = "dhe"
"""First part of a decoder layer's name."""

Tap = Callable[[str, Tensor | None, Tensor], object]
"""Looks on while a model runs: a part's name, what it took in, what came out."""

_ID_BITS = 32
"""A feature's number stands above the bits of its ids: the hashes take fewer than 2**31."""

_CHUNK_VALUES = 1 << 22
"""Code values that are made and decoded at once, so that memory does not grow with the batch."""


def decoder_layer(feature: str, place: int) -> str:
    """Name of layer number ``place`` of a feature's decoder; the feature's name may hold dots."""
    return f"{DECODERS}.{feature}.{place}"


def decoder_layers(feature: str, config: ModelConfig) -> list[str]:
    """Names of all layers of a feature's decoder, in order."""
    return [decoder_layer(feature, place) for place in range(len(config.representation.decoder) + 1)]


class HashedLookup(nn.Module):
    """Pooled deep hash embeddings of H features; a score never depends on the rows beside it, as far as the
    types of the layers promise that.

    ``vectors`` is what ``forward`` asks for the vectors of distinct ids: ``compute``, until it is replaced
    (by a cache, for instance) with what takes and gives the same. If what replaces it has a method
    ``together``, that is asked instead, once a batch: ids int64 [T], equal ones and overflow ids included,
    and the number of each one's feature [T], to vectors float32 [T, D].

    Args:
        columns: name and number of ids of the H features.
        config: of the model; ``representation``, ``pooling`` and ``embedding_dim`` count here.
        layers: by the names of :func:`decoder_layer`; each maps float32 [U, in] to float32 [U, out], the ReLU
            between layers included.
        device: where it computes.
        known: of each feature, ascending ids int64: id i here is the i-th of them. None: ids are what they
            were in training.

    Raises:
        ValueError: a feature with too many ids to hash.
    """

    limits: Tensor

    def __init__(
        self,
        columns: Cardinalities,
        config: ModelConfig,
        layers: Mapping[str, nn.Module],
        device: torch.device,
        known: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.names = tuple(name for name, _ in columns)
        """The H features, in order."""
        self.cardinalities = tuple(
            count if known is None else len(known[place]) for place, (_, count) in enumerate(columns)
        )
        """Ids of a feature lie below; its cardinality itself is the overflow id, whose vector is zero."""
        self.dim = config.embedding_dim
        """D."""
        shape = config.representation
        self.activation, self.pooling = shape.activation, config.pooling
        self.known = known
        self.hashes = nn.ModuleList(Hashes(name, count, shape, device) for name, count in columns)
        self.decoders = nn.ModuleList(
            nn.ModuleList(layers[layer] for layer in decoder_layers(name, config)) for name in self.names
        )
        # Where each feature's ids begin, and where its overflow id stands, among (feature, id) pairs.
        starts = torch.arange(len(self.names)) << _ID_BITS
        ends = starts + torch.tensor(self.cardinalities, dtype=torch.int64)
        limits = torch.stack([starts, ends], 1).flatten().to(device)
        self.register_buffer("limits", limits, persistent=False)
        self.vectors: Callable[[int, Tensor], Tensor] = self.compute

    def encode(self, feature: int, ids: Tensor) -> Tensor:
        """Codes float32 [U, k] of ids int64 [U] below the feature's cardinality."""
        return self.hashes[feature](ids if self.known is None else self.known[feature][ids])

    def decode(self, feature: int, codes: Tensor, tap: Tap | None = None) -> Tensor:
        """Vectors float32 [U, D] of codes float32 [U, k], the activation behind the last layer included."""
        values = codes
        for place, layer in enumerate(self.decoders[feature]):
            taken, values = values, layer(values)
            if tap:
                tap(decoder_layer(self.names[feature], place), taken, values)
        return activated(values, self.activation)

    def compute(self, feature: int, ids: Tensor) -> Tensor:
        """Vectors float32 [U, D] of distinct ids int64 [U] of feature number ``feature``."""
        step = max(1, _CHUNK_VALUES // len(self.hashes[feature].a))
        if len(ids) <= step:
            return self.decode(feature, self.encode(feature, ids))
        return torch.cat([self.decode(feature, self.encode(feature, part)) for part in ids.split(step)])

    def forward(self, ids: Tensor, offsets: Tensor, rows: int, tap: Tap | None = None) -> Tensor:
        """Pooled vectors float32 [B, H * D]; an empty bag and the overflow id give zeros.

        Args:
            ids: int64 [sum of bag sizes], each from 0 to its feature's cardinality: not checked here.
            offsets: int64 [H * B + 1]; bag h * B + b is feature h of row b.
            rows: B.
            tap: looks on at every layer; ``vectors`` is not asked then.
        """
        count = len(self.names)
        ends = offsets[::rows] if rows else offsets.expand(count + 1)
        features = torch.arange(count, device=ids.device)
        owners = torch.repeat_interleave(features, ends.diff(), output_size=len(ids))
        together = getattr(self.vectors, "together", None) if tap is None else None
        if together is not None:
            every = torch.arange(len(ids), device=ids.device)
            return self.pooled(every, together(ids, owners), offsets, rows)
        pairs, numbers = torch.unique(self.pairs(ids, owners), return_inverse=True)
        vectors = torch.zeros(len(pairs), self.dim, device=ids.device)
        # One wait for the device, whatever the number of features.
        bounds = torch.searchsorted(pairs, self.limits).tolist()
        own = pairs & ((1 << _ID_BITS) - 1)
        ask = self.vectors if tap is None else partial(self._watched, tap)
        for feature, (start, stop) in enumerate(zip(bounds[::2], bounds[1::2], strict=True)):
            if stop > start or tap:
                vectors[start:stop] = ask(feature, own[start:stop])
        return self.pooled(numbers, vectors, offsets, rows)

    def pairs(self, ids: Tensor, owners: Tensor) -> Tensor:
        """One number [T] for each id [T] and number of its feature [T]; they sort by feature, then by id."""
        return (owners << _ID_BITS) + ids

    def pooled(self, numbers: Tensor, vectors: Tensor, offsets: Tensor, rows: int) -> Tensor:
        """[B, H * D] of bags of row numbers of ``vectors``."""
        pooled = functional.embedding_bag(numbers, vectors, offsets[:-1], mode=self.pooling)
        return torch.cat(pooled.view(len(self.names), rows, self.dim).unbind(), 1)

    def _watched(self, tap: Tap, feature: int, ids: Tensor) -> Tensor:
        return self.decode(feature, self.encode(feature, ids), tap)


def activated(values: Tensor, activation: str) -> Tensor:
    """What stands behind a decoder's last layer: :func:`tightrec.models.dhe.activate` up to rounding.

    torch's own sigmoid and mish round the last elements of a tensor in another way than those before them, so
    that a vector would depend on how many others are computed beside it. Exponential, tanh and log1p do not.
    """
    if activation == "linear":
        return values
    if activation == "relu":
        return values.relu()
    if activation == "sigmoid":
        return values.neg().exp_().add_(1).reciprocal_()
    softplus = values.abs().neg_().exp_().log1p_().add_(values.clamp_min(0))
    return softplus.tanh_().mul_(values)


def hashed_lookup(
    columns: Cardinalities,
    config: ModelConfig,
    layers: Mapping[str, nn.Module],
    device: torch.device,
) -> HashedLookup | None:
    """The lookup of those of ``columns`` (all features) that have a deep hash embedding; None: none has."""
    names = with_dhe(columns, config.representation)
    chosen = [column for column in columns if column[0] in names]
    return HashedLookup(chosen, config, layers, device) if chosen else None
