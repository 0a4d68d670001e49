"""What an exploration starts from: the snapshots, the paths to measure, and held-out rows to measure on."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tightrec.formats import checkpoint_files
from tightrec.formats.columns import Columns
from tightrec.formats.run_folder import CHECKPOINTS, RUN_FILE
from tightrec.formats.schema import SCHEMA_FILE, Schema, SparseColumn, load_schema
from tightrec.serving.explore.config import CPU, ExploreConfig
from tightrec.serving.paths import CacheConfig
from tightrec.serving.snapshot_words import hashed_features, precision_of, representation_of
from tightrec.snapshot.manifest import MANIFEST, SnapshotManifest, read_manifest
from tightrec.snapshot.rows import read_rows
from tightrec.snapshot.store import check

_APART = "Paths of one file serve one model's inputs: explore them apart."


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A snapshot whose files are whole."""

    named: Path
    """As the user named it, absolute; a link stays a link."""

    folder: Path
    """Free of links."""

    fingerprint: str
    """SHA-256 of its manifest.json."""

    manifest: SnapshotManifest
    """What it says of itself."""

    representation: str
    """``table``, ``dhe``, ``hybrid``, ``select`` or ``mixed``."""

    precision: str
    """Its types, such as ``int8`` or ``int4+int8``; ``mixed`` for more than two."""

    word: str
    """First part of its paths' names, no other snapshot's."""

    @property
    def names(self) -> list[str]:
        """Names of the sparse features, in order."""
        return [feature.name for feature in self.manifest.sparse]

    @property
    def hashed(self) -> frozenset[str]:
        """Names of the features with a deep-hash embedding."""
        return frozenset(hashed_features(self.manifest))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A path to measure."""

    name: str
    """Unique."""

    snapshot: Opened
    """What it scores with."""

    device: str
    """Where."""

    threads: int
    """With how many slots of the device."""

    cache: CacheConfig
    """Behind which caches."""


class HeldOut(NamedTuple):
    """Rows that the model was not trained on."""

    quality: Columns
    """Scored once."""

    latency: Columns
    """What timed batches are drawn from, and the ids counted in that caches start with."""

    source: str
    """Where they come from, in words."""


def open_snapshots(folders: Sequence[Path]) -> list[Opened]:
    """The snapshots, every file of which has been compared with its manifest.

    Raises:
        ValueError: one is missing or damaged, or has other features than the first; one is named twice.
    """
    found: list[tuple[Path, Path, str, SnapshotManifest]] = []
    for named in folders:
        # Resolved once: a link may move on meanwhile.
        folder = named.resolve()
        _require_no_slip(named, folder)
        manifest = read_manifest(folder)
        check(folder, manifest)
        fingerprint = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        if twin := next((other for other, _, print_, _ in found if print_ == fingerprint), None):
            raise ValueError(f"snapshots: {named} and {twin} are the same snapshot. Name it once.")
        if found:
            _require_same_features(named, manifest, found[0][0], found[0][3])
        found.append((named, folder, fingerprint, manifest))
    kinds = [(representation_of(manifest), precision_of(manifest)) for *_, manifest in found]
    words = _distinct(
        ["-".join(kind) for kind in kinds], [_plain(named.absolute().name) for named, *_ in found]
    )
    return [
        Opened(
            named=named.absolute(),
            folder=folder,
            fingerprint=fingerprint,
            manifest=manifest,
            representation=representation,
            precision=precision,
            word=word,
        )
        for (named, folder, fingerprint, manifest), (representation, precision), word in zip(
            found, kinds, words, strict=True
        )
    ]


def candidates(config: ExploreConfig, snapshots: Iterable[Opened]) -> list[Candidate]:
    """Every path to measure: each snapshot on each device with each thread count and cache."""
    found = []
    for snapshot in snapshots:
        for device in config.devices:
            for cache in cache_levels(config, snapshot):
                for threads in config.thread_counts if device == CPU else (1,):
                    tail = "" if cache.levels == "none" else f"-{cache.levels}"
                    name = f"{snapshot.word}-{device}-{threads}{tail}"
                    found.append(
                        Candidate(name=name, snapshot=snapshot, device=device, threads=threads, cache=cache)
                    )
    return found


def cache_levels(config: ExploreConfig, snapshot: Opened) -> list[CacheConfig]:
    """Caches to measure in front of ``snapshot``: none alone where there is nothing to cache."""
    if not snapshot.hashed:
        return [config.cache("none")]
    return [config.cache(levels) for levels in config.caches]


def read_held_out(config: ExploreConfig, snapshot: Opened) -> HeldOut:
    """Rows of ``config.data``, or of the folder that the snapshot's checkpoint names.

    Raises:
        ValueError: no folder is known, it has no such split, other columns than the model, or rows of one
            label only.
    """
    folder = config.data or _known_data(snapshot.manifest)
    if folder is None:
        raise ValueError(
            f"{snapshot.named} names no held-out rows that are still there. Give data=FOLDER, a prepared "
            "folder with its columns."
        )
    splits = load_schema(folder).rows
    if config.split not in splits:
        raise ValueError(
            f"{folder} has no split {config.split!r}, only {', '.join(splits)}. Give split=NAME."
        )
    features = _schema_of(snapshot.manifest)
    quality = read_rows(folder, config.split, config.quality_rows, features)
    clicks = int(quality.labels.sum())
    if clicks in (0, len(quality)):
        what = "has no rows" if not len(quality) else f"has only labels {1 if clicks else 0}"
        raise ValueError(f"{folder}, split {config.split}: its sample {what}: no quality can be measured.")
    latency, source = quality, f"split {config.split} of {folder}"
    if config.latency_split in splits and config.latency_split != config.split:
        others = read_rows(folder, config.latency_split, config.latency_rows, features)
        if len(others) >= max(config.rows):
            latency, source = others, f"{source}, timed on split {config.latency_split}"
    return HeldOut(quality=quality, latency=latency, source=source)


def _require_no_slip(named: Path, folder: Path) -> None:
    """Refuse what is often written in place of a snapshot's folder, with the remedy."""
    if not folder.exists() and {str(named)[0], str(named)[-1]} & {'"', "'"}:
        raise ValueError(f"snapshots: there is no folder {named}. Leave the quotes out: snapshots=[A,B].")
    if (folder / RUN_FILE).is_file() or (folder / CHECKPOINTS).is_dir():
        raise ValueError(
            f"snapshots: {named} is the folder of a training run. Make a snapshot of it with "
            f"`python -m tightrec.snapshot export checkpoint={named} out=FOLDER` and name that."
        )


def _require_same_features(
    named: Path, found: SnapshotManifest, first: Path, wanted: SnapshotManifest
) -> None:
    if found.dense != wanted.dense:
        raise ValueError(f"snapshots: {named} reads other dense columns than {first}. {_APART}")
    for have, want in zip(found.sparse, wanted.sparse, strict=False):
        if have != want:
            raise ValueError(
                f"snapshots: feature {have.name!r} of {named} is not the feature {want.name!r} of {first} "
                f"(name, cardinality or lists differ). {_APART}"
            )
    if len(found.sparse) != len(wanted.sparse):
        raise ValueError(
            f"snapshots: {named} has {len(found.sparse)} sparse features and {first} {len(wanted.sparse)}. "
            f"{_APART}"
        )


def _known_data(manifest: SnapshotManifest) -> Path | None:
    """The prepared folder that the source checkpoint names, if it is still there."""
    checkpoint = Path(str(manifest.source.get("checkpoint", "")))
    try:
        named = checkpoint_files.read_manifest(checkpoint).extra.get("data")
    except (ValueError, OSError):
        return None
    if not named:
        return None
    # As the exporter looks for it: beside the checkpoints first, since the run may have been moved.
    places = (checkpoint.parent.parent / Path(named).name, Path(named))
    return next((place for place in places if (place / SCHEMA_FILE).is_file()), None)


def _schema_of(manifest: SnapshotManifest) -> Schema:
    """The columns of the model, as far as a snapshot knows them: its label has no name."""
    columns = tuple(
        SparseColumn(name=feature.name, cardinality=feature.cardinality, multi_hot=feature.multi_hot)
        for feature in manifest.sparse
    )
    return Schema(dense=manifest.dense, sparse=columns, label="(label)", rows={}, source="a snapshot")


def _distinct(words: Sequence[str], folders: Sequence[str]) -> list[str]:
    """``words``, with the folder's name where two are alike, and with a number where that does not help."""
    for tail in (folders, [str(number) for number in range(1, len(words) + 1)]):
        count = Counter(words)
        words = [
            f"{word}-{more}" if count[word] > 1 else word for word, more in zip(words, tail, strict=True)
        ]
    return list(words)


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", name)
