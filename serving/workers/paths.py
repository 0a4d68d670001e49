"""The loaded paths of one worker process."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tightrec.serving.paths import CacheConfig
from tightrec.snapshot import Snapshot, load
from tightrec.snapshot.inputs import Batch
from tightrec.snapshot.manifest import MANIFEST


@dataclass(kw_only=True)
class _Loaded:
    name: str
    snapshot: Snapshot
    vectors: Callable[[int, Tensor], Tensor] | None
    caches: Any
    counted: dict[str, tuple[int, int]] = field(default_factory=dict)

    def new_counts(self) -> dict[str, tuple[int, int]]:
        """What the caches counted since the last call, ``{level: (hits, misses)}``."""
        if self.caches is None:
            return {}
        before, self.counted = self.counted, self.caches.counts
        pairs = {level: (before.get(level, (0, 0)), now) for level, now in self.counted.items()}
        return {level: (now[0] - old[0], now[1] - old[1]) for level, (old, now) in pairs.items()}


def fingerprint_of(folder: Path | str) -> str | None:
    """Of a snapshot, as :attr:`tightrec.serving.paths.ServingPath.fingerprint`; None: it has no manifest that
    can be read."""
    try:
        return hashlib.sha256((Path(folder) / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


class Paths:
    """Snapshots and caches of paths on one device; a snapshot that several paths share is loaded once.

    Args:
        paths: ``name``, ``snapshot`` (folder), ``cache`` (fields of
            :class:`tightrec.serving.paths.CacheConfig`) and ``cache_file`` (or None) of each.
        device: ``cpu`` or ``cuda:N``.
        keep_caches: write what is built for a cache, even where the file was for another snapshot.

    Raises:
        ValueError: a snapshot is damaged or absent, the device is not there; says which.
    """

    def __init__(self, paths: Sequence[Mapping[str, Any]], device: str, keep_caches: bool = True) -> None:
        self._device = torch.device(device)
        snapshots: dict[str, tuple[Snapshot, str]] = {}
        self._paths: list[_Loaded] = []
        for path in paths:
            folder = path["snapshot"]
            if folder not in snapshots:
                snapshots[folder] = _load(folder, device)
            self._paths.append(_with_cache(path, *snapshots[folder], keep_caches))
        first = self._paths[0].snapshot
        self.dense = len(first.dense_names)
        self.sparse = len(first.features)

    def steps(self) -> dict[str, int]:
        """Training step of every path's snapshot."""
        return {path.name: path.snapshot.manifest.step for path in self._paths}

    def use_threads(self, threads: int) -> None:
        """Score with so many intra-op threads; to be called in the thread that scores."""
        if self._device.type == "cpu":
            torch.set_num_threads(threads)

    def try_out(self) -> None:
        """Score one row of zeros on every path: kernels are chosen and memory is taken now."""
        ids = torch.zeros(self.sparse, dtype=torch.int64)
        row = Batch(
            dense=torch.zeros(1, self.dense), ids=ids, offsets=torch.arange(len(ids) + 1), of_torch=False
        )
        for place in range(len(self._paths)):
            self.score(place, row)

    def score(self, place: int, batch: Batch) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Probabilities float32 [B] on path number ``place``, NaN where a score is not finite; and what the
        path's caches counted, ``{level: [hits, misses]}``."""
        path = self._paths[place]
        hashed = path.snapshot.scorer.hashed
        if hashed is not None and path.vectors is not None:
            # Paths may share a snapshot and differ in their caches.
            hashed.vectors = path.vectors
        inputs = (batch.dense, batch.ids, batch.offsets)
        if self._device.type != "cpu":
            inputs = tuple(tensor.to(self._device) for tensor in inputs)
        logits = path.snapshot.logits(*inputs).cpu()
        found = logits.sigmoid().numpy()
        finite = np.isfinite(logits.numpy())
        if not finite.all():
            # An infinite logit would have a probability of 1.
            found = np.where(finite, found, np.float32(np.nan))
        return found, path.new_counts()


def _load(folder: str, device: str) -> tuple[Snapshot, str]:
    """A snapshot and its fingerprint, although it may be replaced in its place meanwhile."""
    while True:
        before = fingerprint_of(folder)
        snapshot = load(folder, device)
        if before is not None and fingerprint_of(folder) == before:
            return snapshot, before


def _with_cache(path: Mapping[str, Any], snapshot: Snapshot, fingerprint: str, keep: bool) -> _Loaded:
    hashed = snapshot.scorer.hashed
    if hashed is None:
        return _Loaded(name=path["name"], snapshot=snapshot, vectors=None, caches=None)
    hashed.vectors = hashed.compute
    config, caches = CacheConfig(**path["cache"]), None
    if config.levels != "none":
        from tightrec.serving.caching import cache

        file = Path(path["cache_file"]) if path["cache_file"] else None
        # The fingerprint is of what was loaded, which may be newer than what the path was measured with.
        caches = cache.attach(hashed, config, file, fingerprint, keep=keep)
    return _Loaded(name=path["name"], snapshot=snapshot, vectors=hashed.vectors, caches=caches)
