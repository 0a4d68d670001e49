"""Small deep hash embeddings for the tests of caches: random decoders, ids by Zipf's law."""

import torch
from torch import Tensor

from tightrec.models.config import ModelConfig, RepresentationConfig
from tightrec.models.dhe import Decoders
from tightrec.snapshot.hashed import HashedLookup, decoder_layer
from tightrec.snapshot.layers import make_layer, store_layer

COLUMNS = (("country", 7), ("item.id", 300), ("user", 1000))
"""Name and number of ids of the features."""

DIM = 8
"""D."""


def made_hashed(seed: int = 0, kind: str = "int8", columns: tuple[tuple[str, int], ...] = COLUMNS):
    """A lookup with random decoders 32-12-8, whose layers are of type ``kind``: no row depends on others."""
    shape = RepresentationConfig(kind="dhe", hashes=32, buckets=1000, decoder=(12,))
    config = ModelConfig(embedding_dim=DIM, representation=shape, pooling="mean")
    torch.manual_seed(seed)
    decoders = Decoders(len(columns), DIM, shape)
    cpu, layers = torch.device("cpu"), {}
    for feature, (name, _) in enumerate(columns):
        for place, (weight, bias) in enumerate(zip(decoders.weights, decoders.biases, strict=True)):
            # Larger than training starts with, so that vectors differ from id to id.
            stored = store_layer(4 * weight[feature], bias[feature], kind)
            layers[decoder_layer(name, place)] = make_layer(stored, relu=place == 0, device=cpu)
    return HashedLookup(columns, config, layers, cpu)


def all_vectors(hashed: HashedLookup) -> list[Tensor]:
    """Of each feature: the vectors of all its ids, computed one by one."""
    with torch.inference_mode():
        return [
            torch.cat([hashed.compute(feature, torch.tensor([number])) for number in range(count)])
            for feature, count in enumerate(hashed.cardinalities)
        ]


def zipf_ids(count: int, size: int, seed: int) -> Tensor:
    """``size`` ids int64 below ``count``: id i comes about 1 / (i + 1) times as often as id 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / (torch.arange(count) + 1.0)
    return torch.multinomial(weights, size, replacement=True, generator=generator)


def bags(hashed: HashedLookup, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids and offsets of ``rows`` rows: 0 to 3 Zipf ids a bag, an overflow id among them now and then."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 4, (len(hashed.names) * rows,), generator=generator)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))
    counts = sizes.view(-1, rows).sum(1).tolist()
    parts = [
        torch.where(
            torch.rand(size, generator=generator) < 0.02, count, zipf_ids(count, max(size, 1), seed)[:size]
        )
        for count, size in zip(hashed.cardinalities, counts, strict=True)
    ]
    return torch.cat(parts), offsets


def frequencies(hashed: HashedLookup, size: int = 5000, seed: int = 9) -> list[tuple[Tensor, Tensor]]:
    """Counts of ``size`` Zipf ids of each feature."""
    return [torch.unique(zipf_ids(count, size, seed), return_counts=True) for count in hashed.cardinalities]
