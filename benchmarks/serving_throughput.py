"""Correct-prediction throughput of multi-path serving against single paths and simpler policies.

    make bench SCRIPT=serving_throughput ARGS="paths=paths.json data=FOLDER"
    make bench SCRIPT=serving_throughput ARGS="paths=paths.json data=FOLDER transport=http quick=true"

Correct-prediction throughput (MP-Rec, arXiv 2302.10872) is rows scored within the latency target, times the
accuracy of the path that scored them, a second. For every target the rate that the baseline (float32 tables
on the fewest threads, batched and shedding) sustains is found first: the largest at which 99 % of what a
nearly idle server answers in time still is, or what its profile says where that is less than half of the
queries. Multiples of it are then offered to every setting, the same arrivals, sizes and rows to each, one
setting after the other in an order that turns with the seed:

- every path alone, with the same batching and shedding; the baseline also ``plain``, one query a batch and
  nothing shed;
- ``fastest``, ``random``, ``greedy`` (MP-Rec's rule) and ``multi`` over the kept paths.

``transport=direct`` feeds the server's scheduler and workers inside this process, ``http`` sends to servers,
one a setting, all alive. Client, server and workers share the machine's cores. Ratios are of one seed's
runs of two settings; min / median / max are over seeds.

Goals of ``multi``, in medians over seeds: 2.5 times the baseline at 10 ms and the largest load; at 10 ms and
every load no less accurate than the baseline; at every target and load no less than any single path. Exit
status 1 if one is missed, 2 on a mistake or if a server does not start.
"""

import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from serving_runs import (
    LEAST,
    NotReady,
    Verdict,
    all_paths,
    baseline_of,
    counted,
    first_guess,
    in_target_share,
    machine,
    spread,
    summary_of,
    sustainable_rate,
    tried_s,
)
from serving_transport import Setting, Transport, Way, transport

from tightrec.formats.settings import from_words
from tightrec.formats.usage import describe
from tightrec.serving.load.arrivals import LoadConfig
from tightrec.serving.load.config import LoadClientConfig
from tightrec.serving.outcomes import Summary
from tightrec.serving.paths import PathSet, ServingPath, read_paths

POLICIES = ("fastest", "random", "greedy", "multi")
GOAL, GOAL_MS = 2.5, 10.0
ROUNDING = 1e-9
"""Of an accuracy that is a sum over queries, where all took one path."""


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """The words of this script."""

    paths: Path
    """File of paths that ``explore`` wrote on this machine."""

    data: Path
    """Prepared folder whose test rows are sent."""

    transport: Way = "direct"
    """``http`` or ``direct``."""

    baseline: str | None = None
    """Name of the path to compare with; null: float32 tables on the fewest threads, kept or dropped."""

    targets_ms: str = "5,10,20,50"
    """Latency targets, by commas."""

    multiples: str = "1,2,4"
    """Offered loads, in multiples of what the baseline sustains at the target, by commas."""

    rate: float | None = None
    """Queries a second that count as 1x; null: what is sustained, which is found first."""

    seeds: int = 3
    """Of arrivals, sizes and rows: 0 to this many."""

    run_s: float = 2.5
    """Length of each run that counts."""

    warmup_s: float = 0.5
    """Of each run, before it counts."""

    probe_s: float = 2.0
    """Length of each try of a rate."""

    mean_rows: float = 128.0
    """Of a query; sizes are lognormal."""

    sigma: float = 1.0
    """Of the logarithm of sizes."""

    quick: bool = False
    """One seed, targets of 10 and 50 ms, loads of 1 and 3 times, runs of 1 s: to see that it works."""

    out: Path | None = None
    """Where every figure is written as JSON; null: nowhere."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of one setting."""

    target_ms: float
    multiple: float
    rate: float
    seed: int
    setting: str
    summary: Summary
    lag_p99_ms: float


def settings_of(paths: PathSet, baseline: str) -> list[Setting]:
    """Everything that is compared."""
    known = all_paths(paths)
    kept = tuple(path for path in paths.paths if path.name in known)
    singles = {path.name: path for path in (known[baseline], *kept)}
    alone = [Setting(name=name, policy=f"fixed:{name}", paths=(path,)) for name, path in singles.items()]
    plain = dataclasses.replace(alone[0], name=f"{baseline} plain", batching=False, shed=False)
    return [*alone, plain, *(Setting(name=word, policy=word, paths=kept) for word in POLICIES)]


def ratios(runs: Sequence[Run], numerator: str, denominator: str) -> list[float]:
    """Correct rows a second of two settings in the runs of the same seed, one over the other."""
    found = {(run.setting, run.seed): run.summary.correct_rows_per_s for run in runs}
    seeds = sorted({run.seed for run in runs})
    return [
        found[numerator, seed] / found[denominator, seed] if found[denominator, seed] else float("inf")
        for seed in seeds
    ]


def best_single(runs: Sequence[Run], singles: Sequence[str]) -> str:
    """The single path of the largest median of correct rows a second."""

    def median(name: str) -> float:
        return statistics.median(run.summary.correct_rows_per_s for run in runs if run.setting == name)

    return max(singles, key=median)


def table(runs: Sequence[Run], settings: Sequence[Setting]) -> str:
    """The runs of one target and load, a line a setting."""
    lines = ["| setting | correct rows/s | in target | shed | late | p50, ms | p99, ms | accuracy | paths |"]
    lines.append("|---" * 9 + "|")
    for setting in settings:
        own = [run.summary for run in runs if run.setting == setting.name]
        shares: dict[str, list[float]] = {}
        for summary in own:
            for name, share in summary.shares.items():
                shares.setdefault(name, []).append(share)
        used = {name: sum(each) / len(own) for name, each in shares.items()}
        several = len(setting.paths) > 1
        words = ", ".join(f"{name} {share:.0%}" for name, share in used.items() if share >= 0.005)
        cells = [
            setting.name,
            spread([s.correct_rows_per_s for s in own], ",.0f"),
            f"{sum(s.served - s.late for s in own) / sum(s.queries for s in own):.1%}",
            f"{sum(s.shed for s in own) / sum(s.queries for s in own):.1%}",
            f"{sum(s.late for s in own) / sum(s.queries for s in own):.1%}",
            f"{statistics.median(s.p50_ms for s in own):.1f}",
            f"{statistics.median(s.p99_ms for s in own):.1f}",
            f"{statistics.median(s.accuracy for s in own):.4f}",
            words if several else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def headlines(runs: Sequence[Run], settings: Sequence[Setting], baseline: str) -> list[str]:
    """Ratios of ``multi`` over the rest, at one target and load."""
    best = best_single(runs, singles_of(settings))
    target_ms, multiple = runs[0].target_ms, runs[0].multiple
    where = f"at {target_ms:g} ms and {multiple:g}x"
    lines = [
        f"{where}: multi over {label}: {spread(ratios(runs, 'multi', name))}"
        for label, name in (
            (baseline, baseline),
            (f"{baseline} plain", f"{baseline} plain"),
            (f"the best single path ({best})", best),
            ("fastest", "fastest"),
            ("greedy", "greedy"),
            ("random", "random"),
        )
    ]
    failed = sum(run.summary.failed for run in runs)
    if failed:
        lines.append(f"{where}: {failed:,} queries FAILED")
    lag = max(run.lag_p99_ms for run in runs)
    lines.append(f"{where}: lag of the client, p99 of the worst run: {lag:.2f} ms")
    return lines


def verdicts(runs: Sequence[Run], settings: Sequence[Setting], baseline: ServingPath) -> list[Verdict]:
    """The goals of ``multi`` over all targets and loads; those at 10 ms only if that was measured."""
    parts: dict[tuple[float, float], list[Run]] = {}
    for run in runs:
        parts.setdefault((run.target_ms, run.multiple), []).append(run)
    found = []
    if at_goal := {multiple: part for (ms, multiple), part in parts.items() if ms == GOAL_MS}:
        largest = max(at_goal)
        got = statistics.median(ratios(at_goal[largest], "multi", baseline.name))
        told = f"{got:.3f}x {baseline.name} at {GOAL_MS:g} ms and {largest:g}x (at least {GOAL:g}x)"
        found.append(Verdict("goal", told, got >= GOAL))
        reached = {multiple: _accuracy(part) for multiple, part in at_goal.items()}
        # Without a row in time there is no accuracy: less than any.
        least = min(reached, key=lambda m: -math.inf if math.isnan(reached[m]) else reached[m])
        told = (
            f"{reached[least]:.6f} at {GOAL_MS:g} ms and {least:g}x, where it is least "
            f"(at least {baseline.accuracy:.6f}, {baseline.name}'s)"
        )
        found.append(Verdict("accuracy", told, reached[least] >= baseline.accuracy - ROUNDING))
    singles = singles_of(settings)
    beside = {(*at, name): ratios(part, "multi", name) for at, part in parts.items() for name in singles}
    worst = min(beside, key=lambda place: statistics.median(beside[place]))
    target_ms, multiple, name = worst
    told = (
        f"{spread(beside[worst], '.3f')}x {name} at {target_ms:g} ms and {multiple:g}x, where it is least "
        "(median at least 1x any single path)"
    )
    return [*found, Verdict("single", told, statistics.median(beside[worst]) >= 1)]


def singles_of(settings: Sequence[Setting]) -> list[str]:
    """Settings that are one path alone, with the server's batching and shedding."""
    return [setting.name for setting in settings if setting.policy.startswith("fixed:") and setting.shed]


def _accuracy(runs: Sequence[Run]) -> float:
    """Of ``multi``, the median over seeds; nan if some seed has no row in time."""
    reached = [run.summary.accuracy for run in runs if run.setting == "multi"]
    return math.nan if any(map(math.isnan, reached)) else statistics.median(reached)


async def measure(config: ThroughputConfig, paths: PathSet, client: LoadClientConfig) -> list[Run]:
    """Every run, printed as it is done."""
    baseline = baseline_of(paths, config.baseline)
    settings = settings_of(paths, baseline.name)
    accuracies = {name: path.accuracy for name, path in all_paths(paths).items()}
    targets = [float(word) for word in config.targets_ms.split(",")]
    multiples = [float(word) for word in config.multiples.split(",")]
    count = len(targets) * len(multiples) * config.seeds * len(settings)
    seconds = count * (config.run_s + config.warmup_s)
    print(f"{len(settings)} settings, {count:,} runs, about {seconds / 60 + 1:.0f} minutes", flush=True)
    runs: list[Run] = []
    guess = first_guess(baseline, paths.device(baseline.device).slots, config.mean_rows)
    async with transport(config.transport, paths, settings, client) as offered:
        for target_ms in targets:
            print(f"\n## {target_ms:g} ms", flush=True)
            rate = config.rate
            if rate is None:
                rate, idle = await _sustained(config, offered, settings[0], target_ms, guess)
                words = "sustains" if idle >= LEAST else "sustains no rate at this target; by its profile"
                print(
                    f"\n{baseline.name} {words} {rate:,.0f} queries/s, "
                    f"{rate * config.mean_rows:,.0f} rows/s ({idle:.1%} in target when nearly idle)",
                    flush=True,
                )
            for multiple in multiples:
                part = []
                for seed in range(config.seeds):
                    # Every setting comes early in some seed and late in another.
                    turned = settings[seed * 3 % len(settings) :] + settings[: seed * 3 % len(settings)]
                    for setting in turned:
                        load = _load(config, rate * multiple, target_ms, seed)
                        part.append(await _run(config, offered, setting, load, multiple, accuracies))
                runs += part
                print(f"\n### {multiple:g}x: {rate * multiple:,.0f} queries/s\n\n{table(part, settings)}\n")
                print("\n".join(headlines(part, settings, baseline.name)), flush=True)
    return runs


async def _sustained(
    config: ThroughputConfig, offered: Transport, setting: Setting, target_ms: float, guess: float
) -> tuple[float, float]:
    async def probe(rate: float) -> float:
        load = _load(config, rate, target_ms, 99, tried_s(rate, config.probe_s))
        return in_target_share(counted(await offered.offer(setting, load), config.warmup_s))

    return await sustainable_rate(probe, guess)


def _load(
    config: ThroughputConfig, rate: float, target_ms: float, seed: int, run_s: float | None = None
) -> LoadConfig:
    return LoadConfig(
        rate=rate,
        duration_s=config.warmup_s + (config.run_s if run_s is None else run_s),
        mean_rows=config.mean_rows,
        sigma=config.sigma,
        target_ms=target_ms,
        seed=seed,
    )


async def _run(
    config: ThroughputConfig,
    offered: Transport,
    setting: Setting,
    load: LoadConfig,
    multiple: float,
    accuracies: dict[str, float],
) -> Run:
    driven = await offered.offer(setting, load)
    lags = sorted(driven.lags_s)
    return Run(
        target_ms=load.target_ms,
        multiple=multiple,
        rate=load.rate,
        seed=load.seed,
        setting=setting.name,
        summary=summary_of(driven, load, accuracies, config.warmup_s),
        lag_p99_ms=1e3 * lags[int(0.99 * (len(lags) - 1))] if lags else 0.0,
    )


def values_of(config: Any, runs: Sequence[Any]) -> dict[str, Any]:
    """Everything, as JSON values."""
    settings = {name: str(value) for name, value in dataclasses.asdict(config).items()}
    return {"config": settings, "machine": machine(), "runs": [dataclasses.asdict(run) for run in runs]}


def main(words: Sequence[str]) -> int:
    """Run the benchmark; returns its exit status."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        print(describe("serving_throughput", ThroughputConfig))
        return 0
    try:
        config = from_words(ThroughputConfig, words, "serving_throughput")
        if config.quick:
            config = dataclasses.replace(
                config, seeds=1, targets_ms="10,50", multiples="1,3", run_s=1.0, probe_s=0.7
            )
        paths = read_paths(config.paths)
        baseline = baseline_of(paths, config.baseline)
        client = LoadClientConfig(data=config.data, mean_rows=config.mean_rows, sigma=config.sigma)
        print(f"{machine()}\n{config}", flush=True)
        begin = time.monotonic()
        runs = uvloop.run(measure(config, paths, client))
    except (ValueError, NotReady) as error:
        print(error, file=sys.stderr)
        return 2
    if config.out is not None:
        config.out.write_text(json.dumps(values_of(config, runs), indent=1) + "\n")
    judged = verdicts(runs, settings_of(paths, baseline.name), baseline)
    print("\n" + "\n".join(verdict.line for verdict in judged))
    print(f"\ntook {(time.monotonic() - begin) / 60:.1f} minutes")
    return 0 if all(verdict.met for verdict in judged) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
