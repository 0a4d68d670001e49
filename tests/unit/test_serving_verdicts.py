"""How the serving benchmarks judge: goals met and missed, exit statuses, measurements of nothing."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_scripts import importable, path_of, run_of, three_paths

from tightrec.serving.paths import write_paths


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    with importable() as found:
        yield found


def judged(scripts: Any, cells: dict[tuple[float, float], tuple[float, float, float]]) -> dict[str, Any]:
    """Verdicts by name, of (target, load) to the baseline's and multi's correct rows, and multi's accuracy.

    One path alone has 20, as many at every target and load; the baseline's accuracy is 0.8.
    """
    throughput, paths = scripts("throughput"), three_paths()
    baseline = dataclasses.replace(path_of("fp32-1", "fp32"), accuracy=0.8)
    settings = [s for s in throughput.settings_of(paths, "fp32-1") if s.name in ("fp32-1", "int8-1", "multi")]
    runs = []
    for (target_ms, multiple), (slow, multi, accuracy) in cells.items():
        for seed in range(3):
            at = {"target_ms": target_ms, "multiple": multiple}
            runs += [run_of(scripts, "fp32-1", seed, slow, **at), run_of(scripts, "int8-1", seed, 20, **at)]
            run = run_of(scripts, "multi", seed, multi, **at)
            summary = dataclasses.replace(run.summary, accuracy=accuracy)
            runs.append(dataclasses.replace(run, summary=summary))
    return {verdict.name: verdict for verdict in throughput.verdicts(runs, settings, baseline)}


GOOD = {(10.0, 1.0): (20, 20, 0.8), (10.0, 4.0): (10, 25, 0.81), (50.0, 1.0): (20, 30, 0.79)}


def test_the_goals_of_multi_are_all_met(scripts: Any) -> None:
    found = judged(scripts, GOOD)
    assert [verdict.met for verdict in found.values()] == [True] * 3
    assert found["goal"].told == "2.500x fp32-1 at 10 ms and 4x (at least 2.5x)"
    assert "0.800000 at 10 ms and 1x" in found["accuracy"].told
    assert "1.000 / 1.000 / 1.000x fp32-1 at 10 ms and 1x" in found["single"].told


@pytest.mark.parametrize(
    ("name", "place", "cell", "told"),
    [
        ("goal", (10.0, 4.0), (10.1, 25, 0.81), "2.475x fp32-1 at 10 ms and 4x"),
        ("accuracy", (10.0, 1.0), (20, 20, 0.7999), "0.799900 at 10 ms and 1x"),
        ("accuracy", (10.0, 4.0), (10, 25, float("nan")), "nan at 10 ms and 4x"),
        ("single", (50.0, 1.0), (5, 19.9, 0.8), "0.995 / 0.995 / 0.995x int8-1 at 50 ms and 1x"),
    ],
)
def test_a_missed_goal_is_told_with_its_place(
    scripts: Any, name: str, place: Any, cell: Any, told: str
) -> None:
    found = judged(scripts, GOOD | {place: cell})
    assert [verdict.name for verdict in found.values() if not verdict.met] == [name]
    assert told in found[name].told and found[name].line.endswith(": MISSED")


def test_goals_at_10_ms_are_not_judged_elsewhere(scripts: Any) -> None:
    assert list(judged(scripts, {(50.0, 1.0): (20, 30, 0.7)})) == ["single"]


@pytest.mark.parametrize(("multi", "status"), [(30.0, 0), (19.0, 1)])
def test_throughput_ends_with_its_verdict(
    scripts: Any, tmp_path: Path, monkeypatch: Any, capsys: Any, multi: float, status: int
) -> None:
    throughput = scripts("throughput")

    async def measured(*_: Any) -> list[Any]:
        names = ("fp32-1", "int8-1", "int8-2", "multi")
        return [run_of(scripts, n, 0, multi if n == "multi" else 20, target_ms=20.0) for n in names]

    monkeypatch.setattr(throughput, "measure", measured)
    write_paths(three_paths(), tmp_path / "paths.json")
    words = [f"paths={tmp_path / 'paths.json'}", "data=d", f"out={tmp_path / 'out.json'}"]
    assert throughput.main(words) == status
    assert f"x any single path): {'MISSED' if status else 'met'}" in capsys.readouterr().out
    assert (tmp_path / "out.json").stat().st_size


@pytest.mark.parametrize(
    ("predicted", "measured", "difference"),
    [(5.0, 0.0, math.inf), (0.0, 0.0, 0.0), (math.nan, 3.0, math.inf), (3.0, math.nan, math.inf),
     (math.nan, math.nan, 0.0), (0.0, 4.0, -1.0)],
)  # fmt: skip
def test_a_difference_to_nothing_is_no_crash(
    scripts: Any, predicted: float, measured: float, difference: float
) -> None:
    assert pair_of(scripts, predicted, measured).difference("p99_ms") == difference


def pair_of(scripts: Any, predicted: float, measured: float) -> Any:
    agreement = scripts("agreement")
    guess, seen = (
        agreement.Figures(in_target_rows_per_s=value, p50_ms=1.0, p99_ms=value, shed=0.0)
        for value in (predicted, measured)
    )
    return agreement.Pair(policy="multi", multiple=1.0, seed=0, predicted=guess, measured=seen)


@pytest.mark.parametrize(("measured", "status"), [(100.0, 0), (130.0, 1), (0.0, 1)])
def test_agreement_writes_its_figures_and_ends_with_its_verdict(
    scripts: Any, tmp_path: Path, monkeypatch: Any, measured: float, status: int
) -> None:
    agreement = scripts("agreement")

    async def runs(*_: Any) -> Any:
        return [pair_of(scripts, 100.0, measured)], agreement.Calibration()

    monkeypatch.setattr(agreement, "measure", runs)
    write_paths(three_paths(), tmp_path / "paths.json")
    words = [f"paths={tmp_path / 'paths.json'}", "data=d", f"out={tmp_path / 'out.json'}"]
    assert agreement.main(words) == status
    assert len(json.loads((tmp_path / "out.json").read_text())["runs"]) == 1


@pytest.mark.parametrize(
    ("wrote", "told"), [("loading\\nno such port\\n", "no such port"), ("", "it wrote nothing")]
)
def test_a_server_that_does_not_start_is_a_sentence_and_a_status(
    scripts: Any, tmp_path: Path, monkeypatch: Any, capsys: Any, wrote: str, told: str
) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nprintf '{wrote}'\nexit 2\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    write_paths(three_paths(), tmp_path / "paths.json")
    assert scripts("overload").main([f"paths={tmp_path / 'paths.json'}", "data=d"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"the server does not start: {told} (`{program} -m tightrec.serving serve ")
    assert error.count("\n") == 1
