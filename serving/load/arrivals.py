"""When queries arrive and how many rows they have, drawn before the run from a seed.

Arrivals are a Poisson process, constant or with a rate that changes with time; sizes have a heavy tail. Both
follow the load model of DeepRecSys (arXiv 2001.02772): Poisson arrivals, lognormal query sizes. The draws of
arrivals and of sizes are independent, so that another distribution of sizes leaves the arrivals as they are.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tightrec.serving.open_inference import MOST_TARGET_MS

Sizes = Literal["lognormal", "fixed"]
"""How rows are distributed over queries."""

Pattern = Literal["steady", "diurnal", "burst"]
"""How the rate changes with time."""

PATTERNS: tuple[Pattern, ...] = get_args(Pattern)

_CHUNK = 4096
_ARRIVALS, _SIZES = 0, 1

Times = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """The load on a server."""

    rate: float = 100.0
    """Queries a second: at all times (steady), on average over a period (diurnal), between bursts (burst)."""

    duration_s: float = 10.0
    """How long queries arrive, in seconds."""

    sizes: Sizes = "lognormal"
    """Rows of a query: lognormal, or mean_rows in each (fixed)."""

    mean_rows: float = 128.0
    """Mean rows of a query, of the distribution as it is drawn from: rounded to whole rows and cut at
    max_rows."""

    sigma: float = 1.0
    """Standard deviation of the logarithm of a query's rows, before it is rounded and cut."""

    max_rows: int = 4096
    """Most rows of a query; what would be larger is drawn again."""

    pattern: Pattern = "steady"
    """How the rate changes: not at all, as a sine (diurnal), or by bursts."""

    period_s: float = 60.0
    """Length of a diurnal day in seconds; it starts at the mean rate, rising."""

    depth: float = 0.5
    """How far the diurnal rate goes above and below its mean, as a share of it: 0 to 1."""

    burst_factor: float = 4.0
    """Rate during a burst, in multiples of ``rate``."""

    burst_every_s: float = 10.0
    """Seconds from the end of a burst to the end of the next one; the first such stretch starts quiet."""

    burst_s: float = 1.0
    """Length of a burst in seconds."""

    target_ms: float = 50.0
    """Within which every query is to be answered, from its arrival on, in milliseconds."""

    seed: int = 0
    """Of arrivals and sizes."""

    def __post_init__(self) -> None:
        for name in ("rate", "duration_s", "period_s", "burst_factor", "burst_every_s", "target_ms"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be a finite number above 0.")
        if self.target_ms > MOST_TARGET_MS:
            raise ValueError(f"target_ms={self.target_ms} must be at most {MOST_TARGET_MS:.0f}.")
        if self.max_rows < 1:
            raise ValueError(f"max_rows={self.max_rows} must be at least 1.")
        if not 1 <= self.mean_rows <= self.max_rows:
            raise ValueError(f"mean_rows={self.mean_rows:g} must lie in 1 to max_rows={self.max_rows}.")
        if self.sizes == "lognormal" and self.mean_rows > max(1, self.max_rows / 2):
            raise ValueError(
                f"mean_rows={self.mean_rows:g} must be at most half of max_rows={self.max_rows} with "
                "sizes=lognormal. Give a larger max_rows, or sizes=fixed."
            )
        if self.sizes == "fixed" and self.mean_rows != int(self.mean_rows):
            raise ValueError(f"mean_rows={self.mean_rows:g} must be a whole number with sizes=fixed.")
        if not 0 < self.sigma <= 5:
            raise ValueError(f"sigma={self.sigma} must be above 0 and at most 5.")
        if not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth} must lie in 0 to 1.")
        if not 0 <= self.burst_s <= self.burst_every_s:
            raise ValueError(f"burst_s={self.burst_s} must lie in 0 to burst_every_s={self.burst_every_s}.")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative.")
        if self.peak_rate * self.duration_s > 1e8:
            given = f"rate={self.rate:g} over duration_s={self.duration_s:g}"
            raise ValueError(f"{given} makes more than 10^8 queries. Lower one of them.")

    @property
    def peak_rate(self) -> float:
        """Largest rate that the pattern reaches, queries a second."""
        if self.pattern == "diurnal":
            return self.rate * (1 + self.depth)
        return self.rate * max(self.burst_factor, 1) if self.pattern == "burst" else self.rate


def rate_at(config: LoadConfig, times: Times) -> Times:
    """Queries a second at ``times`` (seconds from the start, any shape)."""
    if config.pattern == "diurnal":
        return config.rate * (1 + config.depth * np.sin(2 * math.pi * times / config.period_s))
    if config.pattern == "burst":
        quiet = np.mod(times, config.burst_every_s) < config.burst_every_s - config.burst_s
        return config.rate * np.where(quiet, 1.0, config.burst_factor)
    return np.full_like(times, config.rate)


def arrivals(config: LoadConfig) -> list[tuple[float, int]]:
    """Second of arrival, counted from the start, and rows of every query, in order of arrival.

    The same settings give the same queries, and a longer run begins with those of a shorter one. A rate that
    changes is drawn by thinning (Lewis and Shedler 1979): arrivals at the peak rate, each kept with the
    probability rate / peak.
    """
    times = np.concatenate([np.empty(0), *_arrival_chunks(config)])
    return list(zip(times.tolist(), _sizes(config, len(times)), strict=True))


def size_shares(config: LoadConfig) -> NDArray[np.float64]:
    """Probability [max_rows] of a query of 1, 2, ... rows.

    A lognormal number is rounded to whole rows, at least 1, and drawn again above ``max_rows``; its location
    is chosen so that the mean of what remains is ``mean_rows``.
    """
    if config.sizes == "fixed":
        return (np.arange(1, config.max_rows + 1) == config.mean_rows).astype(np.float64)
    rows = np.arange(1, config.max_rows + 1)
    edges = np.log(rows + 0.5)
    # Ten deviations above the cut something is still left below it, and the mean is above half of the cut.
    low, high = -40.0 * config.sigma, edges[-1] + 10.0 * config.sigma
    for _ in range(60):
        middle = (low + high) / 2
        if float(_lognormal_shares(edges, middle, config.sigma) @ rows) < config.mean_rows:
            low = middle
        else:
            high = middle
    return _lognormal_shares(edges, (low + high) / 2, config.sigma)


def _lognormal_shares(edges: Times, location: float, sigma: float) -> Times:
    """Shares of the stretches that end at the logarithms ``edges``, the first from 0 on."""
    normal = NormalDist()
    below = np.array([normal.cdf(z) for z in ((edges - location) / sigma).tolist()])
    return np.diff(below, prepend=0.0) / below[-1]


def _sizes(config: LoadConfig, count: int) -> list[int]:
    if config.sizes == "fixed":
        return [int(config.mean_rows)] * count
    ends = np.cumsum(size_shares(config))
    drawn = np.random.default_rng([config.seed, _SIZES]).random(count)
    # Rounding may leave the last end just below a draw.
    return (np.minimum(np.searchsorted(ends, drawn, side="right"), config.max_rows - 1) + 1).tolist()


def _arrival_chunks(config: LoadConfig) -> Iterator[Times]:
    generator = np.random.default_rng([config.seed, _ARRIVALS])
    peak, start = config.peak_rate, 0.0
    while start < config.duration_s:
        # Two draws a candidate, in chunks of one length: a longer run continues a shorter one.
        times = start + np.cumsum(generator.exponential(1 / peak, _CHUNK))
        kept = generator.random(_CHUNK) * peak < rate_at(config, times)
        start = float(times[-1])
        yield times[kept & (times < config.duration_s)]
