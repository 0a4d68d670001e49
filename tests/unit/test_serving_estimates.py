"""What batches are expected to last: shared slowness, rare spikes, and queries on an idle device."""

import numpy as np
import pytest
from serving_paths_made import made_cpu, made_path

from tightrec.serving.scheduling.estimates import MARGIN, PathEstimate, Weather
from tightrec.serving.scheduling.scheduler import Query, Scheduler, SchedulerConfig


def test_what_slows_one_path_of_a_device_slows_the_others_until_they_are_observed() -> None:
    weather = Weather()
    seen = PathEstimate(made_path("seen", 1.0, 10, 0.8), 0.8, weather=weather)
    other = PathEstimate(made_path("other", 1.0, 10, 0.8), 0.8, weather=weather)
    for number in range(200):
        seen.observe(128, 3 * seen.curve.seconds(128), 0.01 * number)
    other.refresh(2.0)
    assert other.expected_factor == pytest.approx(3.0, rel=0.05)
    other.observe(128, other.curve.seconds(128), 2.0)
    assert other.expected_factor < 3.0
    other.refresh(1000.0)
    assert other.expected_factor == pytest.approx(1.0, abs=0.01)


def test_a_path_that_was_not_observed_is_as_uncertain_as_those_that_were() -> None:
    weather = Weather()
    seen = PathEstimate(made_path("seen", 1.0, 10, 0.8), 0.8, weather=weather)
    other = PathEstimate(made_path("other", 1.0, 10, 0.8), 0.8, weather=weather)
    assert other.planned_s(128) == other.expected_s(128)
    for number in range(400):
        seen.observe(128, (1.0 if number % 2 else 2.0) * seen.curve.seconds(128), 0.01 * number)
    other.refresh(4.0)
    margin = other.planned_s(128) - other.expected_s(128)
    assert margin == pytest.approx(seen.planned_s(128) - seen.expected_s(128), rel=0.1)
    assert margin == pytest.approx(MARGIN * 0.5 * other.curve.seconds(128), rel=0.2)
    other.refresh(1000.0)
    assert other.planned_s(128) == pytest.approx(other.expected_s(128), rel=0.01)


def test_the_rarer_a_batch_may_be_late_the_more_time_it_needs() -> None:
    estimate = PathEstimate(made_path("only", 1.0, 10, 0.8), 0.8)
    draw = np.random.default_rng(0).laplace(1.5, 0.1, 4000)
    for number, ratio in enumerate(draw):
        estimate.observe(128, ratio * estimate.curve.seconds(128), 0.001 * number)
    limits = {chance: estimate.surely_s(128, chance) for chance in (0.9, 0.1, 0.01)}
    # What is likely to be late anyway is planned as ever.
    assert limits[0.9] == estimate.planned_s(128)
    for chance in (0.1, 0.01):
        late = np.mean(draw * estimate.curve.seconds(128) > limits[chance])
        assert 0.05 * chance < late < 2 * chance
    assert estimate.surely_s(128, 0.0) < 10 * estimate.expected_s(128), "no gain at all: still a number"


def test_a_profile_with_rare_spikes_does_not_keep_a_path_from_being_tried() -> None:
    spiky = made_path("spiky", 1.0, 10, 0.8, tail=10.0)
    assert PathEstimate(spiky, 0.8).planned_s(128) < 1.3 * PathEstimate(spiky, 0.8).expected_s(128)


def test_an_idle_device_takes_a_query_that_is_in_time_as_often_as_not() -> None:
    path = made_path("only", 1.0, 10, 0.8, tail=1.5)
    scheduler = Scheduler(made_cpu(path), SchedulerConfig())
    just = path.profile.expected_ms(128) / 1e3 * 1.001
    assert scheduler.submit(Query(number=0, rows=128, arrived=0.0, target_s=just), 0.0) is None
    batches, shed = scheduler.start(0.0)
    assert len(batches) == 1
    assert not shed
    # Behind it a margin counts.
    busy = scheduler.submit(Query(number=1, rows=128, arrived=0.0, target_s=just), 0.0)
    assert busy is None
    assert len(scheduler.start(0.0)[0]) == 1
    refused = scheduler.submit(Query(number=2, rows=128, arrived=0.0, target_s=2 * just), 0.0)
    assert refused is not None
    assert refused.reason == "late"
