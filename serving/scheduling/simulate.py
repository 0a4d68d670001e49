"""The command ``simulate``: policies on device mixes, on profiles, in a table."""

import dataclasses
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tightrec.serving.load.arrivals import LoadConfig, arrivals
from tightrec.serving.outcomes import Summary
from tightrec.serving.paths import PathSet, read_paths
from tightrec.serving.scheduling.scheduler import Query
from tightrec.serving.scheduling.simulate_config import SimulateConfig, parse_device
from tightrec.serving.scheduling.simulator import ProfileDurations, merged, scaled, simulate
from tightrec.serving.whole_files import write_whole

Say = Callable[[str], None]

HEADER = (
    f"{'policy':<24}{'queries/s':>10}{'in target/s':>12}{'correct/s':>11}{'accuracy':>9}"
    f"{'p50 ms':>8}{'p95 ms':>8}{'p99 ms':>8}{'shed':>7}{'late':>7}"
)
"""Rates are rows a second, except queries/s."""


def simulate_command(config: SimulateConfig, say: Say) -> int:
    """Simulate ``config.policy`` on the same queries and print a table; returns the exit status 0.

    Raises:
        ValueError: a file without paths, a device or path that is not there.
    """
    paths = devices_of(merged([read_paths(file) for file in config.paths]), config.devices, config.source)
    queries = queries_of(config)
    names = ", ".join(f"{device.name} ({device.slots} slots)" for device in paths.devices)
    say(f"{len(queries):,} queries over {config.duration_s:g} s, target {config.target_ms:g} ms, on {names}")
    for device, how in paths.notes.get("assumed", {}).items():
        say(f"{device} is assumed, not measured: {how}")
    results = []
    say(HEADER)
    for policy in config.policy:
        summary, values = run_policy(paths, config, policy, queries)
        for line in table_lines(policy, summary, config.duration_s):
            say(line)
        results.append(values)
    if config.out is not None:
        _write(config.out, {"config": _plain(config), "assumed": _assumed(paths), "results": results})
        say(f"figures in {config.out}")
    return 0


def queries_of(load: LoadConfig) -> list[Query]:
    """The queries of a load, numbered from 0."""
    target_s = load.target_ms / 1e3
    return [Query(number, rows, at, target_s) for number, (at, rows) in enumerate(arrivals(load))]


def run_policy(
    paths: PathSet, config: SimulateConfig, policy: str, queries: Sequence[Query]
) -> tuple[Summary, dict[str, Any]]:
    """The figures of one policy, as they are and as plain values for JSON."""
    model = ProfileDurations(seed=config.seed, noise=config.noise, contention=config.contention)
    done = simulate(paths, config.scheduler(policy), queries, model, overhead_s=config.overhead_ms / 1e3)
    summary = done.summary(paths, config.duration_s)
    busy = {
        device.name: done.busy_s[device.name] / (device.slots * max(config.duration_s, done.finished_s))
        for device in paths.devices
    }
    return summary, {"policy": policy, **_plain(summary), "batches": done.batches, "busy": busy}


def table_lines(policy: str, summary: Summary, duration_s: float) -> list[str]:
    """A row under :data:`HEADER`, and the shares of the paths below it."""
    shed, late = (count / max(1, summary.queries) for count in (summary.shed, summary.late))
    line = (
        f"{policy:<24}{summary.served / duration_s:>10,.0f}{summary.in_target_rows_per_s:>12,.0f}"
        f"{summary.correct_rows_per_s:>11,.0f}{summary.accuracy:>9.4f}{summary.p50_ms:>8.2f}"
        f"{summary.p95_ms:>8.2f}{summary.p99_ms:>8.2f}{shed:>7.1%}{late:>7.1%}"
    )
    ranked = sorted(summary.shares.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {share:.1%}" for name, share in ranked if share >= 0.0005)
    if len(ranked) < 2:
        return [line]
    return [line, *textwrap.wrap(shown, 106, initial_indent=" " * 4, subsequent_indent=" " * 4)]


def devices_of(paths: PathSet, words: Sequence[str], source: str) -> PathSet:
    """The devices that ``words`` ask for: those of ``paths``, and ones assumed from its device ``source``.

    Raises:
        ValueError: a device that is not there, or twice.
    """
    if not words:
        return paths
    parts = []
    for word in words:
        device = parse_device(word)
        if isinstance(device, str):
            parts.append(_alone(paths, device))
            continue
        for number in range(device.count):
            name = f"{device.name}:{number}"
            parts.append(
                scaled(paths, name, speed=device.speed, overhead_ms=device.overhead_ms, source=source)
            )
    return merged(parts)


def _alone(paths: PathSet, name: str) -> PathSet:
    known = [device.name for device in paths.devices]
    if name not in known:
        raise ValueError(
            f"there is no device {name!r} in the files, only {', '.join(known)}; an assumed one needs a "
            f"speed, as {name}(speed=20,overhead_ms=0.3)."
        )
    on_it = tuple(path for path in paths.paths if path.device == name)
    if not on_it:
        raise ValueError(f"device {name} has no paths. Leave it out.")
    return PathSet(devices=(paths.device(name),), paths=on_it)


def _assumed(paths: PathSet) -> dict[str, str]:
    return dict(paths.notes.get("assumed", {}))


def _plain(record: Any) -> dict[str, Any]:
    """Fields of a dataclass as JSON takes them; nan becomes null."""
    values = {}
    for name, value in dataclasses.asdict(record).items():
        if isinstance(value, float) and not math.isfinite(value):
            value = None
        elif isinstance(value, (Path, tuple)):
            value = [str(part) for part in value] if isinstance(value, tuple) else str(value)
        values[name] = value
    return values


def _write(file: Path, values: dict[str, Any]) -> None:
    write_whole(file, json.dumps(values, indent=1, allow_nan=False) + "\n")
