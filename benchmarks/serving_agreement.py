"""What the simulator predicts against what the server does: the same paths, arrivals and policies.

    make bench SCRIPT=serving_agreement ARGS="paths=paths.json data=FOLDER"
    make bench SCRIPT=serving_agreement ARGS="paths=paths.json data=FOLDER transport=http seeds=1"

Two numbers that profiles do not hold are measured first, on arrivals of their own seed: what a query costs
beside its batch (``overhead``: the median latency of a nearly idle server less the simulated one), and how
much longer batches take when the other slots, the client and the server's event loop are busy too
(``contention``: such that the simulator's in-target rows a second of the cheapest path alone at ``factor``
times its capacity are the server's). Everything else is predicted: every policy at every load, throughput in
target and p99, beside what was measured; that one throughput is shown, but not counted. ``difference`` is
prediction over measurement, less 1; the goal is 15 % in the median over seeds. Exit status 1 if it is missed,
2 on a mistake or if a server does not start.
"""

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop
from serving_runs import NotReady, Verdict, counted, first_guess, machine, spread, sustainable_rate, tried_s
from serving_runs import in_target_share as share_of
from serving_transport import Setting, Transport, Way, transport

from tightrec.formats.settings import from_words
from tightrec.formats.usage import describe
from tightrec.serving.load.arrivals import LoadConfig, arrivals
from tightrec.serving.load.config import LoadClientConfig
from tightrec.serving.outcomes import Outcome, summarise
from tightrec.serving.paths import PathSet, ServingPath, read_paths
from tightrec.serving.scheduling.scheduler import Query
from tightrec.serving.scheduling.simulator import ProfileDurations, simulate

GOAL = 0.15
CALIBRATION_SEED = 1000
MOST_CONTENTION = 4.0
FITTED = "in_target_rows_per_s"
"""The figure that the contention is fitted to, in one cell."""


@dataclass(frozen=True, kw_only=True)
class AgreementConfig:
    """The words of this script."""

    paths: Path
    """File of paths that ``explore`` wrote on this machine."""

    data: Path
    """Prepared folder whose test rows are sent."""

    transport: Way = "direct"
    """``http`` or ``direct``."""

    policies: str = "multi,greedy,fastest"
    """By commas; the cheapest path alone is compared too."""

    multiples: str = "0.3,0.7,1,2"
    """Loads, in multiples of what the cheapest path sustains, by commas."""

    rate: float | None = None
    """Queries a second that count as 1x; null: what is sustained, which is found first."""

    target_ms: float = 20.0
    """Latency target."""

    seeds: int = 3
    """Of arrivals, sizes and rows."""

    run_s: float = 5.0
    """Length of each run that counts."""

    warmup_s: float = 0.5
    """Of each run, before it counts."""

    mean_rows: float = 128.0
    """Of a query; sizes are lognormal."""

    factor: float = 2.0
    """Load of the run that finds the contention."""

    out: Path | None = None
    """Where every figure is written as JSON; null: nowhere."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is compared."""

    in_target_rows_per_s: float
    p50_ms: float
    p99_ms: float
    shed: float


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One run, predicted and measured."""

    policy: str
    multiple: float
    seed: int
    predicted: Figures
    measured: Figures

    def difference(self, name: str) -> float:
        """Prediction over measurement, less 1; inf if only one of them is there, or not 0."""
        guess, seen = getattr(self.predicted, name), getattr(self.measured, name)
        if guess == seen or (math.isnan(guess) and math.isnan(seen)):
            return 0.0
        return guess / seen - 1 if seen and math.isfinite(guess) and math.isfinite(seen) else math.inf


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What profiles do not hold."""

    overhead_s: float = 0.0
    """Of a query, beside its batch."""

    contention: float = 0.0
    """How much longer a batch takes with all other slots busy, as a share."""


def figures_of(outcomes: Sequence[Outcome], warmup_s: float, run_s: float) -> Figures:
    """Of what arrived after the warm-up."""
    kept = [one for one in outcomes if one.arrived >= warmup_s]
    summary = summarise(kept, {}, run_s)
    return Figures(
        in_target_rows_per_s=summary.in_target_rows_per_s,
        p50_ms=summary.p50_ms,
        p99_ms=summary.p99_ms,
        shed=summary.shed / max(1, summary.queries),
    )


def predicted(paths: PathSet, setting: Setting, load: LoadConfig, known: Calibration) -> list[Outcome]:
    """The simulator's outcomes of ``load``."""
    queries = [
        Query(number=number, rows=rows, arrived=arrived, target_s=load.target_ms / 1e3)
        for number, (arrived, rows) in enumerate(arrivals(load))
    ]
    durations = ProfileDurations(seed=load.seed, contention=known.contention)
    done = simulate(
        setting.path_set(paths), setting.scheduler, queries, durations, overhead_s=known.overhead_s
    )
    return list(done.outcomes)


def solved(falls: Callable[[float], float], wanted: float, most: float, steps: int = 20) -> float:
    """Where a falling function of 0 to ``most`` takes the value ``wanted``, or the nearer end."""
    low, high = 0.0, most
    if falls(low) <= wanted:
        return low
    for _ in range(steps):
        middle = (low + high) / 2
        if falls(middle) > wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2


Fitted = tuple[str, float]
"""Policy and load whose throughput in target the contention was fitted to: no prediction."""


def table(pairs: Sequence[Pair], fitted: Fitted) -> str:
    """A line a policy and load; medians over seeds, differences as min / median / max."""
    lines = [
        "| policy | load | in-target rows/s, server | simulator | difference | p99 ms | sim. | difference |"
    ]
    lines.append("|---" * 8 + "|")
    for policy, multiple in dict.fromkeys((pair.policy, pair.multiple) for pair in pairs):
        own = [pair for pair in pairs if (pair.policy, pair.multiple) == (policy, multiple)]
        cells = [policy, f"{multiple:g}x"]
        for name, form in ((FITTED, ",.0f"), ("p99_ms", ".2f")):
            cells.append(format(statistics.median(getattr(pair.measured, name) for pair in own), form))
            cells.append(format(statistics.median(getattr(pair.predicted, name) for pair in own), form))
            told = spread([pair.difference(name) for pair in own], "+.0%")
            cells.append(f"{told} (fitted)" if (policy, multiple, name) == (*fitted, FITTED) else told)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts(pairs: Sequence[Pair], fitted: Fitted) -> list[Verdict]:
    """Whether all policies and loads are within the goal, by figure; what was fitted does not count."""
    found = []
    for name, told in ((FITTED, "in target"), ("p99_ms", "p99")):
        by_load: dict[tuple[str, float], list[float]] = {}
        for pair in pairs:
            if (pair.policy, pair.multiple, name) != (*fitted, FITTED):
                by_load.setdefault((pair.policy, pair.multiple), []).append(pair.difference(name))
        apart = {key: abs(statistics.median(each)) for key, each in by_load.items()}
        if not apart:
            found.append(Verdict(told, "nothing was predicted", False))
            continue
        within = sum(one <= GOAL for one in apart.values())
        policy, multiple = max(apart, key=lambda key: apart[key])
        line = (
            f"{within} of {len(apart)} within {GOAL:.0%}, worst {apart[policy, multiple]:.0%} "
            f"({policy} at {multiple:g}x)"
        )
        found.append(Verdict(told, line, within == len(apart)))
    return found


async def calibrated(
    config: AgreementConfig, paths: PathSet, offered: Transport, cheapest: Setting, rate: float
) -> Calibration:
    """Overhead from a nearly idle run, contention from a saturated one."""
    idle = _load(config, rate / 20, CALIBRATION_SEED, 2 * config.run_s)
    seen = figures_of((await offered.offer(cheapest, idle)).outcomes, config.warmup_s, 2 * config.run_s)
    bare = figures_of(predicted(paths, cheapest, idle, Calibration()), config.warmup_s, 2 * config.run_s)
    overhead_s = max(0.0, (seen.p50_ms - bare.p50_ms) / 1e3)
    full = _load(config, rate * config.factor, CALIBRATION_SEED, config.run_s)
    wanted = figures_of((await offered.offer(cheapest, full)).outcomes, config.warmup_s, config.run_s)

    def throughput(contention: float) -> float:
        known = Calibration(overhead_s=overhead_s, contention=contention)
        outcomes = predicted(paths, cheapest, full, known)
        return figures_of(outcomes, config.warmup_s, config.run_s).in_target_rows_per_s

    contention = solved(throughput, wanted.in_target_rows_per_s, MOST_CONTENTION)
    return Calibration(overhead_s=overhead_s, contention=contention)


async def measure(config: AgreementConfig, paths: PathSet) -> tuple[list[Pair], Calibration]:
    """Every run, measured and predicted."""
    cheapest = _cheapest(paths)
    alone = _alone(cheapest)
    words = [word for word in config.policies.split(",") if word]
    settings = [alone, *(Setting(name=word, policy=word, paths=paths.paths) for word in words)]
    client = LoadClientConfig(data=config.data, mean_rows=config.mean_rows)
    pairs = []
    async with transport(config.transport, paths, settings, client) as offered:

        async def probe(rate: float) -> float:
            driven = await offered.offer(alone, _load(config, rate, CALIBRATION_SEED, tried_s(rate, 2.0)))
            return share_of(counted(driven, config.warmup_s))

        slots, rate = paths.device(cheapest.device).slots, config.rate
        if rate is None:
            rate, _ = await sustainable_rate(probe, first_guess(cheapest, slots, config.mean_rows))
        known = await calibrated(config, paths, offered, alone, rate)
        print(
            f"1x is {rate:,.0f} queries/s, for {cheapest.name} alone; "
            f"overhead {1e3 * known.overhead_s:.2f} ms, contention {known.contention:.2f}",
            flush=True,
        )
        for multiple in map(float, config.multiples.split(",")):
            for seed in range(config.seeds):
                for setting in settings:
                    load = _load(config, rate * multiple, seed, config.run_s)
                    driven = await offered.offer(setting, load)
                    guessed = predicted(paths, setting, load, known)
                    pair = Pair(
                        policy=setting.name,
                        multiple=multiple,
                        seed=seed,
                        predicted=figures_of(guessed, config.warmup_s, config.run_s),
                        measured=figures_of(driven.outcomes, config.warmup_s, config.run_s),
                    )
                    pairs.append(pair)
    return pairs, known


def _cheapest(paths: PathSet) -> ServingPath:
    return min(paths.paths, key=lambda path: path.threads / path.profile.rows_per_s)


def _alone(path: ServingPath) -> Setting:
    return Setting(name=f"fixed:{path.name}", policy=f"fixed:{path.name}", paths=(path,))


def _load(config: AgreementConfig, rate: float, seed: int, run_s: float) -> LoadConfig:
    return LoadConfig(
        rate=rate,
        duration_s=config.warmup_s + run_s,
        mean_rows=config.mean_rows,
        target_ms=config.target_ms,
        seed=seed,
    )


def main(words: Sequence[str]) -> int:
    """Run the benchmark; returns its exit status."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        print(describe("serving_agreement", AgreementConfig))
        return 0
    try:
        config = from_words(AgreementConfig, words, "serving_agreement")
        paths = read_paths(config.paths)
        print(f"{machine()}\n{config}", flush=True)
        pairs, known = uvloop.run(measure(config, paths))
    except (ValueError, NotReady) as error:
        print(error, file=sys.stderr)
        return 2
    if config.out is not None:
        values = {
            "config": {name: str(value) for name, value in dataclasses.asdict(config).items()},
            "machine": machine(),
            "calibration": dataclasses.asdict(known),
            "runs": [dataclasses.asdict(pair) for pair in pairs],
        }
        config.out.write_text(json.dumps(values, indent=1) + "\n")
    fitted = (_alone(_cheapest(paths)).name, config.factor)
    judged = verdicts(pairs, fitted)
    print(f"\n{table(pairs, fitted)}\n")
    print("\n".join(verdict.line for verdict in judged))
    return 0 if all(verdict.met for verdict in judged) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
