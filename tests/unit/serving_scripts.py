"""The serving benchmarks as modules, and paths and runs for them."""

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import guards
import serving_made

from tightrec.serving.outcomes import Summary
from tightrec.serving.paths import PathSet

BENCHMARKS = guards.ROOT / "benchmarks"


@contextlib.contextmanager
def importable() -> Iterator[Any]:
    """Gives the modules by the last part of their name; benchmarks/ is no package."""
    sys.path.insert(0, str(BENCHMARKS))
    yield lambda name: importlib.import_module(f"serving_{name}")
    sys.path.remove(str(BENCHMARKS))


def path_of(name: str, precision: str, threads: int = 1, factor: float = 1.0) -> Any:
    made = serving_made.made_path(name, "s", threads=threads, factor=factor)
    return dataclasses.replace(made, precision=precision)


def three_paths() -> PathSet:
    """int8 on one and two threads kept, float32 dropped."""
    kept = [path_of("int8-1", "int8"), path_of("int8-2", "int8", threads=2, factor=0.7)]
    dropped = ((path_of("fp32-2", "fp32", threads=2), "dominated"), (path_of("fp32-1", "fp32"), "dominated"))
    return dataclasses.replace(serving_made.made_set(kept), dropped=dropped)


def run_of(scripts: Any, setting: str, seed: int, correct: float, **values: Any) -> Any:
    summary = Summary(
        queries=100, served=90, late=5, shed=10, failed=0, rows_per_s=1.0, in_target_rows_per_s=1.0,
        correct_rows_per_s=correct, accuracy=0.8, p50_ms=1.0, p95_ms=2.0, p99_ms=3.0, shares={setting: 1.0},
    )  # fmt: skip
    given = {"target_ms": 10.0, "multiple": 2.0, "rate": 5.0, "lag_p99_ms": 0.4} | values
    return scripts("throughput").Run(setting=setting, seed=seed, summary=summary, **given)
