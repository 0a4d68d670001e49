"""Paths that fail, targets out of proportion, and mistakes in the middle of starting."""

import logging

import pytest
from serving_paths_made import Driven, made_cpu, made_path, usual_cpu

from tightrec.serving.paths import Device, PathSet
from tightrec.serving.scheduling.estimates import MOST_ROWS, PathEstimate
from tightrec.serving.scheduling.rest import FAILURES, FIRST_REST_S, LONGEST_REST_S, Rest
from tightrec.serving.scheduling.scheduler import Scheduler


def two(devices: tuple[str, str] = ("cpu", "cpu")) -> PathSet:
    """A path that is cheaper, and one as good."""
    names = dict.fromkeys(devices)
    return PathSet(
        devices=tuple(Device(name=name, slots=1) for name in names),
        paths=(
            made_path("cheap", 0.9, 10, 0.8, device=devices[0]),
            made_path("sound", 1.0, 10, 0.8, device=devices[1]),
        ),
    )


def end(driven: Driven, now: float, broken: tuple[str, ...] = ("cheap",)) -> None:
    """Every batch that runs ends at ``now``, those of broken paths without scores."""
    while driven.running:
        for batch in list(driven.running):
            if batch.path.name in broken:
                driven.running.remove(batch)
                driven.scheduler.fail(batch, now)
            else:
                driven.finish(batch, now)
        driven.start(now)


def names(driven: Driven, since: int = 0) -> list[str]:
    return [batch.path.name for batch in driven.batches[since:]]


@pytest.mark.parametrize("policy", ["multi", "greedy", "fastest"])
@pytest.mark.parametrize("devices", [("cpu", "cpu"), ("broken", "sound")])
def test_a_path_that_always_fails_gets_a_few_batches_and_another_one_the_rest(
    policy: str, devices: tuple[str, str]
) -> None:
    driven = Driven(two(devices), policy=policy)
    for number in range(500):
        driven.submit(10, now=0.01 * number)
        end(driven, 0.01 * number + 0.0011)
    assert len(driven.batches) == 500
    assert FAILURES < names(driven).count("cheap") <= 12, "and it is tried again"
    assert not driven.shed


def test_a_path_that_works_again_is_taken_again() -> None:
    driven = Driven(two())
    for number in range(20):
        driven.submit(10, now=0.01 * number)
        end(driven, 0.01 * number + 0.0011)
    assert names(driven, -5) == ["sound"] * 5
    for number in range(5):
        driven.submit(10, now=60 + number)
        end(driven, 60 + number + 0.001, broken=())
    assert names(driven, -5) == ["cheap"] * 5


def test_the_rest_doubles_with_every_failure_after_it_and_a_success_ends_it() -> None:
    rest, now, pauses = Rest(), 0.0, []
    for _ in range(FAILURES - 1):
        rest.failed(now, now)
        assert rest.until < now
    for _ in range(10):
        rest.failed(now, now)
        pauses.append(rest.until - now)
        began, now = now, rest.until
        rest.failed(began, now)
        assert rest.until == now, "a batch that began before the rest says nothing new"
    assert pauses[:3] == pytest.approx([FIRST_REST_S, 2 * FIRST_REST_S, 4 * FIRST_REST_S])
    assert max(pauses) == pytest.approx(LONGEST_REST_S)
    rest.failed(now, now)
    rest.succeeded()
    assert rest.until < now
    rest.failed(now, now)
    assert rest.until < now, "they are counted from the start again"


def resting(devices: tuple[str, str] = ("cpu", "cpu")) -> Driven:
    """``cheap`` rests at 0."""
    driven = Driven(two(devices))
    for _ in range(FAILURES):
        driven.submit(10)
        end(driven, 0.0)
    assert names(driven) == ["cheap"] * FAILURES
    driven.batches.clear()
    return driven


def test_a_path_that_fails_now_and_then_does_not_rest() -> None:
    driven = Driven(two())
    for number in range(12):
        driven.submit(10, now=float(number))
        end(driven, number + 0.001, broken=() if number % FAILURES == 2 else ("cheap",))
    assert names(driven) == ["cheap"] * 12


def test_nothing_is_admitted_for_a_device_whose_paths_rest() -> None:
    driven = resting(("broken", "sound"))
    driven.submit(1500, target_ms=100)
    refused = driven.submit(10)
    assert names(driven) == ["sound"]
    assert driven.shed == {refused.number: "late"}


def test_a_query_that_must_take_a_resting_path_does() -> None:
    driven = resting()
    driven.submit(10, path="cheap")
    assert names(driven) == ["cheap"]


def test_if_all_paths_rest_they_are_taken_nevertheless() -> None:
    driven = resting()
    for _ in range(FAILURES):
        driven.submit(10)
        end(driven, 0.0, broken=("cheap", "sound"))
    assert names(driven) == ["sound"] * FAILURES
    driven.submit(10)
    assert names(driven, -1) == ["cheap"]
    assert not driven.shed


def test_accuracy_is_not_bought_on_a_resting_path() -> None:
    driven = Driven(usual_cpu())
    for _ in range(FAILURES + 1):
        driven.submit(10)
        end(driven, 0.0, broken=("hybrid", "hybrid-2"))
    assert names(driven) == ["hybrid"] * FAILURES + ["hybrid-2"]


def test_an_idle_device_whose_paths_rest_fetches_nothing() -> None:
    driven = resting(("broken", "sound"))
    driven.submit(10)
    driven.submit(10)
    assert names(driven) == ["sound"]
    assert driven.scheduler.waiting_queries == 1


def test_what_waits_on_a_device_whose_paths_begin_to_rest_moves_or_is_tried_there() -> None:
    for target_ms, path in ((60.0, "sound"), (10.0, "cheap")):
        driven = Driven(two(("broken", "other")))
        driven.submit(10, path="cheap", target_ms=100)
        driven.submit(1500, path="sound", target_ms=100)
        waits = driven.submit(100, target_ms=target_ms)
        assert len(driven.batches) == 2
        driven.scheduler._estimates["cheap"].rest.until = 1.0
        end_of_first = driven.running[0]
        driven.running.remove(end_of_first)
        driven.scheduler.drop(end_of_first)
        driven.start(0.001)
        if path == "sound":
            assert len(driven.batches) == 2
            driven.finish(driven.running[0])
            driven.start(0.016)
        assert driven.batches[-1].queries == (waits,)
        assert driven.batches[-1].path.name == path


@pytest.mark.parametrize("target_ms", [1e308, 7e306])
@pytest.mark.parametrize("policy", ["multi", "greedy", "fastest"])
def test_an_endless_target_is_served_like_any_other(target_ms: float, policy: str) -> None:
    driven, now = Driven(usual_cpu(tail=1.5), policy=policy), 0.0
    for _ in range(20):
        driven.submit(10, now=now, target_ms=target_ms)
        driven.submit(10, now=now)
        now += 0.002
        driven.finish(driven.running[0], now)
        driven.start(now)
    driven.run_down()
    assert sum(len(batch.queries) for batch in driven.batches) == 40
    assert not driven.shed


def test_rows_within_an_endless_time_are_a_number() -> None:
    estimate = PathEstimate(made_path("only", 1.0, 10, 0.8), 0.8)
    assert estimate.rows_within(float("inf")) == estimate.rows_within(1e305) == MOST_ROWS


def test_one_client_with_a_long_target_does_not_fill_the_budget() -> None:
    driven = Driven(usual_cpu())
    for target_ms in [10.0] * 20 + [3_600_000.0]:
        driven.submit(1, target_ms=target_ms)
    driven.start(0.001)
    (queue,) = driven.scheduler._queues
    assert 0.010 < queue.budget.span_s < 0.011


def test_a_mistake_while_starting_loses_nothing_that_was_started(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    driven = Driven(made_cpu(made_path("only", 1.0, 10, 0.8)), batching=False)
    first = driven.submit(10, go=False)
    second = driven.submit(10, go=False)
    launch = Scheduler._launch

    def breaking(scheduler: Scheduler, *rest: object) -> object:
        if driven.scheduler.waiting_queries == 1:
            raise ZeroDivisionError
        return launch(scheduler, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as broken:
        broken.setattr(Scheduler, "_launch", breaking)
        (batch,) = driven.start(0.0)
        assert batch.queries == (first,)
        with pytest.raises(ZeroDivisionError):
            driven.start(0.0)
    driven.run_down()
    assert names(driven) == ["only"] * 2 and driven.batches[1].queries == (second,)
