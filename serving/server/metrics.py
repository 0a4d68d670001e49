"""What the server counts, for Prometheus and for the page."""

from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tightrec.serving.server.live import Live

LATENCY_BUCKETS_S = (
    0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2,
    0.5, 1.0, 5.0,
)  # fmt: skip
"""Upper bounds of the latency histogram: fine around the targets of 5 to 50 ms."""


class Metrics:
    """Counts of one server, in a registry of its own.

    Args:
        paths: names of the paths, whose counts are there from the start.
    """

    def __init__(self, paths: list[str]) -> None:
        self.registry = CollectorRegistry()
        self.live = Live()
        self._scored_queries = self._scored_rows = self._scored_batches = self._not_scored = 0
        self._latency_s = 0.0
        self._latency = self._histogram("latency_seconds", "From arrival to scores.", ["path"])
        self._queue = self._histogram("queue_seconds", "From arrival to the start of the batch.", ["path"])
        self._queries = self._counter("queries", "Queries answered with scores.", ["path"])
        self._rows = self._counter("rows", "Rows scored.", ["path"])
        self._late = self._counter("late_queries", "Queries scored after their target.", ["path"])
        self._batches = self._counter("batches", "Batches scored.", ["path"])
        self._shed = self._counter("shed_queries", "Queries refused.", ["reason"])
        self._failed = self._counter("failed_queries", "Queries that a worker could not score.", [])
        self._cache = self._counter(
            "cache_lookups", "Ids looked up in a cache, equal ones each.", ["path", "level", "result"]
        )
        self._requests = self._counter("requests", "HTTP requests.", ["endpoint", "status"])
        self.swaps = self._counter("snapshot_swaps", "New snapshots that were put in service.", [])
        self.refused_swaps = self._counter("snapshot_swaps_refused", "New snapshots that were refused.", [])
        for path in paths:
            for metric in (
                self._latency, self._queue, self._queries, self._rows, self._late, self._batches
            ):  # fmt: skip
                metric.labels(path)
        for reason in ("late", "full"):
            self._shed.labels(reason)

    def watch(self, gauges: "Callable[[], Mapping[str, Gauges]]") -> None:
        """Ask ``gauges`` for what it is now, at every scrape."""
        self.registry.register(_Now(gauges))

    def served(self, path: str, rows: int, latency_s: float, queue_s: float, target_s: float) -> None:
        """A query was answered with scores."""
        in_target = latency_s <= target_s
        self._scored_queries += 1
        self._scored_rows += rows
        self._latency_s += latency_s
        self._latency.labels(path).observe(latency_s)
        self._queue.labels(path).observe(queue_s)
        self._queries.labels(path).inc()
        self._rows.labels(path).inc(rows)
        if not in_target:
            self._late.labels(path).inc()
        self.live.served(path, rows, latency_s, in_target)

    def batch(self, path: str, caches: Mapping[str, Any]) -> None:
        """A batch was scored; ``caches``: ``{level: [hits, misses]}``."""
        self._batches.labels(path).inc()
        self._scored_batches += 1
        for level, (hits, misses) in caches.items():
            self._cache.labels(path, level, "hit").inc(hits)
            self._cache.labels(path, level, "miss").inc(misses)

    def shed(self, reason: str) -> None:
        """A query was refused."""
        self._shed.labels(reason).inc()
        self.live.shed(reason)

    def failed(self) -> None:
        """A query found a worker that could not score it."""
        self._failed.inc()
        self._not_scored += 1

    def request(self, endpoint: str, status: int) -> None:
        """An HTTP request was answered."""
        self._requests.labels(endpoint, str(status)).inc()

    def total(self) -> dict[str, Any]:
        """Counts since the start, as Triton's statistics name them."""
        success = {"count": self._scored_queries, "ns": int(self._latency_s * 1e9)}
        return {
            "inference_count": self._scored_rows,
            "execution_count": self._scored_batches,
            "inference_stats": {"success": success, "fail": {"count": self._not_scored, "ns": 0}},
        }

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, meaning: str, labels: list[str]) -> Counter:
        return Counter(f"tightrec_{name}", meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, labels: list[str]) -> Histogram:
        return Histogram(
            f"tightrec_{name}", meaning, labels, registry=self.registry, buckets=LATENCY_BUCKETS_S
        )


Gauges = tuple[str, tuple[str, ...], Mapping[tuple[str, ...], float]]
"""Meaning, names of the labels, values by labels."""


class _Now(Collector):
    def __init__(self, gauges: Callable[[], Mapping[str, Gauges]]) -> None:
        self._gauges = gauges

    def collect(self) -> Any:
        """Gauges as they are now."""
        for name, (meaning, labels, values) in self._gauges().items():
            family = GaugeMetricFamily(f"tightrec_{name}", meaning, labels=labels)
            for words, value in values.items():
                family.add_metric(words, value)
            yield family
