"""Tiny snapshots and a file of paths over them, for tests of serving."""

from collections.abc import Sequence
from pathlib import Path

from snapshot_made import make_snapshot

from tightrec.serving.paths import Device, PathSet, Profile, ServingPath, write_paths
from tightrec.snapshot.precision import Plan

ROWS = (1, 16, 128, 1024, 4096)
LATENCY_MS = (0.6, 0.7, 1.0, 3.0, 9.0)
TAIL_MS = tuple(3 * ms for ms in LATENCY_MS)
CARDINALITIES = (50, 70, 110)


def made_profile(factor: float = 1.0) -> Profile:
    return Profile(
        rows=ROWS,
        latency_ms=tuple(factor * ms for ms in LATENCY_MS),
        tail_ms=tuple(factor * ms for ms in TAIL_MS),
    )


def made_path(
    name: str, snapshot: Path | str, *, threads: int = 1, accuracy: float = 0.7, factor: float = 1.0
) -> ServingPath:
    """A path on the CPU whose figures are made up."""
    return ServingPath(
        name=name,
        snapshot=str(snapshot),
        fingerprint="0" * 64,
        representation="table",
        precision="int8",
        device="cpu",
        threads=threads,
        accuracy=accuracy,
        auc=accuracy,
        ne=1 - accuracy,
        memory_bytes=1,
        profile=made_profile(factor),
    )


def made_snapshot(folder: Path, **settings: object) -> Path:
    """A snapshot with three dense columns ``d0``... and features ``f0``..., f2 with lists."""
    chosen: dict[str, object] = {"dense": 3, "cardinalities": CARDINALITIES, "multi_hot": ("f2",)}
    return make_snapshot(folder, **{**chosen, **settings})  # type: ignore[arg-type]


def float_plan() -> Plan:
    """Of the same model: everything float32, so that scores differ from int8's."""
    layers = ("bottom.0", "bottom.1", "top.0", "top.1")
    tables = {f"t_f{i}": "fp32" for i in range(len(CARDINALITIES))}
    return Plan(tables=tables, layers=dict.fromkeys(layers, "fp32"))


def made_set(paths: Sequence[ServingPath], slots: int = 2) -> PathSet:
    return PathSet(devices=(Device(name="cpu", slots=slots),), paths=tuple(paths))


def two_paths(folder: Path) -> PathSet:
    """``quick`` (int8) and ``best`` (float32, slower by its profile), one thread each, on one core."""
    quick = made_snapshot(folder / "quick")
    best = made_snapshot(folder / "best", plan=float_plan())
    return made_set(
        [made_path("quick", quick, accuracy=0.7), made_path("best", best, accuracy=0.8, factor=2)], slots=1
    )


def write_two_paths(folder: Path) -> Path:
    """The same, as a file of paths."""
    file = folder / "paths.json"
    write_paths(two_paths(folder), file)
    return file
