"""The rules that choose a path, one at a time and against each other in simulation."""

import dataclasses
from collections.abc import Callable

import pytest
from serving_paths_made import Driven, made_cpu, made_path, poisson, usual_cpu, with_gpu

from tightrec.serving.outcomes import Summary
from tightrec.serving.paths import PathSet
from tightrec.serving.scheduling.budget import Budget, Reach
from tightrec.serving.scheduling.scheduler import Scheduler, SchedulerConfig
from tightrec.serving.scheduling.simulator import ProfileDurations, simulate


@pytest.mark.parametrize("policy", ["multi", "greedy"])
def test_an_idle_machine_gives_the_most_accurate_path(policy: str) -> None:
    driven = Driven(usual_cpu(), policy=policy)
    driven.submit(60)
    assert driven.batches[0].path.name == "hybrid"


def test_greedy_takes_the_most_accurate_path_that_is_in_time() -> None:
    driven = Driven(usual_cpu(), policy="greedy")
    for rows, path in ((60, "hybrid"), (700, "dhe"), (1400, "wide"), (4000, "table-2")):
        driven.submit(rows)
        assert driven.batches[-1].path.name == path
        driven.run_down()


def test_fastest_takes_the_path_that_ends_first() -> None:
    driven = Driven(usual_cpu(), policy="fastest")
    driven.submit(20)
    driven.run_down()
    driven.submit(1000)
    assert [batch.path.name for batch in driven.batches] == ["table", "table-2"]


def test_multi_spends_what_is_idle_and_returns_to_the_cheapest_in_a_rush() -> None:
    driven = Driven(usual_cpu())
    now = 0.0
    for _ in range(400):
        driven.submit(300, now=now)
        now += 0.0004
        for batch in list(driven.running):
            if batch.started + batch.expected_s <= now:
                driven.finish(batch, now)
        driven.start(now)
    rush = [batch.path.name for batch in driven.batches[-20:]]
    assert set(rush) <= {"table", "table-2"}
    driven.run_down()
    driven.submit(60, now=now + 300.0)
    assert driven.batches[-1].path.name == "hybrid"


def test_multi_buys_no_accuracy_that_the_budget_cannot_pay() -> None:
    rich, poor = Driven(usual_cpu()), Driven(usual_cpu(), headroom=0.0)
    for driven, path in ((rich, "hybrid"), (poor, "table")):
        driven.submit(60)
        assert driven.batches[0].path.name == path


def test_multi_never_slows_what_waits_for_accuracy() -> None:
    """The last free slot, and others behind: the cheapest path."""
    driven = Driven(usual_cpu(), batch_rows=100)
    for _ in range(5):
        driven.submit(90, go=False)
    batches = driven.start(0.0)
    assert batches[-1].path.name == "table"


def test_cheapest_means_right_predictions_per_slot_second() -> None:
    paths = made_cpu(made_path("poor", 0.5, 3.0, 0.50), made_path("fair", 0.5, 3.3, 0.78), slots=1)
    driven = Driven(paths, headroom=0.0)
    driven.submit(100)
    assert driven.batches[0].path.name == "fair"


@pytest.mark.parametrize("slower", [1.0, 1.1])
def test_a_path_whose_profile_errs_is_found_out(slower: float) -> None:
    paths = made_cpu(made_path("one", 1.0, 10, 0.8), made_path("two", 1.0, 10.2, 0.8), slots=1)
    driven = Driven(paths, headroom=0.0)
    driven.submit(100)
    assert driven.batches[0].path.name == "one"
    now = driven.run_down()
    one = driven.scheduler._estimates["one"]
    two = driven.scheduler._estimates["two"]
    for _ in range(400):
        one.observe(100, slower * one.curve.seconds(100), now)
        two.observe(100, two.curve.seconds(100), now)
    driven.submit(100, now=now)
    assert driven.batches[1].path.name == ("one" if slower == 1.0 else "two")
    driven.run_down()
    driven.submit(100, now=now + 1000)
    assert driven.batches[2].path.name == "one", "long ago"


def test_where_others_wait_only_the_cheapest_path_is_counted_on() -> None:
    paths = made_cpu(made_path("cheap", 1.0, 20, 0.8), made_path("quick", 1.0, 12, 0.8, threads=2))

    def refused(waiting: int, policy: str) -> set[int]:
        driven = Driven(paths, policy=policy, headroom=0.0)
        for _ in range(2):
            driven.submit(100, target_ms=5, path="cheap")
        for _ in range(waiting):
            driven.submit(10, target_ms=30)
        assert driven.scheduler.waiting_queries == waiting
        driven.submit(200, target_ms=7.5)
        return set(driven.shed)

    # In 3 ms both slots are free: quick would end after 6.5 ms, cheap after 8.
    assert refused(0, "multi") == set(), "it is the next, so it has both slots if it wants to"
    assert refused(1, "multi") == {3}
    assert refused(1, "greedy") == set()


def test_a_small_gain_is_not_worth_a_likely_delay() -> None:
    plain, better = made_path("plain", 1.0, 10, 0.800), made_path("better", 4.0, 10, 0.801)
    for deviation, name in ((0.0, "better"), (0.25, "plain")):
        driven = Driven(made_cpu(plain, better, slots=1))
        for estimate in driven.scheduler._estimates.values():
            estimate._usual = deviation
        driven.submit(100, target_ms=7)
        assert driven.batches[0].path.name == name


def test_fixed_and_random_stay_where_they_are_put() -> None:
    fixed = Driven(usual_cpu(), policy="fixed:wide")
    for _ in range(5):
        fixed.submit(30)
    fixed.run_down()
    assert {batch.path.name for batch in fixed.batches} == {"wide"}

    def names(seed: int) -> list[str]:
        drawn = Driven(usual_cpu(), policy="random", seed=seed)
        for _ in range(30):
            drawn.submit(10, target_ms=100)
            drawn.run_down()
        return [batch.path.name for batch in drawn.batches]

    assert len(set(names(0))) == 6
    assert names(0) == names(0) != names(1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SchedulerConfig(policy="best"), "no policy 'best'. Choose multi, greedy, fastest, random"),
        (lambda: SchedulerConfig(policy="multi:x"), "only fixed takes a name"),
        (lambda: SchedulerConfig(policy="fixed:"), "only fixed takes a name"),
        (lambda: SchedulerConfig(policy="fixed"), "only fixed takes a name"),
        (lambda: SchedulerConfig(batch_rows=0), "batch_rows=0 must be at least 1"),
        (lambda: SchedulerConfig(headroom=1.5), "headroom=1.5 must be between 0 and 1"),
        (lambda: SchedulerConfig(rank="speed"), "rank='speed' is none of"),  # type: ignore[arg-type]
        (lambda: Scheduler(usual_cpu(), SchedulerConfig(policy="oracle")), "only the simulator has"),
        (lambda: Scheduler(usual_cpu(), SchedulerConfig(policy="fixed:no")), "no path 'no', only table"),
    ],
)
def test_mistakes_are_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_ranking_by_another_quality_changes_the_choice() -> None:
    low, high = made_path("low", 1.0, 1, 0.7), made_path("high", 1.0, 2, 0.8)
    paths = made_cpu(dataclasses.replace(low, ne=0.1), high)
    for rank, name in (("accuracy", "high"), ("ne", "low")):
        driven = Driven(paths, policy="greedy", rank=rank)
        driven.submit(10)
        assert driven.batches[0].path.name == name


def test_the_budget_earns_up_to_its_cap_and_owes_no_more() -> None:
    budget = Budget(slots=2, headroom=0.5)
    budget.earn(0.0, 0.010)
    assert budget.level_s == pytest.approx(0.010)
    assert budget.affords(0.010)
    assert not budget.affords(0.011)
    budget.pay(5.0)
    assert budget.level_s == pytest.approx(-0.010)
    budget.earn(0.015, 0.010)
    assert budget.level_s == pytest.approx(0.005)
    budget.earn(100.0, 0.010)
    assert budget.level_s == pytest.approx(0.010)


def test_the_reach_weighs_rows_lost_against_rows_gained() -> None:
    reach = Reach()
    reach.see(100, 0.0)
    reach.learn(-100)
    before = reach.share
    assert before < Reach.START
    reach.learn(-100)
    for _ in range(100):
        reach.learn(100 * 0.01)
    assert reach.share == pytest.approx(before)
    for _ in range(100):
        reach.learn(-100)
    assert reach.share == Reach.LEAST
    reach.see(100, Reach.FORGET_S)
    assert reach.share == pytest.approx(Reach.LEAST**0.5)


def figures(paths: PathSet, policy: str, rate: float, target_ms: float, seed: int = 0) -> Summary:
    seconds = min(3.0, 5000 / rate)
    queries = poisson(rate, seconds, target_ms, seed)
    model = ProfileDurations(seed=seed)
    return simulate(paths, SchedulerConfig(policy=policy), queries, model).summary(paths, seconds)


@pytest.mark.parametrize("target_ms", [5.0, 20.0])
@pytest.mark.parametrize("rate", [200.0, 1500.0, 6000.0])
def test_multi_is_not_beaten_by_fastest_nor_by_any_single_path(rate: float, target_ms: float) -> None:
    paths = usual_cpu(tail=1.25)
    multi = figures(paths, "multi", rate, target_ms)
    fastest = figures(paths, "fastest", rate, target_ms)
    assert multi.correct_rows_per_s >= 0.98 * fastest.correct_rows_per_s
    assert multi.accuracy >= fastest.accuracy - 1e-9
    for name in ("table", "dhe", "table-2"):
        single = figures(paths, f"fixed:{name}", rate, target_ms)
        assert multi.correct_rows_per_s >= 0.98 * single.correct_rows_per_s, name


def test_multi_beats_greedy_under_overload_and_is_as_accurate_when_idle() -> None:
    paths = usual_cpu(tail=1.25)
    rush = {policy: figures(paths, policy, 3000, 10) for policy in ("multi", "greedy")}
    assert rush["multi"].correct_rows_per_s > 1.5 * rush["greedy"].correct_rows_per_s
    calm = {policy: figures(paths, policy, 50, 10) for policy in ("multi", "greedy")}
    assert calm["multi"].accuracy > calm["greedy"].accuracy - 0.001
    assert calm["multi"].accuracy > 0.788


@pytest.mark.parametrize(("row_us", "batch_rows"), [(5.0, 4096), (5.0, 256), (0.5, 1024)])
def test_overload_does_not_shrink_what_is_served(row_us: float, batch_rows: int) -> None:
    """Batches stay efficient however much is refused, limited by the target or by batch_rows."""
    paths = made_cpu(made_path("only", 1.0, row_us, 0.8, tail=1.25))
    capacity = 2 * batch_rows / (1e-3 + row_us * 1e-6 * batch_rows) / 128
    served = []
    for load in (1.5, 5.0):
        queries = poisson(load * capacity, 5000 / (load * capacity), 10)
        done = simulate(paths, SchedulerConfig(batch_rows=batch_rows), queries, ProfileDurations())
        served.append(done.summary(paths, done.finished_s).correct_rows_per_s)
    assert served[1] > 0.92 * served[0]


def test_a_gpu_beside_the_cpu_is_used_and_helps() -> None:
    cpu, both = usual_cpu(tail=1.25), with_gpu(tail=1.25)
    alone, beside = figures(cpu, "multi", 9000, 10), figures(both, "multi", 9000, 10)
    assert beside.correct_rows_per_s > 1.3 * alone.correct_rows_per_s
    assert beside.accuracy > alone.accuracy
    assert beside.shares.get("gpu-hybrid", 0) + beside.shares.get("gpu-table", 0) > 0.3


def test_knowing_the_durations_is_never_late() -> None:
    paths = usual_cpu(tail=1.5)
    oracle, multi = figures(paths, "oracle", 6000, 10), figures(paths, "multi", 6000, 10)
    assert oracle.late <= multi.late
    assert oracle.correct_rows_per_s > 0.98 * multi.correct_rows_per_s
