"""The scheduler: admission, batches, shedding, corrections, and what always holds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_paths_made import Driven, made_cpu, made_path, usual_cpu, with_gpu

from tightrec.serving.paths import Device, PathSet
from tightrec.serving.scheduling.queues import Batch, Query, available
from tightrec.serving.scheduling.scheduler import Scheduler, SchedulerConfig


def one_path(slots: int = 1) -> PathSet:
    """1 ms and 10 us a row."""
    return made_cpu(made_path("only", 1.0, 10, 0.8), slots=slots)


def test_a_query_starts_at_once_and_its_batch_says_how_long_it_takes() -> None:
    driven = Driven(one_path())
    query = driven.submit(128)
    (batch,) = driven.batches
    assert batch.queries == (query,)
    assert batch.rows == 128
    assert batch.expected_s == pytest.approx(2.28e-3)
    assert driven.scheduler.waiting_queries == driven.scheduler.waiting_rows == 0


def test_what_waits_is_scored_together_and_in_the_order_of_deadlines() -> None:
    driven = Driven(one_path())
    driven.submit(100)
    later, sooner = driven.submit(50, target_ms=12), driven.submit(60, target_ms=9)
    assert driven.scheduler.waiting_rows == 110
    ended = driven.finish(driven.batches[0])
    (batch,) = driven.start(ended)
    assert batch.queries == (sooner, later)


def test_without_batching_every_query_goes_alone() -> None:
    driven = Driven(one_path(), batching=False)
    for _ in range(4):
        driven.submit(50)
    driven.run_down()
    assert [batch.rows for batch in driven.batches] == [50] * 4


def test_a_batch_is_no_longer_than_its_earliest_deadline_and_batch_rows_allow() -> None:
    for batch_rows, expected in ((4096, 400), (250, 200)):
        driven = Driven(one_path(), batch_rows=batch_rows, shed=False)
        driven.submit(100)
        for _ in range(8):
            driven.submit(100)
        ended = driven.finish(driven.batches[0])
        (batch,) = driven.start(ended)
        assert batch.rows == expected, "half of 10 ms is 400 rows"


def test_a_query_above_batch_rows_goes_alone() -> None:
    driven = Driven(one_path(), batch_rows=64)
    driven.submit(300)
    driven.submit(10, now=0.001)
    driven.submit(200, now=0.001)
    driven.run_down()
    assert sorted(batch.rows for batch in driven.batches) == [10, 200, 300]


def test_free_slots_share_what_waits() -> None:
    driven = Driven(one_path(slots=2))
    for _ in range(4):
        driven.submit(100, go=False)
    batches = driven.start(0.0)
    assert [batch.rows for batch in batches] == [200, 200]


def test_what_cannot_be_in_time_is_shed_at_once() -> None:
    driven = Driven(one_path())
    too_big = driven.submit(2000)
    assert driven.shed == {too_big.number: "late"}
    driven.submit(700)
    behind = driven.submit(300, target_ms=8)
    assert driven.shed.get(behind.number) == "late", "8 ms until the slot is free"
    assert driven.scheduler.waiting_queries == 0


def test_a_waiting_query_is_shed_when_its_last_moment_passes() -> None:
    driven = Driven(one_path())
    driven.submit(100)
    waiting = driven.submit(100)
    wake = driven.scheduler.wake_at(0.0)
    assert wake == pytest.approx(0.008), "10 ms less the 2 ms that it takes"
    driven.start(wake - 1e-6)
    assert not driven.shed
    driven.start(wake)
    assert driven.shed == {waiting.number: "late"}
    assert driven.scheduler.wake_at(wake) is None
    driven.finish(driven.batches[0], now=0.02)
    assert driven.start(0.02) == []


def test_without_shedding_the_late_are_served_late() -> None:
    driven = Driven(one_path(), shed=False)
    for _ in range(30):
        driven.submit(200)
    assert driven.scheduler.wake_at(0.0) is None
    ended = driven.run_down()
    assert not driven.shed
    assert sum(batch.rows for batch in driven.batches) == 6000
    assert ended > 0.05


def test_more_rows_than_may_wait_are_refused_as_full() -> None:
    driven = Driven(one_path(), queue_rows=100, shed=False)
    driven.submit(50)
    fits, over = driven.submit(90), driven.submit(20)
    assert driven.shed == {over.number: "full"}
    assert driven.scheduler.waiting_rows == fits.rows


def test_a_cancelled_query_never_comes_back() -> None:
    driven = Driven(one_path())
    driven.submit(100)
    gone = driven.submit(100)
    assert driven.scheduler.cancel(gone.number)
    assert not driven.scheduler.cancel(gone.number)
    assert driven.scheduler.waiting_rows == 0
    driven.run_down()
    assert len(driven.batches) == 1


def test_a_failed_batch_frees_its_slots_and_teaches_nothing() -> None:
    driven = Driven(one_path())
    driven.submit(100)
    driven.scheduler.fail(driven.batches[0], 5.0)
    assert driven.scheduler.correction("only") == 1.0
    driven.submit(100, now=5.0)
    assert len(driven.batches) == 2
    # A second report of the first batch must not free the slot of the second one.
    driven.scheduler.fail(driven.batches[0], 5.0)
    driven.submit(10, now=5.0)
    assert len(driven.batches) == 2


def test_the_correction_follows_durations_that_double() -> None:
    driven = Driven(one_path(), lasting=1.0)
    now = 0.0
    for _ in range(60):
        driven.submit(100, now=now, target_ms=50)
        batch = driven.batches[-1]
        now = driven.finish(batch, now + 4e-3)
    assert driven.scheduler.correction("only") == pytest.approx(2.0, rel=0.01)
    driven.submit(100, now=now, target_ms=50)
    assert driven.batches[-1].expected_s == pytest.approx(4e-3, rel=0.01)


def test_what_a_batch_tells_holds_for_the_other_paths_at_once() -> None:
    driven = Driven(made_cpu(made_path("one", 1.0, 10, 0.8), made_path("two", 1.0, 10, 0.8), slots=1))
    driven.submit(100, path="one")
    driven.finish(driven.batches[0], 4e-3)
    assert driven.scheduler.correction("two") == driven.scheduler.correction("one") == pytest.approx(1.1)


def test_the_oracle_knows_each_batch_of_several_that_start_together() -> None:
    paths = one_path(slots=3)
    scheduler = Scheduler(
        paths, SchedulerConfig(policy="oracle"), lambda path, rows, number: 1e-3 * (1 + number)
    )
    for number in range(3):
        scheduler.submit(Query(number, 100, 0.0, 1.0), 0.0)
    batches, _ = scheduler.start(0.0)
    assert [batch.expected_s for batch in batches] == pytest.approx([1e-3, 2e-3, 3e-3])


def test_a_path_that_looked_too_slow_is_tried_again() -> None:
    driven = Driven(one_path())
    driven.submit(100)
    now = driven.finish(driven.batches[0], 1.0)
    for _ in range(40):
        driven.submit(100, now=now, target_ms=5000)
        now = driven.finish(driven.batches[-1], now + 0.03)
    refused = driven.submit(100, now=now)
    assert driven.shed[refused.number] == "late"
    served = driven.submit(100, now=now + 30)
    assert served.number not in driven.shed


def test_one_stalled_batch_does_not_ruin_a_path() -> None:
    driven = Driven(one_path())
    driven.submit(100)
    driven.finish(driven.batches[0], 60.0)
    assert driven.scheduler.correction("only") < 1.5


def test_a_forced_path_is_kept_and_an_unknown_one_refused() -> None:
    driven = Driven(usual_cpu())
    driven.submit(10, path="dhe")
    assert driven.batches[0].path.name == "dhe"
    late = driven.submit(400, path="hybrid")
    assert driven.shed == {late.number: "late"}
    with pytest.raises(ValueError, match="no path 'nothing', only table"):
        driven.submit(10, path="nothing")


def test_queries_forced_to_different_paths_are_never_merged() -> None:
    driven = Driven(usual_cpu())
    for path in ("dhe", "table", "dhe", "table", None, "wide"):
        driven.submit(20, path=path, go=False, target_ms=30)
    driven.start(0.0)
    driven.run_down()
    for batch in driven.batches:
        assert {query.path for query in batch.queries} <= {None, batch.path.name}
    assert sum(len(batch.queries) for batch in driven.batches) == 6


def test_a_path_of_two_threads_waits_for_both_slots_while_short_work_fills_the_gap() -> None:
    paths = made_cpu(made_path("one", 1.0, 10, 0.8), made_path("two", 1.0, 5, 0.8, threads=2))
    driven = Driven(paths, policy="greedy")
    driven.submit(400, path="one")
    wide = driven.submit(100, path="two")
    short = driven.submit(50, path="one")
    assert [batch.queries[0] for batch in driven.batches[1:]] == [short]
    assert wide.number not in driven.shed
    driven.run_down()
    assert driven.batches[-1].queries == (wide,)
    assert driven.batches[-1].path.name == "two"


def test_an_idle_device_takes_what_waits_elsewhere() -> None:
    devices = tuple(Device(name=name, slots=1) for name in ("a", "b"))
    paths = tuple(made_path(f"on-{name}", 1.0, 10, 0.8, device=name) for name in ("a", "b"))
    for policy, taken in (("multi", True), ("fixed:on-a", False)):
        driven = Driven(PathSet(devices=devices, paths=paths), policy=policy)
        driven.submit(200, path="on-a")
        driven.submit(300, path="on-b")
        waits = driven.submit(100)
        assert len(driven.batches) == 2, "it waits for a, which should be free first"
        driven.finish(driven.batches[1], 0.001)
        started = driven.start(0.001)
        assert [batch.queries for batch in started] == ([(waits,)] if taken else [])


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (Query(0, 0, 0.0, 0.01), "give at least 1"),
        (Query(7, 5, 0.0, 0.01), "number 7 waits already"),
    ],
)
def test_impossible_queries_are_refused_in_words(query: Query, words: str) -> None:
    scheduler = Scheduler(one_path(), SchedulerConfig())
    scheduler.submit(Query(7, 5, 0.0, 0.01), 0.0)
    with pytest.raises(ValueError, match=words):
        scheduler.submit(query, 0.0)


def test_work_ahead_fills_the_earliest_slots_first() -> None:
    assert available([0.0, 0.0], 0.0, 2) == 0.0
    assert available([0.0, 3.0], 2.0, 1) == 2.0
    assert available([0.0, 3.0], 5.0, 1) == 4.0
    assert available([0.0, 3.0], 1.0, 2) == 3.0


EVENT = st.tuples(
    st.sampled_from(["submit", "submit", "submit", "finish", "fail", "cancel", "wait"]),
    st.integers(1, 900),
    st.sampled_from([2.0, 10.0, 10.0, 50.0]),
    st.sampled_from([None, None, None, "table", "hybrid-2"]),
)


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from(["multi", "greedy", "fastest", "random", "fixed:dhe"]),
    shed=st.booleans(),
    batching=st.booleans(),
    gpu=st.booleans(),
    events=st.lists(EVENT, max_size=60),
)
def test_every_query_ends_once_and_no_slot_is_taken_twice(
    policy: str, shed: bool, batching: bool, gpu: bool, events: list[tuple[str, int, float, str | None]]
) -> None:
    paths = with_gpu() if gpu else usual_cpu()
    driven = Driven(paths, policy=policy, shed=shed, batching=batching, batch_rows=1000, queue_rows=5000)
    slots = {device.name: device.slots for device in paths.devices}
    now, cancelled = 0.0, set()
    waiting: set[int] = set()

    def check() -> None:
        for device, count in slots.items():
            assert sum(b.path.threads for b in driven.running if b.path.device == device) <= count
        waiting.difference_update(driven.shed, (q.number for b in driven.batches for q in b.queries))
        assert driven.scheduler.waiting_queries == len(waiting)

    for kind, amount, target_ms, path in events:
        now += amount * 1e-6
        if kind == "submit":
            waiting.add(driven.submit(amount, now, target_ms, path).number)
        elif kind in ("finish", "fail") and driven.running:
            batch = driven.running[amount % len(driven.running)]
            if kind == "finish":
                driven.finish(batch, max(now, batch.started))
            else:
                driven.running.remove(batch)
                driven.scheduler.fail(batch, now)
            driven.start(now)
        elif kind == "cancel" and waiting:
            number = sorted(waiting)[amount % len(waiting)]
            assert driven.scheduler.cancel(number)
            waiting.discard(number)
            cancelled.add(number)
        elif kind == "wait":
            now += target_ms / 1e3
            driven.start(now)
        check()
    while driven.running:
        now += 1e-3
        driven.finish(driven.running[0], now)
        driven.start(now)
        check()
    if shed and (wake := driven.scheduler.wake_at(now)) is not None:
        driven.start(wake)
    assert driven.scheduler.waiting_queries == driven.scheduler.waiting_rows == 0
    served = [query.number for batch in driven.batches for query in batch.queries]
    assert len(served) == len(set(served))
    assert sorted([*served, *driven.shed, *cancelled]) == list(range(driven.number))
    for batch in driven.batches:
        assert batch.rows <= 1000 or len(batch.queries) == 1
        assert batching or len(batch.queries) == 1
        assert isinstance(batch, Batch)
    assert sum(driven.scheduler.shares().values()) == sum(batch.rows for batch in driven.batches)
