"""Settings of ``explore``."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tightrec.serving.paths import CACHE_LEVELS, CacheConfig, CacheLevels, CacheSpace, Quality

CPU = "cpu"
"""Name of the device that every machine has."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_CUDA = re.compile(r"cuda(:\d+)?")


@dataclass(frozen=True, kw_only=True)
class ExploreConfig:
    """``explore``: which paths are measured, on what, and which are kept."""

    snapshots: tuple[Path, ...]
    """Folders of snapshots or links to them, all with the same features."""

    out: Path = Path("paths.json")
    """The file of paths."""

    devices: tuple[str, ...] = (CPU,)
    """``cpu``, ``cuda:0``, ...: each is measured here."""

    recorded: tuple[Path, ...] = ()
    """Files of paths that this command wrote on other machines: their devices are added, marked as recorded.
    A simulation uses them, a server refuses them."""

    memory: tuple[str, ...] = ()
    """What the paths kept on a device may occupy: ``4GB`` for each device that is measured, or
    ``[cpu=4GB,cuda:0=16GB]``; none: no limit."""

    cores: int | None = None
    """Slots of the CPU, which paths share; null: the cores that this process may use."""

    threads: tuple[int, ...] = ()
    """Thread counts to measure on the CPU; none: powers of two up to the cores, and the cores."""

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    """Batch sizes to measure."""

    repeats: int = 200
    """Batches of each size, at most."""

    seconds: float = 1.0
    """For each size of each path: no further batch is begun after them, once there are ``least_repeats``."""

    least_repeats: int = 10
    """Batches of each size, at least, however long they take."""

    data: Path | None = None
    """Prepared folder with held-out rows; null: the one that the first snapshot's checkpoint names."""

    split: str = "test"
    """Split that is scored for the quality."""

    quality_rows: int = 100_000
    """Rows that are scored for the quality, evenly spread; all if fewer."""

    latency_split: str = "valid"
    """Split that timed batches are drawn from, and where the ids are counted that caches start with; a folder
    that has none, or too few rows in it, lends those of the quality."""

    latency_rows: int = 50_000
    """Rows of it, evenly spread."""

    quality: Quality = "accuracy"
    """By which paths are compared: ``accuracy``, ``auc`` or ``ne``; all three are measured."""

    caches: tuple[CacheLevels, ...] = CACHE_LEVELS
    """Cache levels to measure, for snapshots with deep-hash embeddings; others have none."""

    cache_mb: float = CacheConfig.memory_mb
    """Size of a cache, both levels together, in 10^6 bytes."""

    centroids: int = CacheConfig.centroids
    """Centroids a feature of a cache's decoder level."""

    cache_space: CacheSpace = CacheConfig.space
    """What the decoder level clusters: encoder outputs, as in MP-Rec, or the decoder's results."""

    cache_pieces: int = CacheConfig.pieces
    """Of a vector, clustered each on its own."""

    plot: Path | None = None
    """The plot, SVG or PNG; null: beside ``out``, named alike."""

    path_timeout_s: float = 900.0
    """For the quality, and again for the latency, of one path; a longer one ends the command."""

    seed: int = 0
    """Of the order of rows and batch sizes."""

    def __post_init__(self) -> None:
        for name in ("snapshots", "devices", "rows", "caches"):
            _require_distinct(name, getattr(self, name))
        _require_distinct("threads", self.threads, some=False)
        for name in ("repeats", "least_repeats", "quality_rows", "latency_rows"):
            _require_positive(name, getattr(self, name))
        if self.repeats < self.least_repeats:
            raise ValueError(f"repeats={self.repeats} must not be below least_repeats={self.least_repeats}.")
        for name in ("seconds", "path_timeout_s"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be a finite number above 0.")
        if min(self.rows) < 1:
            raise ValueError(f"rows={_list(self.rows)} must hold batch sizes of at least 1.")
        for device in self.devices:
            if device != CPU and not _CUDA.fullmatch(device):
                raise ValueError(f"devices: {device!r} is not known. Give {CPU}, cuda or cuda:N.")
        if self.cores is not None:
            _require_positive("cores", self.cores)
        for count in self.threads:
            if not 1 <= count <= self.slots:
                raise ValueError(f"threads={count} must lie between 1 and the cores, which are {self.slots}.")
        if self.plot is not None and self.plot.suffix not in (".svg", ".png"):
            raise ValueError(f"plot={self.plot} must end in .svg or .png.")
        # They say what is wrong with their settings.
        self.cache("none")
        self.memory_bytes(CPU)

    @property
    def slots(self) -> int:
        """Cores of the CPU that paths share."""
        return self.cores or len(os.sched_getaffinity(0))

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """Threads to measure on the CPU, ascending."""
        counts = self.threads or (*(2**i for i in range(self.slots.bit_length())), self.slots)
        return tuple(sorted(set(counts)))

    @property
    def plot_file(self) -> Path:
        """Where the plot goes."""
        return self.plot or self.out.with_suffix(".svg")

    def cache(self, levels: CacheLevels) -> CacheConfig:
        """Caches with these levels."""
        return CacheConfig(
            levels=levels,
            memory_mb=self.cache_mb,
            centroids=self.centroids,
            space=self.cache_space,
            pieces=self.cache_pieces,
        )

    def memory_bytes(self, device: str, *, named: bool = False) -> int | None:
        """What the paths on ``device`` may occupy; None: no limit.

        Args:
            named: whether only a limit with the device's name counts.
        """
        limits: dict[str, int] = {}
        for word in self.memory:
            name, _, size = word.rpartition("=")
            if name in limits:
                raise ValueError(f"memory={_list(self.memory)} gives two limits for {name or 'all devices'}.")
            limits[name] = parse_bytes(size, f"memory={word}")
        return limits.get(device, None if named else limits.get(""))


def parse_bytes(text: str, where: str) -> int:
    """A number of bytes from words such as ``4GB`` (10^9), ``512MiB`` (2^20) or ``1000000``.

    Raises:
        ValueError: it is none, 0, or below a megabyte without a unit: ``4`` is meant to be ``4GB``. ``where``
            names the setting.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper().removesuffix("B") + "B" if match and match[2] else "")
    size = round(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise ValueError(f"{where}: {text!r} is no size. Write one such as 4GB, 512MiB or 1000000 (bytes).")
    if match and not match[2] and size < _UNITS["MB"]:
        raise ValueError(f"{where} is {size:,} bytes. Write the unit, such as {text.strip()}GB.")
    return size


def _require_distinct(name: str, values: Sequence[object], *, some: bool = True) -> None:
    if some and not values:
        raise ValueError(f"{name} is empty: name at least one.")
    if len(set(values)) < len(values):
        raise ValueError(f"{name}={_list(values)} names something twice.")


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1.")


def _list(values: Sequence[object]) -> str:
    return f"[{','.join(map(str, values))}]"
