"""MP-Cache (arXiv 2302.10872) in front of the deep hash embeddings of one path: two levels.

The encoder level (:mod:`.hot_cache`) holds the final vectors of hot ids: exact, no hash, no
decoder. The decoder level (:mod:`.centroids`) has a vector of a nearby centroid for every
other id: approximate, no hash, no decoder. What neither has is computed. All features share one encoder
level, and a batch is looked up in one go: H calls a batch would take longer than all gathers together.

docs/cache.md has the costs.

Legend: T ids, H features with a deep hash embedding, D values in a vector.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from tightrec.formats.columns import Columns
from tightrec.serving.caching import cache_file as files
from tightrec.serving.caching.centroids import Centroids, build_clusters, chosen_features, code_type
from tightrec.serving.caching.hot_cache import HotVectors
from tightrec.serving.paths import CacheConfig
from tightrec.snapshot.hashed import HashedLookup

LOG = logging.getLogger(__name__)

DECODER_SHARE = 0.75
"""Of the memory, what the decoder level may take at most where there is an encoder level too."""

OBSERVED = 8
"""One lookup in so many is counted and may change what the encoder level holds: an unbiased sample, and the
others are spared the work."""

ADMITTED = 8
"""Ids at most that one lookup computes only to hold them from now on: a bound on its latency."""

Frequencies = Sequence[tuple[Tensor, Tensor]]
"""Of each of the H features: distinct ids int64 [n], and how often each came, int64 [n]."""


class Caches:
    """The caches of one path, in place of its lookup's ``vectors`` until :meth:`close`.

    Lookups of several threads take turns.

    Args:
        hashed: what computes.
        config: of the caches.
        decoder: the decoder level, or None.
        hot: the encoder level, or None.
    """

    def __init__(
        self, hashed: HashedLookup, config: CacheConfig, decoder: Centroids | None, hot: HotVectors | None
    ) -> None:
        self.config = config
        self._hashed, self._decoder, self._hot = hashed, decoder, hot
        device = hashed.limits.device
        self._starts = _starts(hashed).to(device)
        self._cardinalities = torch.tensor(hashed.cardinalities, device=device)
        # What no id of can be better off in the encoder level.
        exact = torch.zeros(len(hashed.names), dtype=torch.bool)
        self._exact = exact.to(device) if decoder is None else decoder.exact
        covered = [] if decoder is None else list(decoder.features)
        self._covers_all = len(covered) == len(hashed.names)
        self._covered = torch.zeros(len(hashed.names), dtype=torch.bool, device=device)
        self._covered[covered] = True
        self._counts = {level: [0, 0] for level in ("encoder", "decoder") if self._level(level) is not None}
        self._lookups = 0
        self._lock = Lock()

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Ids that were looked up in each level: hits and misses. Of two levels, the decoder level is asked
        for what the encoder level does not have."""
        return {level: (hits, misses) for level, (hits, misses) in self._counts.items()}

    @property
    def memory_bytes(self) -> int:
        """Of both levels; at most ``config.memory_mb`` * 10^6."""
        return sum(level.memory_bytes for level in (self._decoder, self._hot) if level is not None)

    @property
    def features(self) -> dict[str, str]:
        """By feature's name: ``exact`` or ``approximate`` where it has a decoder level, else ``none``."""
        names = self._hashed.names
        kinds = zip(self._covered.tolist(), self._exact.tolist(), strict=True)
        words = ["exact" if exact else "approximate" if covered else "none" for covered, exact in kinds]
        return dict(zip(names, words, strict=True))

    def close(self) -> None:
        """Let the lookup compute all vectors again."""
        if self._hashed.vectors is self:
            self._hashed.vectors = self._hashed.compute

    def __call__(self, feature: int, ids: Tensor) -> Tensor:
        """Vectors float32 [T, D] of ids int64 [T] of one feature."""
        return self.together(ids, torch.full_like(ids, feature))

    def together(self, ids: Tensor, features: Tensor) -> Tensor:
        """Vectors float32 [T, D].

        Args:
            ids: int64 [T], each from 0 to its feature's cardinality, whose vector is zero.
            features: number of each one's feature, int64 [T].
        """
        with self._lock, torch.inference_mode():
            self._lookups += 1
            places = self._starts.index_select(0, features).add_(ids)
            observed = self._hot is not None and self._lookups % OBSERVED == 0
            if self._hot is None:
                found = torch.zeros(len(ids), self._hashed.dim, device=ids.device)
                absent = (ids < self._cardinalities.index_select(0, features)).nonzero().flatten()
            else:
                if observed:
                    self._hot.count(places)
                held = self._hot.find(places)
                found = self._hot.vectors.index_select(0, held.clamp_min(0))
                absent = (held < 0).nonzero().flatten()
                hits = len(ids) - len(absent)
                absent = self._without_overflow(absent, ids, features, found)
                self._count("encoder", hits, len(absent))
            if len(absent):
                self._find(found, absent, ids, features, places, observed)
            return found

    def _without_overflow(self, absent: Tensor, ids: Tensor, features: Tensor, found: Tensor) -> Tensor:
        """Those of ``absent`` that are no overflow ids, whose vectors become zero."""
        own = ids[absent] < self._cardinalities[features[absent]]
        found.index_fill_(0, absent[~own], 0)
        return absent[own]

    def _find(
        self, found: Tensor, absent: Tensor, ids: Tensor, features: Tensor, places: Tensor, observed: bool
    ) -> None:
        """Fill in the rows ``absent`` of ``found``."""
        if self._decoder is None:
            self._compute_rows(found, absent, places, observed)
            return
        near = absent
        if not self._covers_all:
            covered = self._covered[features[absent]]
            near, far = absent[covered], absent[~covered]
            if len(far):
                self._compute_rows(found, far, places, observed)
        self._count("decoder", len(near), len(absent) - len(near))
        if not len(near):
            return
        owners = features[near]
        found.index_copy_(0, near, self._decoder.find(ids[near], owners))
        if observed:
            assert self._hot is not None
            wanted = torch.unique(places[near[~self._exact[owners]]])
            chosen, slots = self._hot.admit(wanted, ADMITTED)
            self._hold(wanted[chosen], slots)

    def _compute_rows(self, found: Tensor, rows: Tensor, places: Tensor, observed: bool) -> None:
        distinct, numbers = torch.unique(places[rows], return_inverse=True)
        vectors = self._compute(distinct)
        found.index_copy_(0, rows, vectors.index_select(0, numbers))
        if observed:
            assert self._hot is not None
            chosen, slots = self._hot.admit(distinct)
            self._hot.put(distinct[chosen], slots, vectors[chosen])

    def _compute(self, places: Tensor) -> Tensor:
        """Exact vectors of ascending ``places``."""
        bounds = [*torch.searchsorted(places, self._starts).tolist(), len(places)]
        parts = [
            self._hashed.compute(feature, places[bounds[feature] : stop] - self._starts[feature])
            for feature, stop in enumerate(bounds[1:])
            if stop > bounds[feature]
        ]
        return torch.cat(parts) if parts else torch.zeros(0, self._hashed.dim, device=places.device)

    def _hold(self, places: Tensor, slots: Tensor) -> None:
        assert self._hot is not None
        ordered, order = places.sort()
        self._hot.put(ordered, slots[order], self._compute(ordered))

    def _warm(self, places: Tensor, times: Tensor) -> None:
        """Begin with ``places``, hottest first, each of which came so often; all ids if there is room."""
        assert self._hot is not None
        device = self._starts.device
        places = places.to(device)
        with torch.inference_mode():
            self._hot.start_counts(places, times.to(device))
            if self._hot.holds_all:
                known = torch.zeros(self._hot.ids, dtype=torch.bool, device=device)
                known[places] = known[self._starts + self._cardinalities] = True
                places = torch.cat((places, (~known).nonzero().flatten()))
            owners = torch.bucketize(places, self._starts, right=True) - 1
            wanted = places[~self._exact[owners]]
            kept, slots = self._hot.places(wanted)
            self._hold(wanted[kept], slots)

    def _count(self, level: str, hits: int, misses: int) -> None:
        counts = self._counts[level]
        counts[0] += hits
        counts[1] += misses

    def _level(self, level: str) -> HotVectors | Centroids | None:
        return self._hot if level == "encoder" else self._decoder


def attach(
    hashed: HashedLookup,
    config: CacheConfig,
    cache_file: Path | None,
    fingerprint: str,
    warm: Frequencies | None = None,
    *,
    keep: bool = True,
) -> Caches:
    """Put caches in front of ``hashed``, in place of those that were there.

    What has to be built comes from ``cache_file`` if that was built for the same snapshot and settings; if
    not, it is built and written there. A file for another snapshot never has any influence but one: where
    ``warm`` is None, its frequencies are taken over, for they are the ids', not the model's.

    Args:
        hashed: of a loaded snapshot.
        config: which levels, and how large.
        cache_file: of this snapshot and config; None: nothing is kept.
        fingerprint: of the snapshot, whatever it is that changes with it.
        warm: how often ids came in the past. They weigh the centroids, and the hottest are in the encoder
            level from the start. None: what the file has, if anything.
        keep: write what is built even where the file was for another snapshot or other settings. Who keeps
            takes turns with others who do: one builds, the others read.

    Raises:
        ValueError: a level does not fit into the memory.
    """
    hashed.vectors = hashed.compute
    if config.levels == "none":
        return Caches(hashed, config, None, None)
    with torch.inference_mode(False), torch.no_grad():
        with files.locked(cache_file if keep else None):
            tensors = _tensors(hashed, config, cache_file, fingerprint, warm, keep)
        caches = _caches(hashed, config, tensors)
    hashed.vectors = caches
    return caches


def build(hashed: HashedLookup, config: CacheConfig, warm: Frequencies | None = None) -> dict[str, Tensor]:
    """What a cache's file holds: ``codes`` and ``results`` of the decoder level with its ``features``, and
    ``hot_ids`` (counted through all features, hottest first) with ``hot_times`` where ``warm`` is given."""
    built = {}
    if warm is not None:
        built["hot_ids"], built["hot_times"] = _hottest(hashed, config, warm)
    if config.levels in ("decoder", "both"):
        share = DECODER_SHARE if config.levels == "both" else 1.0
        memory_bytes = int(share * config.memory_mb * 1e6)
        chosen = chosen_features(hashed.cardinalities, hashed.dim, config, memory_bytes)
        clusters = [
            build_clusters(hashed, feature, config, _weights(hashed.cardinalities[feature], feature, warm))
            for feature in chosen
        ]
        built["features"] = torch.tensor(chosen)
        built["codes"] = torch.cat([one.codes for one in clusters]).to(code_type(config))
        built["results"] = torch.cat([one.results for one in clusters])
    return built


def frequencies(columns: Columns, names: Sequence[str], hashed: HashedLookup) -> Frequencies:
    """How often each id came in past rows, for :func:`attach`.

    Args:
        columns: the rows, with F sparse columns.
        names: of the sparse columns, F.
        hashed: whose features are counted; their names are among ``names``.
    """
    ids = (torch.from_numpy(np.array(columns.sparse[names.index(name)].ids)) for name in hashed.names)
    return [torch.unique(own, return_counts=True) for own in ids]


def _tensors(
    hashed: HashedLookup,
    config: CacheConfig,
    cache_file: Path | None,
    fingerprint: str,
    warm: Frequencies | None,
    keep: bool,
) -> dict[str, Tensor]:
    values = {
        "fingerprint": fingerprint,
        "config": json.dumps(dataclasses.asdict(config), sort_keys=True),
        "features": json.dumps([hashed.names, hashed.cardinalities]),
        "dim": str(hashed.dim),
    }
    if cache_file is None:
        return build(hashed, config, warm)
    try:
        tensors, stored = files.read(cache_file)
        changed = [name for name in values if stored.get(name) != values[name]]
        if warm is not None and stored.get("frequencies") != _frequency_digest(warm):
            changed.append("frequencies")
        if not changed:
            return tensors
        why = f"its {' and '.join(changed)} changed"
        if warm is None and "features" not in changed:
            warm = _stored_frequencies(hashed, tensors)
    except files.Unusable as error:
        why, keep = str(error), True
    LOG.info("cache %s is built: %s", cache_file, why)
    tensors = build(hashed, config, warm)
    if not keep:
        return tensors
    frequencies = "" if warm is None else _frequency_digest(warm)
    try:
        files.write(cache_file, tensors, {**values, "frequencies": frequencies})
    except OSError as error:
        LOG.warning("cache %s could not be written, the next start builds it again: %s", cache_file, error)
    return tensors


def _caches(hashed: HashedLookup, config: CacheConfig, tensors: dict[str, Tensor]) -> Caches:
    device, decoder, hot = hashed.limits.device, None, None
    memory_bytes = int(config.memory_mb * 1e6)
    if "codes" in tensors:
        chosen = tensors["features"].tolist()
        codes, results = tensors["codes"], tensors["results"]
        decoder = Centroids(hashed.cardinalities, chosen, codes, results, config, device)
        memory_bytes -= decoder.memory_bytes
        left_out = [name for place, name in enumerate(hashed.names) if place not in chosen]
        if left_out:
            LOG.warning("memory_mb=%g: no decoder level for %s", config.memory_mb, ", ".join(left_out))
    if config.levels in ("encoder", "both"):
        hot = HotVectors(_places(hashed), hashed.dim, memory_bytes, device)
    caches = Caches(hashed, config, decoder, hot)
    if hot is not None:
        none = torch.zeros(0, dtype=torch.int64)
        caches._warm(tensors.get("hot_ids", none), tensors.get("hot_times", none))
    return caches


def _starts(hashed: HashedLookup) -> Tensor:
    """int64 [H]: where the ids of a feature begin if those of all are counted through, with one overflow id
    a feature."""
    sizes = torch.tensor([0, *hashed.cardinalities[:-1]]) + 1
    return sizes.cumsum(0) - 1


def _places(hashed: HashedLookup) -> int:
    return sum(hashed.cardinalities) + len(hashed.cardinalities)


def _weights(ids: int, feature: int, warm: Frequencies | None) -> Tensor | None:
    if warm is None:
        return None
    # Ids that did not come in the past may come yet.
    weights = torch.ones(ids)
    weights[warm[feature][0]] += warm[feature][1].float()
    return weights


def _hottest(hashed: HashedLookup, config: CacheConfig, warm: Frequencies) -> tuple[Tensor, Tensor]:
    """As many as may get into the encoder level, hottest first."""
    starts = _starts(hashed).tolist()
    ids = torch.cat([ids + start for start, (ids, _) in zip(starts, warm, strict=True)])
    times = torch.cat([times for _, times in warm])
    most = int(config.memory_mb * 1e6 / (4 * hashed.dim)) + 1
    order = times.argsort(descending=True, stable=True)[:most]
    return ids[order], times[order]


def _stored_frequencies(hashed: HashedLookup, tensors: dict[str, Tensor]) -> Frequencies | None:
    if "hot_ids" not in tensors:
        return None
    ids, times, starts = tensors["hot_ids"], tensors["hot_times"], _starts(hashed)
    owners = torch.bucketize(ids, starts, right=True) - 1
    chosen = [owners == feature for feature in range(len(hashed.names))]
    return [(ids[own] - starts[feature], times[own]) for feature, own in enumerate(chosen)]


def _frequency_digest(warm: Frequencies) -> str:
    found = hashlib.sha256()
    for tensor in (tensor for pair in warm for tensor in pair):
        found.update(f"{len(tensor)} ".encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
