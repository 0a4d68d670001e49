"""What became of queries, and the figures that sum it up: for simulator, load client and benchmarks."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one query.

    ``finished`` is None and ``shed`` None too: it failed, or was never answered.
    """

    rows: int
    """Rows that it asked for."""

    arrived: float
    """Seconds, on the clock of ``finished``: when it was meant to arrive."""

    target_s: float
    """Latency target in seconds, from ``arrived``."""

    finished: float | None = None
    """Seconds; None: no scores came back."""

    path: str | None = None
    """Name of the path that scored it."""

    shed: str | None = None
    """Reason why it was refused, such as ``late`` or ``full``."""

    @property
    def latency_s(self) -> float | None:
        """From arrival to the scores."""
        return None if self.finished is None else self.finished - self.arrived

    @property
    def in_target(self) -> bool:
        """Whether its scores came within the target."""
        # A nanosecond for the rounding of sums of seconds.
        return self.finished is not None and self.finished - self.arrived <= self.target_s + 1e-9


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures over queries: counts, rates over the whole duration, and latencies of the served ones."""

    queries: int
    """All of them."""

    served: int
    """Those with scores, in time or not."""

    late: int
    """Those with scores after their target."""

    shed: int
    """Those refused with a reason."""

    failed: int
    """The rest."""

    rows_per_s: float
    """Rows scored a second, in time or not."""

    in_target_rows_per_s: float
    """Rows scored within the target a second."""

    correct_rows_per_s: float
    """Correct-prediction throughput (MP-Rec, arXiv 2302.10872): rows scored within the target, times the
    accuracy of the path that scored them, a second."""

    accuracy: float
    """Of the rows scored within the target, by their paths' accuracies; nan without such rows."""

    p50_ms: float
    """Median latency; nan if nothing was served, as the next two."""

    p95_ms: float
    """95th percentile."""

    p99_ms: float
    """99th percentile."""

    shares: dict[str, float]
    """Share of the served rows by path; they sum to 1."""

    reasons: dict[str, int] = field(default_factory=dict)
    """Queries shed, by reason."""


def percentile(ascending: list[float], share: float) -> float:
    """The least value that at least ``share`` of ``ascending`` does not exceed; nan if there is none.

    Exact: a value that occurred, from all values, not from a histogram.
    """
    if not ascending:
        return math.nan
    # The small term undoes products such as 0.99 * 100 = 99.00000000000001.
    return ascending[max(0, math.ceil(share * len(ascending) - 1e-9) - 1)]


def summarise(outcomes: Iterable[Outcome], accuracies: Mapping[str, float], duration_s: float) -> Summary:
    """Sum up ``outcomes`` of ``duration_s`` seconds of load.

    A path that ``accuracies`` does not name counts as never right.

    Raises:
        ValueError: ``duration_s`` is not above 0.
    """
    if not duration_s > 0:
        raise ValueError(f"duration_s={duration_s} must be above 0, to divide by.")
    queries = late = failed = rows = in_target_rows = 0
    correct = 0.0
    latencies: list[float] = []
    by_path: dict[str, int] = {}
    reasons: dict[str, int] = {}
    for outcome in outcomes:
        queries += 1
        latency_s = outcome.latency_s
        if latency_s is None:
            if outcome.shed is None:
                failed += 1
            else:
                reasons[outcome.shed] = reasons.get(outcome.shed, 0) + 1
            continue
        latencies.append(latency_s)
        name = outcome.path or ""
        rows += outcome.rows
        by_path[name] = by_path.get(name, 0) + outcome.rows
        if outcome.in_target:
            in_target_rows += outcome.rows
            correct += outcome.rows * accuracies.get(name, 0.0)
        else:
            late += 1
    latencies.sort()
    return Summary(
        queries=queries,
        served=len(latencies),
        late=late,
        shed=sum(reasons.values()),
        failed=failed,
        rows_per_s=rows / duration_s,
        in_target_rows_per_s=in_target_rows / duration_s,
        correct_rows_per_s=correct / duration_s,
        accuracy=correct / in_target_rows if in_target_rows else math.nan,
        p50_ms=1e3 * percentile(latencies, 0.50),
        p95_ms=1e3 * percentile(latencies, 0.95),
        p99_ms=1e3 * percentile(latencies, 0.99),
        shares={name: count / rows for name, count in sorted(by_path.items())} if rows else {},
        reasons=reasons,
    )
