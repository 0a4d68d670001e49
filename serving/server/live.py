"""Counts of the last seconds, for the page: a ring of one-second histograms, so memory is constant.

Latencies stand in buckets whose bounds grow by 4 %: percentiles are that exact.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

SECONDS = 64
"""Length of the ring; windows may be a few seconds shorter."""

_LOWEST_MS, _GROWTH, _BUCKETS = 0.02, 1.04, 420


class Live:
    """What happened in the last minute.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._second = np.full(SECONDS, -1, np.int64)
        self._latencies = np.zeros((SECONDS, _BUCKETS), np.int64)
        self._rows: list[Counter[str]] = [Counter() for _ in range(SECONDS)]
        self._queries: list[Counter[str]] = [Counter() for _ in range(SECONDS)]
        self._shed: list[Counter[str]] = [Counter() for _ in range(SECONDS)]
        self._late = np.zeros(SECONDS, np.int64)

    def served(self, path: str, rows: int, latency_s: float, in_target: bool) -> None:
        """A query was answered with scores."""
        place = self._now()
        self._latencies[place, _bucket(latency_s * 1e3)] += 1
        self._rows[place][path] += rows
        self._queries[place][path] += 1
        self._late[place] += not in_target

    def shed(self, reason: str) -> None:
        """A query was refused."""
        self._shed[self._now()][reason] += 1

    def window(self, seconds: int) -> dict[str, Any]:
        """Rates a second, percentiles in ms and shares of rows by path, over the last whole ``seconds``."""
        now = int(self._clock())
        places = np.flatnonzero((self._second < now) & (self._second >= now - seconds))
        length = max(min(seconds, now - int(self._began)), 1)
        rows, queries, shed = (
            sum((counts[place] for place in places), Counter[str]())
            for counts in (self._rows, self._queries, self._shed)
        )
        served, total = sum(queries.values()), sum(rows.values())
        refused = sum(shed.values())
        p50, p95, p99 = _percentiles(self._latencies[places].sum(0), (0.5, 0.95, 0.99))
        return {
            "seconds": length,
            "queries_per_s": served / length,
            "rows_per_s": total / length,
            "p50_ms": p50,
            "p95_ms": p95,
            "p99_ms": p99,
            "late": int(self._late[places].sum()),
            "shed": dict(shed),
            "shed_share": refused / (served + refused) if served + refused else 0.0,
            "shares": {path: count / total for path, count in sorted(rows.items())} if total else {},
        }

    def _now(self) -> int:
        second = int(self._clock())
        place = second % SECONDS
        if self._second[place] != second:
            self._second[place] = second
            self._latencies[place] = 0
            self._late[place] = 0
            for counts in (self._rows, self._queries, self._shed):
                counts[place] = Counter()
        return place


def _bucket(ms: float) -> int:
    if ms <= _LOWEST_MS:
        return 0
    return min(int(math.log(ms / _LOWEST_MS, _GROWTH)) + 1, _BUCKETS - 1)


def _percentiles(counts: NDArray[np.int64], shares: tuple[float, ...]) -> list[float | None]:
    """The middle of the bucket that holds each share; None: nothing was counted."""
    sums = np.cumsum(counts)
    if not len(sums) or not sums[-1]:
        return [None] * len(shares)
    places = np.searchsorted(sums, np.ceil(np.array(shares) * sums[-1]))
    return [float(_LOWEST_MS * _GROWTH ** (int(place) - 0.5)) for place in places]
