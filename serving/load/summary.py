"""What a run of the load generator saw, as values and as a table."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tightrec.serving.load.config import LoadClientConfig
from tightrec.serving.load.open_loop import Driven
from tightrec.serving.outcomes import percentile, summarise

FORMAT = "tightrec load"
"""First value of every file of figures."""


def report_of(driven: Driven, config: LoadClientConfig, accuracies: Mapping[str, float]) -> dict[str, Any]:
    """Figures of the queries that arrived after the warm-up, as JSON values (no number: null).

    Args:
        accuracies: share of rows that each path gets right, by name; empty: not known.
    """
    counted = [outcome for outcome in driven.outcomes if outcome.arrived >= config.warmup_s]
    duration_s = config.duration_s
    if driven.interrupted:
        duration_s = min(max(driven.seconds - config.warmup_s, 1e-3), duration_s)
    summary = dataclasses.asdict(summarise(counted, accuracies, duration_s))
    latencies = [one.latency_s for one in counted if one.latency_s is not None]
    lags = sorted(driven.lags_s)
    values = {
        "format": FORMAT,
        "config": {name: _plain(value) for name, value in dataclasses.asdict(config).items()},
        "seconds": duration_s,
        "rows": sum(outcome.rows for outcome in counted),
        "summary": {
            **summary,
            "max_ms": 1e3 * max(latencies, default=math.nan),
            "in_target": sum(outcome.in_target for outcome in counted),
            "unanswered": driven.unanswered,
        },
        "accuracies": dict(accuracies),
        "failures": dict(driven.failures.most_common()),
        "client": {
            "lag_p50_ms": 1e3 * percentile(lags, 0.50),
            "lag_p99_ms": 1e3 * percentile(lags, 0.99),
            "lag_max_ms": 1e3 * max(lags, default=math.nan),
            "most_waiting": driven.most_waiting,
        },
        "interrupted": driven.interrupted,
    }
    return _finite(values)


def table(report: Mapping[str, Any]) -> list[str]:
    """The figures of :func:`report_of` in lines."""
    found, client, config = report["summary"], report["client"], report["config"]
    queries, seconds = found["queries"], report["seconds"]
    if not queries:
        return ["no query was answered"]
    lines = [
        _line("queries", f"{queries:,} in {seconds:.1f} s, {queries / seconds:,.1f} a second"),
        _line("rows", f"{report['rows'] / queries:.1f} a query"),
        _line("served", f"{_share(found['served'], queries)}, {found['rows_per_s']:,.0f} rows/s"),
        _line(
            f"in {config['target_ms']:g} ms",
            f"{_share(found['in_target'], queries)}, {found['in_target_rows_per_s']:,.0f} rows/s",
        ),
    ]
    if report["accuracies"]:
        right = f"{found['correct_rows_per_s']:,.0f} rows/s, accuracy {_number(found['accuracy'], '.4f')}"
        lines.append(_line("correct", right))
    marks = [f"{name} {_number(found[f'{name}_ms'], '.2f')}" for name in ("p50", "p95", "p99", "max")]
    lines.append(_line("latency, ms", ", ".join(marks)))
    reasons = ", ".join(f"{why} {count:,}" for why, count in sorted(found["reasons"].items()))
    lines.append(_line("shed", _share(found["shed"], queries) + (f": {reasons}" if reasons else "")))
    lines.append(_line("failed", _share(found["failed"], queries)))
    lines += [_line("", f"{count:,} x {why}") for why, count in report["failures"].items()][:5]
    shares = ", ".join(f"{name or 'not told'} {share:.1%}" for name, share in found["shares"].items())
    lines.append(_line("rows by path", shares or "none"))
    lag = f"lag p50 {_number(client['lag_p50_ms'], '.2f')}, p99 {_number(client['lag_p99_ms'], '.2f')}, "
    lines.append(_line("client, ms", lag + f"max {_number(client['lag_max_ms'], '.2f')}"))
    if (client["lag_p99_ms"] or 0) > 0.1 * config["target_ms"]:
        lines.append(
            "the client itself was late: latencies hold its lag. Lower the rate, or give it a core of its own"
        )
    if client["most_waiting"] >= config["connections"]:
        lines.append(
            f"all {config['connections']:,} connections were in use: queries waited for one. "
            "Give more connections"
        )
    if report["interrupted"]:
        lines.append(f"interrupted; {found['unanswered']:,} queries had no answer yet and are left out")
    return lines


def _line(name: str, text: str) -> str:
    return f"{name:<14}{text}"


def _share(count: int, queries: int) -> str:
    return f"{count:,} ({count / queries:.1%})"


def _number(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _finite(value: Any) -> Any:
    """``value`` with None for every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
