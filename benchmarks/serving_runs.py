"""What the serving benchmarks share: servers as processes, the rate that one sustains, figures of windows."""

import ctypes
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, Self

from tightrec.serving.load.arrivals import LoadConfig
from tightrec.serving.load.open_loop import Driven
from tightrec.serving.outcomes import Outcome, Summary, percentile, summarise
from tightrec.serving.paths import PathSet, ServingPath

_PR_SET_PDEATHSIG = 1

START_S, STOP_S = 180.0, 60.0
"""Most that a server may take to be ready, and to drain."""


class NotReady(RuntimeError):
    """A server that did not start; a sentence."""


class Verdict(NamedTuple):
    """One bar."""

    name: str
    told: str
    met: bool

    @property
    def line(self) -> str:
        """As it is printed."""
        return f"{self.name:<10}{self.told}: {'met' if self.met else 'MISSED'}"


class Server:
    """``python -m tightrec.serving serve`` in a process group of its own; a context manager.

    Args:
        words: its settings but for the port.

    Raises:
        NotReady: it ended, or was not ready in time; holds the last line that it wrote.
    """

    def __init__(self, *words: str) -> None:
        self._words = words
        self.url = ""

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", "tightrec.serving", "serve", "port=0", *self._words]
        self._process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        until = time.monotonic() + START_S
        while not self.url:
            self.url = url_in(self.log)
            if self._process.poll() is not None or time.monotonic() > until:
                told = self.log.strip().splitlines() or ["it wrote nothing"]
                self.__exit__()
                raise NotReady(f"the server does not start: {told[-1]} (`{shlex.join(command)}`)")
            time.sleep(0.1)
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._log.close()

    @property
    def log(self) -> str:
        """What it wrote so far."""
        return Path(f"/proc/self/fd/{self._log.fileno()}").read_text(errors="replace")

    def resident_bytes(self) -> dict[int, int]:
        """Resident memory of the server and its workers, by process id."""
        import psutil

        found = {}
        me = psutil.Process(self._process.pid)
        for process in (me, *me.children(recursive=True)):
            try:
                found[process.pid] = process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return found


def _end_with_parent() -> None:
    """A benchmark that is killed, by whatever signal, leaves no server behind (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def url_in(log: str) -> str:
    """The address in what a server wrote; empty if there is none."""
    words = [word for word in log.split() if word.startswith("http://")]
    return words[0].rstrip(".,/") if words else ""


Probe = Callable[[float], Awaitable[float]]
"""Share of queries that are answered within their target, at so many queries a second."""

SHARE, CLOSE, STEP = 0.99, 1.05, 1.6
LEAST = 0.5
"""In target when nearly idle: with less, nothing is sustained, and 99 % of it tells noise."""

_MOST_STEPS = 16


async def sustainable_rate(probe: Probe, guess: float) -> tuple[float, float]:
    """The largest rate at which 99 % of what is in target at a twentieth of ``guess`` still is.

    Relative to the nearly idle server, since a heavy tail of sizes holds queries that no path answers in
    time. A rate counts as sustained if it is in one of two tries: a hiccup of the machine is not its fault.

    Returns:
        The rate, to 5 %, and the share in target at a twentieth of the guess. ``guess`` itself where less
        than half is in target even then: no rate is sustained.
    """
    idle = max([await probe(guess / 20), await probe(guess / 20)])
    if idle < LEAST:
        return guess, idle

    async def holds(rate: float) -> bool:
        return await probe(rate) >= SHARE * idle or await probe(rate) >= SHARE * idle

    low, high = guess / 20, 0.0
    rate = guess
    for _ in range(_MOST_STEPS):
        if await holds(rate):
            low = rate
        else:
            high = rate
        if high and high / low <= CLOSE:
            break
        rate = (low * high) ** 0.5 if high else low * STEP
    return low, idle


def first_guess(path: ServingPath, slots: int, mean_rows: float) -> float:
    """Queries a second that all slots score by the profile of ``path``, one query a batch."""
    return slots // path.threads * 1e3 / path.profile.expected_ms(max(1, round(mean_rows)))


def tried_s(rate: float, probe_s: float) -> float:
    """Seconds for which to try a rate: long enough for some 200 queries, up to five times ``probe_s``."""
    return min(max(probe_s, 200 / rate), 5 * probe_s)


def counted(driven: Driven, warmup_s: float) -> list[Outcome]:
    """Outcomes of what arrived after the warm-up."""
    return [outcome for outcome in driven.outcomes if outcome.arrived >= warmup_s]


def in_target_share(outcomes: Sequence[Outcome]) -> float:
    """Of all queries; 0 of none."""
    return sum(outcome.in_target for outcome in outcomes) / max(1, len(outcomes))


def summary_of(driven: Driven, load: LoadConfig, accuracies: Mapping[str, float], warmup_s: float) -> Summary:
    """Figures of what arrived after the warm-up, within ``load.duration_s``, warm-up included."""
    return summarise(counted(driven, warmup_s), accuracies, load.duration_s - warmup_s)


def windows_p99_ms(
    outcomes: Sequence[Outcome], start: float, stop: float, *, width_s: float = 1.0, step_s: float = 0.25
) -> list[tuple[float, float]]:
    """End and 99th percentile of the latencies (ms) of windows of arrival within ``start`` to ``stop``.

    A window without a served query is left out.
    """
    served = sorted((one.arrived, one.latency_s) for one in outcomes if one.latency_s is not None)
    found = []
    for place in range(round((stop - start - width_s) / step_s) + 1):
        begin = start + place * step_s
        latencies = sorted(s for arrived, s in served if begin <= arrived < begin + width_s)
        if latencies:
            found.append((begin + width_s, 1e3 * percentile(latencies, 0.99)))
    return found


def all_paths(paths: PathSet) -> dict[str, ServingPath]:
    """Kept and dropped paths on devices of this machine, by name."""
    here = {device.name for device in paths.devices if not device.recorded}
    both = [*paths.paths, *(path for path, _ in paths.dropped)]
    return {path.name: path for path in both if path.device in here}


def baseline_of(paths: PathSet, named: str | None) -> ServingPath:
    """The path that others are compared with: float32 tables on the fewest threads, unless it is named.

    Raises:
        ValueError: there is none.
    """
    known = all_paths(paths)
    if named is not None:
        if named not in known:
            raise ValueError(f"there is no path {named!r}, only {', '.join(known)}.")
        return known[named]
    tables = [p for p in known.values() if p.representation == "table" and p.precision == "fp32"]
    if not tables:
        raise ValueError("no path has float32 tables, kept or dropped. Name a path with baseline=NAME.")
    return min(tables, key=lambda path: path.threads)


def machine() -> str:
    """Two lines: where this was measured, and with which versions."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    processor = names[0].partition(":")[2].strip() if names else platform.machine()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "aiohttp", "uvloop", "numpy"))
    return (
        f"{processor}, {len(os.sched_getaffinity(0))} cores for clients and workers together\n"
        f"Python {platform.python_version()}, {libraries}"
    )


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """min / median / max."""
    ordered = sorted(values)
    return " / ".join(format(value, form) for value in (ordered[0], percentile(ordered, 0.5), ordered[-1]))
