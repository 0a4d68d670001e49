"""The load generator: arrivals, sizes, settings, and what it reports."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightrec.serving.load.arrivals import LoadConfig, arrivals, rate_at, size_shares
from tightrec.serving.load.config import LoadClientConfig
from tightrec.serving.load.open_loop import Driven
from tightrec.serving.load.summary import report_of, table
from tightrec.serving.outcomes import Outcome


def times_of(**settings: Any) -> np.ndarray:
    return np.array([arrived for arrived, _ in arrivals(LoadConfig(**settings))])


# Arrivals


@pytest.mark.parametrize("pattern", ["steady", "diurnal", "burst"])
def test_the_same_seed_gives_the_same_queries_and_a_longer_run_continues_a_shorter(pattern: Any) -> None:
    short = arrivals(LoadConfig(pattern=pattern, rate=2000, duration_s=4, seed=3))
    long = arrivals(LoadConfig(pattern=pattern, rate=2000, duration_s=9, seed=3))
    assert short == arrivals(LoadConfig(pattern=pattern, rate=2000, duration_s=4, seed=3))
    assert long[: len(short)] == short
    assert long[len(short)][0] >= 4
    assert short != arrivals(LoadConfig(pattern=pattern, rate=2000, duration_s=4, seed=4))


def test_arrivals_ascend_within_the_duration_and_do_not_depend_on_sizes() -> None:
    times = times_of(rate=3000, duration_s=5)
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert times[-1] < 5
    assert (times == times_of(rate=3000, duration_s=5, sizes="fixed", mean_rows=7)).all()


def test_steady_arrivals_are_poisson() -> None:
    """Mean and variance of counts in windows are equal, and gaps are exponential."""
    times = times_of(rate=1000, duration_s=200)
    counts = np.bincount((times / 0.1).astype(int), minlength=2000)
    assert abs(counts.mean() - 100) < 4 * (100 / 2000) ** 0.5
    assert abs(counts.var() / counts.mean() - 1) < 4 * (2 / 2000) ** 0.5
    gaps = np.sort(np.diff(times)) * 1000
    expected = 1 - np.exp(-gaps)
    apart = np.abs(expected - np.arange(1, len(gaps) + 1) / len(gaps)).max()
    assert apart < 1.95 / len(gaps) ** 0.5


@pytest.mark.parametrize(
    ("settings", "mean"),
    [
        ({"pattern": "diurnal", "period_s": 20, "depth": 1.0}, 500),
        ({"pattern": "diurnal", "period_s": 20, "depth": 0.3}, 500),
        ({"pattern": "burst", "burst_factor": 6, "burst_every_s": 5, "burst_s": 1}, 500 * (4 + 6) / 5),
        ({"pattern": "burst", "burst_factor": 0.5, "burst_every_s": 5, "burst_s": 2}, 500 * (3 + 1) / 5),
    ],
)
def test_the_rate_follows_its_pattern_in_every_second_of_it(settings: dict[str, Any], mean: float) -> None:
    config = LoadConfig(rate=500, duration_s=100, **settings)
    times = times_of(rate=500, duration_s=100, **settings)
    assert abs(len(times) / 100 - mean) < 4 * (mean / 100) ** 0.5
    period = config.period_s if config.pattern == "diurnal" else config.burst_every_s
    counts = np.bincount((times % period).astype(int), minlength=int(period)) / (100 / period)
    fine = np.linspace(0, period, int(period) * 1000, endpoint=False)
    expected = rate_at(config, fine).reshape(int(period), 1000).mean(axis=1)
    assert (np.abs(counts - expected) <= 4.5 * (expected / (100 / period)) ** 0.5 + 1).all()


# Sizes


@pytest.mark.parametrize("mean", [1, 5, 128, 1000])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.5])
def test_lognormal_sizes_have_the_mean_that_was_asked_for(mean: float, sigma: float) -> None:
    config = LoadConfig(mean_rows=mean, sigma=sigma, rate=20_000, duration_s=2)
    shares = size_shares(config)
    rows = np.arange(1, config.max_rows + 1)
    assert shares.sum() == pytest.approx(1)
    assert shares @ rows == pytest.approx(mean, rel=1e-6)
    drawn = np.array([size for _, size in arrivals(config)])
    spread = float(shares @ (rows - mean) ** 2) ** 0.5
    assert drawn.min() >= 1
    assert drawn.max() <= config.max_rows
    assert abs(drawn.mean() - mean) <= 4 * spread / len(drawn) ** 0.5


def test_lognormal_sizes_are_lognormal() -> None:
    """Their logarithms have the deviation that was asked for where rounding and cut hardly matter."""
    config = LoadConfig(mean_rows=300, sigma=0.4)
    shares, logs = size_shares(config), np.log(np.arange(1, config.max_rows + 1))
    centre = shares @ logs
    assert (shares @ (logs - centre) ** 2) ** 0.5 == pytest.approx(0.4, rel=1e-3)
    assert shares @ (logs - centre) ** 3 == pytest.approx(0, abs=1e-3)


def test_fixed_sizes_are_all_the_same() -> None:
    assert {rows for _, rows in arrivals(LoadConfig(sizes="fixed", mean_rows=64))} == {64}
    assert size_shares(LoadConfig(sizes="fixed", mean_rows=64)).argmax() == 63


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"rate": 0}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"duration_s": -1}, "duration_s"),
        ({"mean_rows": 0.5}, "mean_rows"),
        ({"mean_rows": 3000}, "half of max_rows"),
        ({"mean_rows": 1.5, "sizes": "fixed"}, "whole number"),
        ({"mean_rows": 5000, "sizes": "fixed"}, "mean_rows"),
        ({"sigma": 0}, "sigma"),
        ({"max_rows": 0}, "max_rows"),
        ({"target_ms": 3_600_001}, "target_ms=3600001 must be at most 3600000"),
        ({"depth": 1.1}, "depth"),
        ({"burst_s": 11}, "burst_s"),
        ({"seed": -1}, "seed"),
        ({"rate": 1e6, "duration_s": 1e3}, "10^8 queries"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names.replace("^", r"\^")):
        LoadConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"url": "localhost:8000"}, "url"),
        ({"data": Path("a"), "snapshot": Path("b")}, "data and snapshot"),
        ({"zipf": -1}, "zipf"),
        ({"connections": 0}, "connections"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"warmup_s": -1}, "warmup_s"),
        ({"rate": 0}, "rate"),
    ],
)
def test_client_settings_are_refused_by_name(settings: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        LoadClientConfig(**settings)


# What it reports


def outcome(arrived: float, latency: float | None, **values: Any) -> Outcome:
    finished = None if latency is None else arrived + latency
    return Outcome(rows=10, arrived=arrived, target_s=0.01, finished=finished, **({"path": "a"} | values))


def test_figures_leave_the_warm_up_out_and_are_json() -> None:
    driven = Driven(
        outcomes=[
            outcome(0.5, 5.0),
            outcome(1.0, 0.004),
            outcome(1.5, 0.020, path="b"),
            outcome(2.0, None, path=None, shed="late"),
            outcome(2.5, None, path=None),
        ],
        lags_s=[0.0, 0.003],
        most_waiting=2,
        seconds=3.0,
    )
    driven.failures["status 500: x"] += 1
    config = LoadClientConfig(warmup_s=1.0, duration_s=2.0, target_ms=10, connections=2)
    report = report_of(driven, config, {"a": 0.8, "b": 0.9})
    found = report["summary"]
    assert (found["queries"], found["served"], found["in_target"]) == (4, 2, 1)
    assert found["correct_rows_per_s"] == pytest.approx(10 * 0.8 / 2)
    assert found["max_ms"] == pytest.approx(20)
    assert (found["shed"], found["failed"], found["reasons"]) == (1, 1, {"late": 1})
    assert found["shares"] == {"a": 0.5, "b": 0.5}
    json.dumps(report, allow_nan=False)
    text = "\n".join(table(report))
    assert "correct       4 rows/s, accuracy 0.8000" in text
    assert "late 1" in text
    assert "1 x status 500: x" in text
    assert "the client itself was late" in text
    assert "all 2 connections were in use" in text


def test_a_run_without_an_answer_is_told() -> None:
    report = report_of(Driven(), LoadClientConfig(), {})
    json.dumps(report, allow_nan=False)
    assert table(report) == ["no query was answered"]
    shed = Driven(outcomes=[outcome(0.1, None, path=None, shed="full")], seconds=1, lags_s=[0.0])
    text = "\n".join(table(report_of(shed, LoadClientConfig(), {})))
    assert "p50 none" in text
    assert "correct" not in text


def test_an_interrupted_run_counts_rates_over_the_time_it_had() -> None:
    driven = Driven(outcomes=[outcome(0.1, 0.001)], seconds=2.0, interrupted=True, unanswered=3)
    report = report_of(driven, LoadClientConfig(duration_s=100), {})
    assert report["seconds"] == 2
    assert report["summary"]["rows_per_s"] == 5
    assert "interrupted; 3 queries had no answer yet" in table(report)[-1]
