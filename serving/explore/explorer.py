"""``explore``: measures every path and keeps, for each device, the best ones that fit its memory.

snapshots x devices x threads x caches ──► quality and memory, in a process of their own
                                       ──► latency by batch size, through the workers that serve
                                       ──► the Pareto set ──► what fits ──► paths.json, plot, table

After MP-Rec's offline exploration (arXiv 2302.10872): for each representation on each device, quality, memory
and latency by query size.
"""

import contextlib
import dataclasses
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from tightrec.serving.explore.candidates import (
    Candidate,
    HeldOut,
    Opened,
    candidates,
    open_snapshots,
    read_held_out,
)
from tightrec.serving.explore.config import CPU, ExploreConfig
from tightrec.serving.explore.measure import Effort, RowStream, measure
from tightrec.serving.explore.pareto import Dropped, keep, require_room
from tightrec.serving.explore.quality import Assessed, Task, assess, count_ids
from tightrec.serving.explore.recorded import read_recorded
from tightrec.serving.explore.table import table_lines
from tightrec.serving.output_files import require_writable
from tightrec.serving.paths import CacheConfig, Device, PathSet, Profile, ServingPath, write_paths

Say = Callable[[str], None]

_UNMEASURED = Profile(rows=(1,), latency_ms=(1.0,), tail_ms=(1.0,))
_WARM_BATCHES = 8
_FIGURES = ("accuracy", "auc", "ne")


class Material(NamedTuple):
    """What is measured with what, all of it checked."""

    snapshots: list[Opened]
    """In the order of the settings."""

    devices: list[Device]
    """Those that are measured here."""

    recorded: list[PathSet]
    """Of other machines."""

    held_out: HeldOut
    """The rows."""


def explore(config: ExploreConfig, say: Say) -> int:
    """Carry out ``explore``; returns the exit status, 0.

    Raises:
        ValueError: a setting that does not fit, a damaged snapshot, no path that fits a device's memory.
        ChildProcessError: a process that measured a path died.
        TimeoutError: measuring a path took too long.
    """
    material = gather(config)
    say(
        f"snapshots {', '.join(opened.word for opened in material.snapshots)}; judged by {config.quality} on "
        f"{len(material.held_out.quality):,} rows of {material.held_out.source}"
    )
    with _scratch(config.out) as scratch:
        measured, worker_bytes = _measure_all(config, material, scratch, say)
        found = choose(config, material, measured)
        found = dataclasses.replace(found, notes={**found.notes, "worker_bytes": worker_bytes})
        _publish(config, material, found, scratch)
    for line in table_lines(found, config.quality):
        say(line)
    say(f"paths {config.out}, plot {config.plot_file}")
    return 0


def gather(config: ExploreConfig) -> Material:
    """Everything that can be found wrong before the first measurement.

    Raises:
        ValueError: says what, and what to do.
    """
    require_writable("out", config.out)
    require_writable("plot", config.plot_file)
    recorded = read_recorded(config.recorded, config.devices)
    devices = [_device(config, name) for name in config.devices]
    known = [device.name for device in (*devices, *(d for paths in recorded for d in paths.devices))]
    for word in config.memory:
        name = word.rpartition("=")[0]
        if name and name not in known:
            raise ValueError(f"memory={word}: {name} is none of the devices, which are {', '.join(known)}.")
    for record in recorded:
        for device in record.devices:
            if config.memory_bytes(device.name, named=True) is not None:
                require_room(*_limited(config, record, device))
    snapshots = open_snapshots(config.snapshots)
    return Material(snapshots, devices, recorded, read_held_out(config, snapshots[0]))


def choose(config: ExploreConfig, material: Material, measured: Sequence[ServingPath]) -> PathSet:
    """The set of paths: of each device those to keep, and what was recorded.

    Raises:
        ValueError: on some device not even the smallest path fits.
    """
    devices: list[Device] = []
    paths: list[ServingPath] = []
    dropped: list[Dropped] = []
    for device in material.devices:
        kept = keep(device, [path for path in measured if path.device == device.name], config.quality)
        devices.append(device)
        paths += kept.paths
        dropped += kept.dropped
    for record in material.recorded:
        dropped += record.dropped
        for device in record.devices:
            device, theirs = _limited(config, record, device)
            if config.memory_bytes(device.name, named=True) is not None and theirs:
                kept = keep(device, theirs, config.quality)
                dropped += kept.dropped
                theirs = list(kept.paths)
            devices.append(device)
            paths += theirs
    return PathSet(
        devices=tuple(devices), paths=tuple(paths), dropped=tuple(dropped), notes=_notes(config, material)
    )


def _limited(config: ExploreConfig, record: PathSet, device: Device) -> tuple[Device, list[ServingPath]]:
    """A recorded device, with the limit that this exploration gives it if it does, and its paths."""
    limit = config.memory_bytes(device.name, named=True)
    theirs = [path for path in record.paths if path.device == device.name]
    return (dataclasses.replace(device, memory_bytes=limit) if limit and theirs else device), theirs


def _device(config: ExploreConfig, name: str) -> Device:
    limit = config.memory_bytes(name)
    if name == CPU:
        return Device(name=name, slots=config.slots, memory_bytes=limit)
    import torch

    count = torch.cuda.device_count()
    if int(name.partition(":")[2] or 0) >= count:
        raise ValueError(
            f"devices: this machine has no {name} ({count} CUDA devices are seen). Explore where there is "
            "one and give the file that was written there as recorded=FILE: simulations can use it."
        )
    return Device(name=name, slots=1, memory_bytes=limit)


def _measure_all(
    config: ExploreConfig, material: Material, scratch: Path, say: Say
) -> tuple[list[ServingPath], int]:
    """Every path with its figures, and what a worker process holds without any."""
    plan = candidates(config, material.snapshots)
    assessor = _Assessor(config, material.held_out, scratch, say)
    effort = Effort(
        rows=config.rows,
        repeats=config.repeats,
        least_repeats=config.least_repeats,
        seconds=config.seconds,
    )
    unmeasured = [assessor.path(candidate) for candidate in plan]
    for device in material.devices:
        require_room(device, [path for path in unmeasured if path.device == device.name])
    found = []
    for number, (candidate, path) in enumerate(zip(plan, unmeasured, strict=True), 1):
        began = time.monotonic()
        profile, batches = measure(
            path,
            RowStream(material.held_out.latency, config.seed),
            effort,
            warm_rows=0 if candidate.cache.levels == "none" else _WARM_BATCHES * max(config.rows),
            timeout_s=config.path_timeout_s,
        )
        notes = {**path.notes, "batches": list(batches.values())}
        found.append(dataclasses.replace(path, profile=profile, notes=notes))
        say(
            f"[{number}/{len(plan)}] {path.name}: {profile.expected_ms(1):.2f} ms for 1 row, "
            f"{profile.expected_ms(128):.2f} ms for 128, {profile.rows_per_s:,.0f} rows/s "
            f"({time.monotonic() - began:.0f} s)"
        )
    return found, assessor.worker_bytes


class _Assessor:
    """Quality and memory of a snapshot behind a cache on a device; threads change neither."""

    def __init__(self, config: ExploreConfig, held_out: HeldOut, scratch: Path, say: Say) -> None:
        self._settings, self._held_out, self._scratch, self._say = config, held_out, scratch, say
        self._known: dict[tuple[str, str, CacheConfig], Assessed] = {}
        self.worker_bytes = 0

    def assess(self, candidate: Candidate) -> Assessed:
        key = (candidate.snapshot.fingerprint, candidate.device, candidate.cache)
        if key not in self._known:
            self._known[key] = found = self._assess(candidate)
            self.worker_bytes = max(self.worker_bytes, found.base_bytes)
            cache = "" if candidate.cache.levels == "none" else f" with cache {candidate.cache.levels}"
            self._say(
                f"{candidate.snapshot.word}{cache} on {candidate.device}: accuracy {found.accuracy:.4%}, AUC "
                f"{found.auc:.5f}, NE {found.ne:.5f}, {found.memory_bytes / 1e6:,.1f} MB"
            )
        return self._known[key]

    def path(self, candidate: Candidate) -> ServingPath:
        """With everything but its latency."""
        path = _path(candidate, self.assess(candidate), self.cache_notes(candidate))
        return dataclasses.replace(path, cache_file=self.cache_file(candidate))

    def cache_notes(self, candidate: Candidate) -> dict[str, Any]:
        """What the cache answered and what it costs, beside the same snapshot without."""
        if candidate.cache.levels == "none":
            return {}
        without = self.assess(dataclasses.replace(candidate, cache=self._settings.cache("none")))
        found = self.assess(candidate)
        differences = {name: getattr(found, name) - getattr(without, name) for name in _FIGURES}
        return {"cache": {"hits": found.hits, "change": differences}}

    def cache_file(self, candidate: Candidate) -> str | None:
        if candidate.cache.levels == "none":
            return None
        name = f"{candidate.snapshot.word}-{candidate.cache.levels}.safetensors"
        return str(self._scratch / name)

    def _assess(self, candidate: Candidate) -> Assessed:
        config = self._settings
        file = self.cache_file(candidate)
        task = Task(
            snapshot=candidate.snapshot.folder,
            fingerprint=candidate.snapshot.fingerprint,
            device=candidate.device,
            threads=config.slots,
            cache=candidate.cache,
            cache_file=Path(file) if file else None,
            frequencies=count_ids(
                self._held_out.latency, candidate.snapshot.names, candidate.snapshot.hashed
            ),
            batch_rows=max(config.rows),
        )
        return assess(task, self._held_out.quality, config.path_timeout_s)


def _path(candidate: Candidate, assessed: Assessed, notes: dict[str, Any]) -> ServingPath:
    return ServingPath(
        name=candidate.name,
        snapshot=str(candidate.snapshot.folder),
        fingerprint=candidate.snapshot.fingerprint,
        representation=candidate.snapshot.representation,
        precision=candidate.snapshot.precision,
        device=candidate.device,
        threads=candidate.threads,
        accuracy=assessed.accuracy,
        auc=assessed.auc,
        ne=assessed.ne,
        memory_bytes=assessed.memory_bytes,
        cache_bytes=assessed.cache_bytes,
        profile=_UNMEASURED,
        cache=candidate.cache,
        notes=notes,
    )


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` for files that are not whole yet; absolute, as worker processes want it."""
    home = out.absolute().parent
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=home))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(config: ExploreConfig, material: Material, found: PathSet, scratch: Path) -> None:
    """Write all files; that of the paths, which names the others, comes last."""
    from tightrec.serving.explore.plot import plot_paths

    home = config.out.absolute().parent
    plot = scratch / config.plot_file.name
    plot_paths(found, config.quality, plot)
    moved: dict[str, str] = {}
    for path in found.paths:
        if path.cache_file is not None and path.cache_file not in moved and Path(path.cache_file).is_file():
            moved[path.cache_file] = f"{config.out.stem}.{Path(path.cache_file).name}"
    for file, name in moved.items():
        os.replace(file, home / name)
    os.replace(plot, config.plot_file)
    named = {opened.fingerprint: opened.named for opened in material.snapshots}

    def finished(path: ServingPath) -> ServingPath:
        # As the user named it: a server follows a link.
        folder = named.get(path.fingerprint, Path(path.snapshot))
        inside = folder.is_relative_to(home)
        return dataclasses.replace(
            path,
            snapshot=str(folder.relative_to(home) if inside else folder),
            cache_file=moved.get(path.cache_file or ""),
        )

    written = dataclasses.replace(
        found,
        paths=tuple(map(finished, found.paths)),
        dropped=tuple((finished(path), why) for path, why in found.dropped),
    )
    write_paths(written, config.out)


def _notes(config: ExploreConfig, material: Material) -> dict[str, Any]:
    rows = material.held_out
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {name: version(name) for name in ("tightrec", "torch", "faiss-cpu")},
        "rows": {"source": rows.source, "quality": len(rows.quality), "latency": len(rows.latency)},
        "quality": config.quality,
        "recorded": [str(file) for file in config.recorded],
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
