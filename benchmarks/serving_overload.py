"""A server at twice the load that it sustains: is every query answered, is memory flat, does it recover.

    make bench SCRIPT=serving_overload ARGS="paths=paths.json data=FOLDER"
    make bench SCRIPT=serving_overload ARGS="paths=paths.json data=FOLDER minutes=0.5 quiet_s=10"

Finds the rate that the server sustains (99 % of what it answers in time when nearly idle), then offers half
of it for ``quiet_s`` seconds, ``factor`` times it for ``minutes``, and half of it again, in one open loop.
Resident memory of the server and its workers is read every second. Bars:

- every query is answered: with scores, or with 503 and the reason why it was shed;
- memory is flat after the first fifth of the overload: largest over least at most 1.10, and the straight line
  through it rises by at most 3 % over all of it;
- the 99th percentile of a window of 1 s is back within 1.5 times that of before within 5 s of the drop.

Exit status 1 if a bar is missed, 2 on a mistake or if the server does not start. Client, server and
workers share the machine's cores.
"""

import asyncio
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import uvloop
from serving_runs import (
    NotReady,
    Server,
    Verdict,
    first_guess,
    in_target_share,
    machine,
    sustainable_rate,
    tried_s,
    windows_p99_ms,
)

from tightrec.formats.settings import from_words
from tightrec.formats.usage import describe
from tightrec.serving.load.arrivals import LoadConfig, arrivals
from tightrec.serving.load.client import metadata, offer
from tightrec.serving.load.config import LoadClientConfig
from tightrec.serving.load.open_loop import Driven
from tightrec.serving.load.requests import InferRequests
from tightrec.serving.load.rows import requests_of
from tightrec.serving.outcomes import Outcome, percentile
from tightrec.serving.paths import read_paths

RECOVERED, RECOVERY_S, MOST_RATIO, MOST_GROWTH = 1.5, 5.0, 1.10, 0.03
SETTLED = 0.2
"""Share of the overload after which memory is looked at."""


@dataclass(frozen=True, kw_only=True)
class OverloadConfig:
    """The words of this script."""

    paths: Path
    """File of paths that ``explore`` wrote on this machine."""

    data: Path
    """Prepared folder whose test rows are sent."""

    policy: str = "multi"
    """Of the server."""

    target_ms: float = 20.0
    """Latency target of every query."""

    minutes: float = 10.0
    """Length of the overload."""

    factor: float = 2.0
    """Overload, in multiples of what the server sustains."""

    rate: float | None = None
    """Queries a second that the server sustains; null: they are found first."""

    quiet_s: float = 30.0
    """Length of the half load before and after, in seconds."""

    probe_s: float = 3.0
    """Length of each try of a rate."""

    mean_rows: float = 128.0
    """Of a query; sizes are lognormal."""

    seed: int = 0
    """Of arrivals, sizes and rows."""

    out: Path | None = None
    """Where every figure is written as JSON; null: nowhere."""


class Phases(NamedTuple):
    """Seconds at which the load changes, and the queries."""

    overload: float
    drop: float
    end: float
    queries: list[tuple[float, int]]


def phases_of(config: OverloadConfig, rate: float) -> Phases:
    """Half the rate, ``factor`` times it, half of it."""
    long_s = 60 * config.minutes
    queries: list[tuple[float, int]] = []
    start = 0.0
    for place, (share, seconds) in enumerate(
        ((0.5, config.quiet_s), (config.factor, long_s), (0.5, config.quiet_s))
    ):
        load = LoadConfig(
            rate=share * rate, duration_s=seconds, mean_rows=config.mean_rows, seed=3 * config.seed + place
        )
        queries += [(start + arrived, rows) for arrived, rows in arrivals(load)]
        start += seconds
    return Phases(config.quiet_s, config.quiet_s + long_s, start, queries)


def answered(driven: Driven, sent: int) -> Verdict:
    """Whether every query was served or shed with a reason."""
    failed = sum(driven.failures.values())
    good = sum(one.finished is not None or one.shed is not None for one in driven.outcomes)
    worst = f" ({driven.failures.most_common(1)[0][0]})" if failed else ""
    told = f"{good:,} of {sent:,} queries served or shed, {failed:,} failed{worst}"
    return Verdict("answered", told, good == sent and not failed)


Samples = Sequence[tuple[float, dict[int, int]]]
"""Second, and bytes by process; the server is the first of them."""


def settled(samples: Samples, phases: Phases) -> Samples:
    """Those that memory is judged by."""
    since = phases.overload + SETTLED * (phases.drop - phases.overload)
    return [(at, sizes) for at, sizes in samples if since <= at <= phases.drop]


def flat(samples: Samples, phases: Phases) -> Verdict:
    """Whether memory stays where it is during the overload."""
    kept = [(at, sum(sizes.values())) for at, sizes in settled(samples, phases)]
    if len(kept) < 3:
        return Verdict("memory", f"only {len(kept)} samples", False)
    at, size = np.array(kept, dtype=float).T
    ratio = float(size.max() / size.min())
    slope = float(np.polyfit(at - at[0], size, 1)[0])
    growth = slope * float(at[-1] - at[0]) / float(size.mean())
    told = (
        f"{size.min() / 1e6:,.0f} to {size.max() / 1e6:,.0f} MB over {at[-1] - at[0]:,.0f} s, "
        f"largest/least {ratio:.3f} (at most {MOST_RATIO}), slope {60 * slope / 1e6:+.2f} MB/min, "
        f"{growth:+.1%} in all (at most {MOST_GROWTH:.0%})"
    )
    return Verdict("memory", told, ratio <= MOST_RATIO and growth <= MOST_GROWTH)


def process_lines(samples: Samples, phases: Phases) -> list[str]:
    """How much each process held when memory had settled, and at the end of the overload."""
    kept = settled(samples, phases)
    numbers = list(dict.fromkeys(number for _, sizes in kept for number in sizes))
    lines = []
    for place, number in enumerate(numbers):
        own = [sizes[number] / 1e6 for _, sizes in kept if number in sizes]
        name = f"process {number}, " + ("a child" if place else "the server")
        lines.append(f"{name:<28}{own[0]:,.1f} to {own[-1]:,.1f} MB, at most {max(own):,.1f}")
    return lines


def recovered(outcomes: Sequence[Outcome], phases: Phases) -> Verdict:
    """How long after the drop a window of 1 s is as quick as before the overload."""
    before = _p99_ms(outcomes, 0, phases.overload)
    limit = RECOVERED * before
    windows = windows_p99_ms(outcomes, phases.drop, phases.end)
    back = next((end - phases.drop for end, p99_ms in windows if p99_ms <= limit), None)
    told = f"p99 {before:.2f} ms before, within {limit:.2f} ms " + (
        f"{back:.2f} s after the drop (at most {RECOVERY_S:g} s)" if back is not None else "never again"
    )
    return Verdict("recovery", told, back is not None and back <= RECOVERY_S)


def phase_lines(outcomes: Sequence[Outcome], phases: Phases) -> list[str]:
    """Figures of each part of the load."""
    lines = []
    for name, start, stop in (
        ("before", 0.0, phases.overload),
        ("overload", phases.overload, phases.drop),
        ("after", phases.drop, phases.end),
    ):
        part = [one for one in outcomes if start <= one.arrived < stop]
        shed = sum(one.shed is not None for one in part)
        lines.append(
            f"{name:<10}{len(part):>9,} queries, {len(part) / (stop - start):,.0f}/s, in target "
            f"{in_target_share(part):.1%}, shed {shed / max(1, len(part)):.1%}, "
            f"p99 {_p99_ms(outcomes, start, stop):.2f} ms"
        )
    return lines


def _p99_ms(outcomes: Sequence[Outcome], start: float, stop: float) -> float:
    return 1e3 * percentile(
        sorted(
            one.latency_s for one in outcomes if start <= one.arrived < stop and one.latency_s is not None
        ),
        0.99,
    )


async def measure(config: OverloadConfig, server: Server, guess: float) -> tuple[Driven, Phases, Samples]:
    """Find the rate, offer the load, read the memory."""
    client = LoadClientConfig(
        url=server.url,
        data=config.data,
        target_ms=config.target_ms,
        mean_rows=config.mean_rows,
        connections=1000,
    )
    requests = requests_of(client, await metadata(client))
    rate = config.rate or await _rate(config, client, requests, guess)
    print(f"sustained: {rate:,.0f} queries/s, {rate * config.mean_rows:,.0f} rows/s", flush=True)
    phases = phases_of(config, rate)
    samples: list[tuple[float, dict[int, int]]] = []

    async def watch() -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while True:
            sizes = await asyncio.to_thread(server.resident_bytes)
            samples.append((loop.time() - begin, sizes))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    try:
        driven = await offer(client, requests, phases.queries)
    finally:
        watching.cancel()
    return driven, phases, samples


async def _rate(
    config: OverloadConfig, client: LoadClientConfig, requests: InferRequests, guess: float
) -> float:
    async def probe(rate: float) -> float:
        seconds = tried_s(rate, config.probe_s)
        load = LoadConfig(rate=rate, duration_s=seconds, mean_rows=config.mean_rows, seed=99)
        return in_target_share((await offer(client, requests, arrivals(load))).outcomes)

    return (await sustainable_rate(probe, guess))[0]


def main(words: Sequence[str]) -> int:
    """Run the benchmark; returns its exit status."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        print(describe("serving_overload", OverloadConfig))
        return 0
    try:
        config = from_words(OverloadConfig, words, "serving_overload")
        paths = read_paths(config.paths)
        quickest = min(paths.paths, key=lambda path: path.threads / path.profile.rows_per_s)
        guess = first_guess(quickest, paths.device(quickest.device).slots, config.mean_rows)
        print(f"{machine()}\n{config}", flush=True)
        with Server(f"paths={config.paths}", f"policy={config.policy}", "follow=false") as server:
            driven, phases, samples = uvloop.run(measure(config, server, guess))
    except (ValueError, NotReady) as error:
        print(error, file=sys.stderr)
        return 2
    verdicts = [
        answered(driven, len(phases.queries)),
        flat(samples, phases),
        recovered(driven.outcomes, phases),
    ]
    lag_ms = 1e3 * percentile(sorted(driven.lags_s), 0.99)
    lines = [*phase_lines(driven.outcomes, phases), f"client    lag p99 {lag_ms:.2f} ms", ""]
    print("\n".join([*lines, *process_lines(samples, phases), ""]))
    print("\n".join(verdict.line for verdict in verdicts))
    if config.out is not None:
        windows = windows_p99_ms(driven.outcomes, 0, phases.end, step_s=1.0)
        values = {
            "config": {name: str(value) for name, value in dataclasses.asdict(config).items()},
            "machine": machine(),
            "phases_s": [phases.overload, phases.drop, phases.end],
            "memory_bytes": samples,
            "p99_ms": windows,
            "verdicts": [verdict._asdict() for verdict in verdicts],
        }
        config.out.write_text(json.dumps(values, indent=1) + "\n")
    return 0 if all(verdict.met for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
