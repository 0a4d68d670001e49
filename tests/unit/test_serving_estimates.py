"""What batches are expected to last: shared slowness, rare spikes, and queries on an idle device."""

import pytest
from serving_paths_made import made_cpu, made_path

from tightrec.serving.scheduling.estimates import PathEstimate, Weather
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
