"""The serving benchmarks: finding a rate, windows, verdicts and tables, and that their parts run."""

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_scripts import importable, run_of, three_paths

from tightrec.formats.columns import Bags, Columns
from tightrec.formats.schema import Schema, SparseColumn
from tightrec.serving.load.arrivals import LoadConfig
from tightrec.serving.load.open_loop import Driven
from tightrec.serving.load.requests import InferRequests
from tightrec.serving.outcomes import Outcome


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    with importable() as found:
        yield found


def served(arrived: float, latency_s: float, *, target_s: float = 0.01, path: str = "a") -> Outcome:
    return Outcome(rows=10, arrived=arrived, target_s=target_s, finished=arrived + latency_s, path=path)


def shed(arrived: float) -> Outcome:
    return Outcome(rows=10, arrived=arrived, target_s=0.01, shed="late")


# Finding a rate


@pytest.mark.parametrize("limit", [3.0, 70.0, 100.0, 2345.0])
@pytest.mark.parametrize("idle", [1.0, 0.5])
def test_the_sustained_rate_is_found_to_five_percent(scripts: Any, limit: float, idle: float) -> None:
    tries = []

    async def probe(rate: float) -> float:
        tries.append(rate)
        return idle if rate <= limit else idle * 0.5

    rate, share = asyncio.run(scripts("runs").sustainable_rate(probe, 50.0))
    assert share == idle
    assert limit / 1.05 <= rate <= limit
    assert len(tries) < 40


def test_one_hiccup_does_not_lower_the_rate(scripts: Any) -> None:
    seen: set[float] = set()

    async def probe(rate: float) -> float:
        first = rate not in seen
        seen.add(rate)
        return 1.0 if rate <= 200 and not first else 0.5

    rate, _ = asyncio.run(scripts("runs").sustainable_rate(probe, 100.0))
    assert 190 <= rate <= 200


def test_a_path_that_sustains_nothing_ends_at_the_lowest_rate(scripts: Any) -> None:
    async def probe(rate: float) -> float:
        return 1.0 if rate <= 5 else 0.0

    rate, _ = asyncio.run(scripts("runs").sustainable_rate(probe, 100.0))
    assert rate <= 5.25


def test_a_path_that_is_late_even_when_idle_is_tried_no_further(scripts: Any) -> None:
    tries = []

    async def probe(rate: float) -> float:
        tries.append(rate)
        return 0.49

    assert asyncio.run(scripts("runs").sustainable_rate(probe, 100.0)) == (100.0, 0.49)
    assert len(tries) == 2


def test_slow_rates_are_tried_for_longer(scripts: Any) -> None:
    runs = scripts("runs")
    assert runs.tried_s(1000, 2.0) == 2.0
    assert runs.tried_s(50, 2.0) == 4.0
    assert runs.tried_s(1, 2.0) == 10.0


def test_the_first_guess_is_what_the_profile_says(scripts: Any) -> None:
    paths = three_paths()
    assert scripts("runs").first_guess(paths.path("int8-1"), 2, 128) == pytest.approx(2 * 1e3 / 1.0)
    assert scripts("runs").first_guess(paths.path("int8-2"), 2, 128) == pytest.approx(1e3 / 0.7)


# What is compared


def test_the_baseline_is_found_among_dropped_paths_and_recorded_devices_are_not(scripts: Any) -> None:
    runs, paths = scripts("runs"), three_paths()
    assert runs.baseline_of(paths, None).name == "fp32-1"
    assert runs.baseline_of(paths, "int8-2").name == "int8-2"
    with pytest.raises(ValueError, match="no path 'x', only int8-1, int8-2, fp32-2, fp32-1"):
        runs.baseline_of(paths, "x")
    away = dataclasses.replace(
        paths, devices=tuple(dataclasses.replace(d, recorded=True) for d in paths.devices)
    )
    with pytest.raises(ValueError, match="no path has float32 tables"):
        runs.baseline_of(away, None)


def test_every_kept_path_the_baseline_and_every_policy_are_compared(scripts: Any) -> None:
    settings = scripts("throughput").settings_of(three_paths(), "fp32-1")
    told = [(s.name, s.policy, [p.name for p in s.paths], s.batching, s.shed) for s in settings]
    both = ["int8-1", "int8-2"]
    assert told == [
        ("fp32-1", "fixed:fp32-1", ["fp32-1"], True, True),
        ("int8-1", "fixed:int8-1", ["int8-1"], True, True),
        ("int8-2", "fixed:int8-2", ["int8-2"], True, True),
        ("fp32-1 plain", "fixed:fp32-1", ["fp32-1"], False, False),
        *((word, word, both, True, True) for word in ("fastest", "random", "greedy", "multi")),
    ]
    alone = settings[0].path_set(three_paths())
    assert ([path.name for path in alone.paths], alone.dropped) == (["fp32-1"], ())
    assert (settings[3].scheduler.batching, settings[3].scheduler.shed) == (False, False)


def test_ratios_pair_the_runs_of_one_seed(scripts: Any) -> None:
    throughput = scripts("throughput")
    settings = throughput.settings_of(three_paths(), "fp32-1")
    base = {
        "fp32-1": 10, "int8-1": 20, "int8-2": 15, "fp32-1 plain": 2, "fastest": 25, "random": 5, "greedy": 20,
        "multi": 30,
    }  # fmt: skip
    runs = [
        run_of(scripts, name, seed, correct * (seed + 1))
        for seed in range(3)
        for name, correct in base.items()
    ]
    runs[7] = run_of(scripts, "multi", 0, 20)
    assert throughput.ratios(runs, "multi", "fp32-1") == [2.0, 3.0, 3.0]
    assert throughput.best_single(runs, ["fp32-1", "int8-1", "int8-2"]) == "int8-1"
    lines = throughput.headlines(runs, settings, "fp32-1")
    assert "at 10 ms and 2x: multi over fp32-1: 2.00 / 3.00 / 3.00" in lines
    assert "at 10 ms and 2x: multi over the best single path (int8-1): 1.00 / 1.50 / 1.50" in lines
    assert not any("FAILED" in line for line in lines)
    rows = throughput.table(runs, settings).splitlines()
    assert len(rows) == 2 + len(settings)
    assert "| multi | 20 / 60 / 90 | 85.0% | 10.0% | 5.0% |" in rows[-1]


# Overload


def test_the_load_goes_from_half_to_the_overload_and_back(scripts: Any) -> None:
    overload = scripts("overload")
    config = overload.OverloadConfig(paths=Path("p"), data=Path("d"), minutes=0.5, quiet_s=20, factor=3)
    phases = overload.phases_of(config, 200.0)
    assert (phases.overload, phases.drop, phases.end) == (20, 50, 70)
    times = np.array([arrived for arrived, _ in phases.queries])
    assert (np.diff(times) >= 0).all()
    counts = np.histogram(times, [0, 20, 50, 70])[0]
    expected = np.array([100 * 20, 600 * 30, 100 * 20])
    assert (np.abs(counts - expected) < 4.5 * expected**0.5).all()


def test_every_query_must_be_served_or_shed(scripts: Any) -> None:
    answered = scripts("overload").answered
    driven = Driven(outcomes=[served(0, 0.1), shed(0.1)])
    assert answered(driven, 2).met
    assert not answered(driven, 3).met
    driven.outcomes.append(Outcome(rows=1, arrived=0.2, target_s=1))
    driven.failures["status 500: gone"] += 1
    verdict = answered(driven, 3)
    assert not verdict.met
    assert "2 of 3 queries served or shed, 1 failed (status 500: gone): MISSED" in verdict.line


@pytest.mark.parametrize(
    ("shape", "met"),
    [
        (lambda t: 1e9 + 1e6 * np.sin(t), True),
        (lambda t: 1e9 + 1e5 * t, False),
        (lambda t: 1e9 + 1e4 * t, True),
        (lambda t: 1e9 - 1e5 * t, True),
        (lambda t: 1e9 + 2e8 * (np.abs(t - 400) < 2), False),
        (lambda t: 1e9 + 5e8 * (t < 90), True),
        (lambda t: 1e9 + 5e8 * (t > 640), True),
    ],
)
def test_memory_is_judged_within_the_settled_overload(scripts: Any, shape: Any, met: bool) -> None:
    overload = scripts("overload")
    phases = overload.Phases(30, 630, 660, [])
    samples = [(float(t), {7: 10**8, 8: int(shape(float(t)))}) for t in range(660)]
    assert overload.flat(samples, phases).met is met
    server, child = overload.process_lines(samples, phases)
    assert server.split() == [
        "process",
        "7,",
        "the",
        "server",
        "100.0",
        "to",
        "100.0",
        "MB,",
        "at",
        "most",
        "100.0",
    ]
    own = [sizes[8] / 1e6 for _, sizes in samples[150:631]]
    assert child.split()[4:] == f"{own[0]:,.1f} to {own[-1]:,.1f} MB, at most {max(own):,.1f}".split()


def test_too_few_samples_are_no_flat_memory(scripts: Any) -> None:
    overload = scripts("overload")
    assert not overload.flat([(1.0, {1: 1})], overload.Phases(0, 10, 20, [])).met


@pytest.mark.parametrize(("slow_s", "back"), [(0.0, 1.0), (2.0, 3.0), (4.9, 6.0), (20.0, None)])
def test_recovery_is_the_end_of_the_first_quick_window(scripts: Any, slow_s: float, back: Any) -> None:
    overload = scripts("overload")
    phases = overload.Phases(10, 20, 30, [])
    times = np.arange(0, 30, 0.01)
    outcomes = [served(t, 0.050 if 10 <= t < 20 + slow_s else 0.004) for t in times.tolist()]
    verdict = overload.recovered(outcomes, phases)
    assert verdict.met is (back is not None and back <= 5)
    assert "p99 4.00 ms before, within 6.00 ms" in verdict.told
    if back is None:
        assert "never again" in verdict.told
    else:
        assert f"{back:.2f} s after" in verdict.told
    assert [line.split()[0] for line in overload.phase_lines(outcomes, phases)] == [
        "before", "overload", "after",
    ]  # fmt: skip


def test_windows_hold_the_served_queries_that_arrived_in_them(scripts: Any) -> None:
    outcomes = [served(0.1, 0.001), served(0.9, 0.9), shed(1.1), served(2.5, 0.002)]
    windows = scripts("runs").windows_p99_ms(outcomes, 0, 3, step_s=1.0)
    assert windows == [(1.0, pytest.approx(900)), (3.0, pytest.approx(2))]


# Agreement


@pytest.mark.parametrize(("wanted", "found"), [(100.0, 0.0), (50.0, 1.0), (20.0, 4.0), (1.0, 5.0)])
def test_a_falling_function_is_solved_within_its_range(scripts: Any, wanted: float, found: float) -> None:
    solved = scripts("agreement").solved
    assert solved(lambda x: 100 / (1 + x), wanted, 5.0) == pytest.approx(found, abs=1e-3)


def test_differences_and_verdicts_are_of_prediction_over_measurement(scripts: Any) -> None:
    agreement = scripts("agreement")

    def pair(policy: str, seed: int, predicted: float, measured: float) -> Any:
        def figures(rows: float) -> Any:
            return agreement.Figures(in_target_rows_per_s=rows, p50_ms=1.0, p99_ms=5.0, shed=0.0)

        return agreement.Pair(
            policy=policy, multiple=1.0, seed=seed, predicted=figures(predicted), measured=figures(measured)
        )

    pairs = [pair("a", 0, 110, 100), pair("a", 1, 90, 100), pair("a", 2, 100, 100), pair("b", 0, 70, 100)]
    assert pairs[0].difference("in_target_rows_per_s") == pytest.approx(0.1)
    none = ("b", 2.0)
    lines = [verdict.line for verdict in agreement.verdicts(pairs, none)]
    assert lines[0] == "in target 1 of 2 within 15%, worst 30% (b at 1x): MISSED"
    assert lines[1].endswith("2 of 2 within 15%, worst 0% (a at 1x): met")
    assert "| a | 1x | 100 | 100 | -10% / +0% / +10% |" in agreement.table(pairs, none)
    # What the contention was fitted to is shown; its p99 is still a prediction.
    lines = [verdict.line for verdict in agreement.verdicts(pairs, ("b", 1.0))]
    assert lines[0] == "in target 1 of 1 within 15%, worst 0% (a at 1x): met"
    assert "2 of 2" in lines[1]
    assert "| b | 1x | 100 | 70 | -30% / -30% / -30% (fitted) | 5.00 |" in agreement.table(pairs, ("b", 1.0))
    assert not agreement.verdicts(pairs[3:], ("b", 1.0))[0].met


def test_the_simulator_sees_the_queries_that_the_server_gets(scripts: Any) -> None:
    agreement, transport = scripts("agreement"), scripts("transport")
    paths = three_paths()
    setting = transport.Setting(name="multi", policy="multi", paths=paths.paths)
    load = LoadConfig(rate=100, duration_s=2, target_ms=50, seed=5)
    known = agreement.Calibration(overhead_s=0.02)
    outcomes = agreement.predicted(paths, setting, load, known)
    assert [(one.arrived, one.rows) for one in outcomes] == scripts("transport").arrivals(load)
    latencies = [one.latency_s for one in outcomes if one.latency_s is not None]
    assert len(latencies) > 100
    assert min(latencies) > 0.02


# Transports


def test_the_address_is_found_in_what_a_server_says(scripts: Any) -> None:
    url_in = scripts("runs").url_in
    assert url_in("loading\nserving 4 paths at http://127.0.0.1:8901\n") == "http://127.0.0.1:8901"
    assert url_in("loading\n") == ""


@pytest.mark.parametrize("multi_hot", [False, True])
def test_batches_are_cut_as_requests_are(scripts: Any, multi_hot: bool) -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(0, 4, 30)
    tags = Bags(generator.integers(0, 9, sizes.sum()), np.concatenate([[0], np.cumsum(sizes)]))
    columns = Columns(
        generator.standard_normal((30, 2)).astype(np.float32),
        np.zeros(30, np.float32),
        (Bags(generator.integers(0, 9, 30)), tags if multi_hot else Bags(generator.integers(0, 9, 30))),
    )
    schema = Schema(
        dense=("x", "y"),
        sparse=tuple(SparseColumn(name=n, cardinality=9, multi_hot=multi_hot) for n in "ab"),
        label="l",
        rows={},
        source="",
    )
    requests = InferRequests(columns, schema, max_rows=20)
    cut = scripts("transport").cutter(requests)
    for start, rows in ((0, 1), (7, 12), (25, 20)):
        batch, own = cut(start, rows), requests.columns(start, rows)
        assert (batch.dense.numpy() == own.dense).all()
        assert (batch.ids.numpy() == np.concatenate([bags.ids for bags in own.sparse])).all()
        assert (np.diff(batch.offsets.numpy()) == np.concatenate([bags.sizes for bags in own.sparse])).all()
