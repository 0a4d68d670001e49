"""Decoder level of MP-Cache (arXiv 2302.10872): the decoder's result of the nearest centroid.

Which centroid is nearest to an id is a fixed function of the id, so it is computed once, for all ids of a
feature, and a lookup is two gathers: of the id's code, and of the centroid's vector. Features that are too
large for that stay without this level (:func:`chosen_features`): searching the nearest centroid of an encoder
output costs as much as the decoders that are published (docs/cache.md).

What is clustered, by faiss's k-means, is either the encoder's outputs, as in MP-Rec, or the decoder's
results. Hash codes of different ids are as good as independent, so that the second is far more accurate.
The vectors are cut into ``pieces`` that are clustered each on its own, product quantisation (Jegou et al.
2011): far nearer for a byte an id and piece.

Legend: U ids of a feature, k hashes, D values in a vector, P pieces, C centroids, H features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tightrec.serving.paths import CacheConfig
from tightrec.snapshot.hashed import HashedLookup

CHUNK = 2048
"""Ids that are encoded at a time."""

MOST_POINTS = 64
"""A centroid, that k-means looks at."""

ITERATIONS = 20
"""Of k-means."""


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """The decoder level of one feature."""

    codes: Tensor
    """Centroid of every id and piece: int64 [U, P]."""

    results: Tensor
    """float32 [C, P, D / P], C at most U."""


def feature_bytes(ids: int, dim: int, config: CacheConfig) -> int:
    """Memory that the decoder level of a feature with ``ids`` ids takes."""
    return ids * pieces_of(config, dim) * code_type(config).itemsize + min(config.centroids, ids) * 4 * dim


def chosen_features(
    cardinalities: Sequence[int], dim: int, config: CacheConfig, memory_bytes: int
) -> list[int]:
    """Features that get a decoder level, in order: the smallest first, as long as memory lasts.

    All features are asked for as often, so the smallest spare the most time for their memory.

    Raises:
        ValueError: not one fits; names the least memory.
    """
    chosen: list[int] = []
    used = 0
    for size, feature in sorted((feature_bytes(n, dim, config), f) for f, n in enumerate(cardinalities)):
        if used + size > memory_bytes:
            if not chosen:
                raise ValueError(
                    f"the decoder level of a cache needs at least {size / 1e6:g} MB here, and has "
                    f"{memory_bytes / 1e6:g}: raise memory_mb, or lower centroids."
                )
            break
        chosen.append(feature)
        used += size
    return sorted(chosen)


def pieces_of(config: CacheConfig, dim: int) -> int:
    """P: what divides D, at most ``config.pieces``; 1 where codes are clustered."""
    return 1 if config.space == "encoder" else math.gcd(dim, config.pieces)


def code_type(config: CacheConfig) -> torch.dtype:
    """Of stored codes; int16 holds 0 to 65,535, since torch cannot gather uint16."""
    if config.centroids <= 2**8:
        return torch.uint8
    return torch.int16 if config.centroids <= 2**16 else torch.int32


def build_clusters(
    hashed: HashedLookup,
    feature: int,
    config: CacheConfig,
    weights: Tensor | None = None,
    *,
    results: Literal["mean", "centroid"] = "mean",
    seed: int = 0,
) -> Clusters:
    """Cluster the ids of a feature, all alike on every call; a feature of at most C ids is exact.

    Args:
        weights: how much each id counts, [U] above 0; None: all the same.
        results: of a centroid: the weighted ``mean`` of its ids' vectors, the best choice in the least
            squares, or, with ``space="encoder"``, the decoder's result of the ``centroid`` itself as in
            MP-Rec.
        seed: of k-means and of the ids that it looks at.
    """
    count, dim, pieces = hashed.cardinalities[feature], hashed.dim, pieces_of(config, hashed.dim)
    device = hashed.limits.device
    vectors = torch.cat([hashed.compute(feature, ids.to(device)).cpu() for ids in _chunks(count)])
    if count <= config.centroids:
        codes = torch.arange(count)[:, None].expand(-1, pieces)
        return Clusters(codes=codes, results=vectors.view(count, pieces, dim // pieces))
    weights = torch.ones(count) if weights is None else weights.float().cpu()
    sample = _sample(weights, MOST_POINTS * config.centroids, seed)
    if config.space == "encoder":
        centres = _k_means(_codes(hashed, feature, sample), weights[sample], config.centroids, seed)
        nearest = torch.cat([_nearest(_codes(hashed, feature, ids), centres) for ids in _chunks(count)])
        if results == "centroid":
            of_centres = hashed.decode(feature, centres.to(device)).cpu()
            return Clusters(codes=nearest[:, None], results=of_centres[:, None])
        return _averaged(vectors[:, None], nearest[:, None], weights, config.centroids)
    cut = vectors.view(count, pieces, dim // pieces)
    nearest = torch.stack(
        [
            _nearest(
                piece, _k_means(piece[sample].contiguous(), weights[sample], config.centroids, seed + place)
            )
            for place, piece in enumerate(cut.transpose(0, 1).contiguous())
        ],
        1,
    )
    return _averaged(cut, nearest, weights, config.centroids)


class Centroids:
    """The decoder level of all features that have one, on one device.

    Args:
        cardinalities: ids of each of the H features.
        features: those that have this level, ascending.
        codes: of their ids, one feature after the other: [N, P] in the type of :func:`code_type`.
        results: their vectors, one feature after the other: float32 [R, P, D / P].
        config: of the level.
        device: where it is looked up.
    """

    def __init__(
        self,
        cardinalities: Sequence[int],
        features: Sequence[int],
        codes: Tensor,
        results: Tensor,
        config: CacheConfig,
        device: torch.device,
    ) -> None:
        self.features = tuple(features)
        self._codes, self._results = codes.to(device), results.to(device).flatten(0, 1)
        self._pieces, self._steps = results.shape[1], torch.arange(results.shape[1], device=device)
        starts, rows = [0] * len(cardinalities), [-1] * len(cardinalities)
        start, row = 0, 0
        for feature in self.features:
            starts[feature], rows[feature] = start, row
            start += cardinalities[feature]
            row += min(cardinalities[feature], config.centroids)
        assert (start, row) == (len(codes), len(results)), "codes and results are not those of the features"
        self._starts = torch.tensor(starts, device=device)
        self._rows = torch.tensor(rows, device=device)
        covered = self._rows >= 0
        self.exact = covered & (torch.tensor(cardinalities, device=device) <= config.centroids)
        """Of each feature, whether its vectors are no approximations: bool [H]."""

    @property
    def memory_bytes(self) -> int:
        """Of codes and results."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self._codes, self._results))

    def find(self, ids: Tensor, features: Tensor) -> Tensor:
        """Vectors float32 [T, D].

        Args:
            ids: int64 [T], each below the cardinality of its feature.
            features: of each, int64 [T]; all have this level.
        """
        places = self._starts.index_select(0, features).add_(ids)
        codes = self._codes.index_select(0, places).int()
        if self._codes.dtype == torch.int16:
            codes = codes & 0xFFFF
        rows = codes + self._rows.index_select(0, features)[:, None]
        if self._pieces > 1:
            rows = rows * self._pieces + self._steps
        return self._results.index_select(0, rows.flatten()).view(len(ids), -1)


def _codes(hashed: HashedLookup, feature: int, ids: Tensor) -> Tensor:
    device = hashed.limits.device
    return torch.cat([hashed.encode(feature, part.to(device)).cpu() for part in ids.split(CHUNK)])


def _chunks(count: int) -> list[Tensor]:
    return list(torch.arange(count).split(CHUNK))


def _sample(weights: Tensor, most: int, seed: int) -> Tensor:
    """The ids that k-means looks at: the heaviest half, and as many of the others, drawn."""
    if len(weights) <= most:
        return torch.arange(len(weights))
    order = weights.argsort(descending=True, stable=True)
    drawn = torch.randperm(len(order) - most // 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat((order[: most // 2], order[most // 2 :][drawn[: most - most // 2]]))


def _k_means(points: Tensor, weights: Tensor, centroids: int, seed: int) -> Tensor:
    # Imported here: a worker that reads a cache from its file has no need of it.
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        means = faiss.Kmeans(
            points.shape[1],
            centroids,
            niter=ITERATIONS,
            seed=seed,
            min_points_per_centroid=1,
            max_points_per_centroid=MOST_POINTS,
        )
        means.train(points.numpy(), weights=weights.numpy())
    finally:
        faiss.omp_set_num_threads(threads)
    return torch.from_numpy(np.array(means.centroids))


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """int64 [U]: the centre [C, n] that is nearest to each point [U, n]."""
    half = centres.square().sum(1) / 2
    return torch.cat([(half - part @ centres.t()).argmin(1) for part in points.split(CHUNK)])


def _averaged(cut: Tensor, nearest: Tensor, weights: Tensor, centroids: int) -> Clusters:
    """Weighted means of the pieces [U, P, D / P] by their centroid [U, P]."""
    _, pieces, width = cut.shape
    keys = nearest * pieces + torch.arange(pieces)
    sums = torch.zeros(centroids * pieces, width, dtype=torch.float64)
    mass = torch.zeros(centroids * pieces, dtype=torch.float64)
    for place in range(pieces):
        sums.index_add_(0, keys[:, place], cut[:, place].double() * weights[:, None])
        mass.index_add_(0, keys[:, place], weights.double())
    # A centroid without ids is never looked up.
    means = sums / mass.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    return Clusters(codes=nearest, results=means.float().view(centroids, pieces, width))
