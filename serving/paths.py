"""The paths that queries can take, and the file ``paths.json`` that holds them.

A path is one way to score a query: a snapshot (with its representation and precision) on a device with a
number of threads, with or without a cache. The explorer measures paths, the scheduler chooses among them.
"""

import bisect
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from tightrec.serving.whole_files import write_whole

FORMAT = "tightrec paths"
"""First value of every file of paths."""

FORMAT_VERSION = 1
"""Version of the file's layout."""

Quality = Literal["accuracy", "auc", "ne"]
"""By which paths are ranked: share of rows whose click is predicted right, AUC, or normalised entropy."""

QUALITIES: tuple[Quality, ...] = get_args(Quality)

CacheLevels = Literal["none", "encoder", "decoder", "both"]
"""Which levels of MP-Cache (arXiv 2302.10872) a path has; see :mod:`tightrec.serving.caching.cache`."""

CACHE_LEVELS: tuple[CacheLevels, ...] = get_args(CacheLevels)

CacheSpace = Literal["encoder", "decoded"]
"""What the decoder level clusters: encoder outputs, as in MP-Rec, or the decoder's results."""

CACHE_SPACES: tuple[CacheSpace, ...] = get_args(CacheSpace)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How long a batch takes, by its rows: measured medians, straight lines between them."""

    rows: tuple[int, ...]
    """Batch sizes, ascending, at least one."""

    latency_ms: tuple[float, ...]
    """Of each: from handing the batch over to having its scores, with nothing else under way."""

    tail_ms: tuple[float, ...]
    """Of each: the 99th percentile."""

    def __post_init__(self) -> None:
        sizes = len(self.rows), len(self.latency_ms), len(self.tail_ms)
        if not self.rows or len(set(sizes)) > 1:
            raise ValueError(f"a profile needs one latency and one tail a batch size, not {sizes}.")
        if self.rows[0] < 1 or any(a >= b for a, b in zip(self.rows, self.rows[1:], strict=False)):
            raise ValueError(f"a profile's batch sizes must ascend from at least 1, not {self.rows}.")
        if not all(math.isfinite(ms) and ms > 0 for ms in (*self.latency_ms, *self.tail_ms)):
            raise ValueError("a profile's latencies must be finite and above 0.")

    def expected_ms(self, rows: int) -> float:
        """Latency of a batch of ``rows``; beyond the largest size, in proportion to the rows."""
        return between(self.rows, self.latency_ms, rows)

    def expected_tail_ms(self, rows: int) -> float:
        """The same of the 99th percentile."""
        return between(self.rows, self.tail_ms, rows)

    @property
    def rows_per_s(self) -> float:
        """The largest throughput of one such path, over the batch sizes."""
        return max(1e3 * rows / ms for rows, ms in zip(self.rows, self.latency_ms, strict=True))


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Caches of deep-hash embeddings in front of one path."""

    levels: CacheLevels = "none"
    """``encoder``: final vectors of hot ids. ``decoder``: nearest centroids for the other ids."""

    memory_mb: float = 8.0
    """Of both levels together, in 10^6 bytes; the decoder level takes what it needs first."""

    centroids: int = 256
    """A feature, decoder level."""

    space: CacheSpace = "decoded"
    """What is clustered."""

    pieces: int = 8
    """With ``space="decoded"``: of a vector, clustered each on its own (product quantisation), as far as it
    can be cut into so many; a byte or two an id and piece. 1: plain k-means."""

    def __post_init__(self) -> None:
        if self.levels not in CACHE_LEVELS or self.space not in CACHE_SPACES:
            raise ValueError(
                f"cache levels={self.levels!r} space={self.space!r} must be one of {', '.join(CACHE_LEVELS)} "
                f"and one of {', '.join(CACHE_SPACES)}."
            )
        if not self.memory_mb > 0 or not math.isfinite(self.memory_mb):
            raise ValueError(f"cache memory_mb={self.memory_mb} must be a finite number above 0.")
        if self.centroids < 1:
            raise ValueError(f"cache centroids={self.centroids} must be at least 1.")
        if self.pieces < 1:
            raise ValueError(f"cache pieces={self.pieces} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Something that computes."""

    name: str
    """``cpu``, ``cuda:0``, ..., or any name in a recorded profile."""

    slots: int
    """What paths share: cores of a CPU, 1 for a GPU. A batch occupies its path's ``threads`` of them."""

    memory_bytes: int | None = None
    """What the paths kept on it may occupy together; None: no limit."""

    recorded: bool = False
    """Whether its profiles come from elsewhere: for simulation, the server refuses it."""

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"device {self.name}: slots={self.slots} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class ServingPath:
    """One measured path."""

    name: str
    """Unique, such as ``table-int8-cpu-1``."""

    snapshot: str
    """Folder of the snapshot or a link to it, absolute or relative to the file of paths."""

    fingerprint: str
    """SHA-256 of the snapshot's manifest.json when it was measured; its caches hold for no other."""

    representation: str
    """``table``, ``dhe``, ``hybrid``, ``select``, ``mixed`` (features differ)."""

    precision: str
    """Its plan in a word or two, such as ``int8`` or ``int4+int8``."""

    device: str
    """Name of a device."""

    threads: int
    """Slots of the device that a batch occupies: intra-op threads on a CPU, 1 on a GPU."""

    accuracy: float
    """Share of the held-out rows whose click is predicted right at a threshold of one half."""

    auc: float
    """On the same rows."""

    ne: float
    """On the same rows; less is better."""

    memory_bytes: int
    """Resident memory that the path adds to a worker, its caches included."""

    profile: Profile
    """Its latency."""

    cache: CacheConfig = CacheConfig()
    """Caches of its deep-hash embeddings."""

    cache_bytes: int = 0
    """Memory of these caches; the rest is shared with other paths of the snapshot in the same worker."""

    cache_file: str | None = None
    """What its caches start with, absolute or relative to the file of paths; None: they are built anew."""

    notes: dict[str, Any] = field(default_factory=dict)
    """Anything else that was measured, such as hit rates and what each cache level costs in accuracy."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"path {self.name}: threads={self.threads} must be at least 1.")
        if not all(math.isfinite(value) for value in (self.accuracy, self.auc, self.ne)):
            raise ValueError(f"path {self.name}: accuracy, auc and ne must be finite numbers.")

    def quality(self, by: Quality) -> float:
        """The larger, the better."""
        return -self.ne if by == "ne" else getattr(self, by)


@dataclass(frozen=True, kw_only=True)
class PathSet:
    """What the explorer kept."""

    devices: tuple[Device, ...]
    """At least one."""

    paths: tuple[ServingPath, ...]
    """At least one; each on one of the devices."""

    dropped: tuple[tuple[ServingPath, str], ...] = ()
    """What was measured and not kept, with the reason."""

    notes: dict[str, Any] = field(default_factory=dict)
    """How it was measured: rows, versions, processor."""

    def __post_init__(self) -> None:
        names = [path.name for path in self.paths]
        if not names:
            raise ValueError("a set of paths needs at least one path.")
        if len(set(names)) < len(names):
            raise ValueError(f"two paths have one name: {', '.join(sorted(names))}.")
        slots = {device.name: device.slots for device in self.devices}
        for path in self.paths:
            if path.device not in slots:
                raise ValueError(
                    f"path {path.name} is on {path.device}, which is none of {', '.join(slots)}."
                )
            if path.threads > slots[path.device]:
                raise ValueError(
                    f"path {path.name} takes {path.threads} threads, but {path.device} has "
                    f"{slots[path.device]} slots."
                )

    def device(self, name: str) -> Device:
        """The device ``name``, which must be there."""
        return next(device for device in self.devices if device.name == name)

    def path(self, name: str) -> ServingPath:
        """The path ``name``.

        Raises:
            ValueError: there is none; names those there are.
        """
        for path in self.paths:
            if path.name == name:
                return path
        raise ValueError(f"there is no path {name!r}, only {', '.join(path.name for path in self.paths)}.")


def write_paths(paths: PathSet, file: Path) -> None:
    """Write ``paths`` whole or not at all."""
    values = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(paths)}
    write_whole(file, json.dumps(values, indent=1, allow_nan=False) + "\n")


def read_paths(file: Path) -> PathSet:
    """The paths that ``file`` holds; snapshots relative to it become absolute.

    Raises:
        ValueError: no such file, or it does not hold paths; says what is wrong.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"There is no file {file}. Make it with `python -m tightrec.serving explore`."
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error}).") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ValueError(
            f"{file} holds no paths. Give a file that `python -m tightrec.serving explore` wrote."
        )
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {version!r}; {FORMAT_VERSION} is known here. Explore again."
        )
    try:
        return PathSet(
            devices=tuple(Device(**device) for device in values.pop("devices")),
            paths=tuple(_path(path, file.parent) for path in values.pop("paths")),
            dropped=tuple((_path(path, file.parent), str(why)) for path, why in values.pop("dropped", [])),
            **values,
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        detail = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file} does not describe paths ({detail}). Explore again.") from None


def _path(values: Mapping[str, Any], folder: Path) -> ServingPath:
    found = dict(values)
    profile = {name: tuple(numbers) for name, numbers in found.pop("profile").items()}
    found["snapshot"] = str((folder / found["snapshot"]).absolute())
    if found.get("cache_file") is not None:
        found["cache_file"] = str((folder / found["cache_file"]).absolute())
    cache = CacheConfig(**found.pop("cache", {}))
    return ServingPath(profile=Profile(**profile), cache=cache, **found)


def between(rows: tuple[int, ...], values: tuple[float, ...], wanted: int) -> float:
    """The value at ``wanted`` rows, linear between those known; beyond the largest, in proportion."""
    place = bisect.bisect_left(rows, wanted)
    if place == len(rows):
        return values[-1] * wanted / rows[-1]
    if rows[place] == wanted or place == 0:
        return values[place]
    before, after = rows[place - 1], rows[place]
    share = (wanted - before) / (after - before)
    return values[place - 1] + share * (values[place] - values[place - 1])
