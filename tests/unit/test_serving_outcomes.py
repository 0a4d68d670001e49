"""Figures over outcomes, against counts by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightrec.serving.outcomes import Outcome, percentile, summarise


def test_the_figures_of_a_few_outcomes() -> None:
    outcomes = [
        Outcome(100, 0.0, 0.010, finished=0.005, path="a"),
        Outcome(300, 1.0, 0.010, finished=1.010, path="b"),
        Outcome(50, 2.0, 0.010, finished=2.020, path="a"),
        Outcome(70, 3.0, 0.010, shed="late"),
        Outcome(80, 3.0, 0.010, shed="full"),
        Outcome(90, 3.0, 0.010, shed="late"),
        Outcome(10, 4.0, 0.010),
    ]
    found = summarise(outcomes, {"a": 0.8, "b": 0.9}, 2.0)
    assert (found.queries, found.served, found.late, found.shed, found.failed) == (7, 3, 1, 3, 1)
    assert found.rows_per_s == 225
    assert found.in_target_rows_per_s == 200, "exactly at the target is in time"
    assert found.correct_rows_per_s == pytest.approx((80 + 270) / 2)
    assert found.accuracy == pytest.approx(350 / 400)
    assert found.shares == {"a": pytest.approx(1 / 3), "b": pytest.approx(2 / 3)}
    assert found.reasons == {"late": 2, "full": 1}
    assert found.p50_ms == pytest.approx(10)
    assert found.p95_ms == found.p99_ms == pytest.approx(20)


def test_nothing_served_has_no_latency() -> None:
    found = summarise([Outcome(5, 0.0, 1.0, shed="late")], {}, 1.0)
    assert math.isnan(found.p99_ms)
    assert math.isnan(found.accuracy)
    assert found.shares == {}
    assert found.correct_rows_per_s == 0


def test_a_duration_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        summarise([], {}, 0.0)


@given(st.lists(st.floats(0, 10), min_size=1), st.sampled_from([0.5, 0.95, 0.99, 1.0]))
def test_a_percentile_is_the_least_value_that_enough_do_not_exceed(values: list[float], share: float) -> None:
    ascending = sorted(values)
    found = percentile(ascending, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6
    assert sum(value < found for value in values) < share * len(values)


def test_the_99th_of_100_is_the_99th() -> None:
    assert percentile([float(n) for n in range(1, 101)], 0.99) == 99.0
