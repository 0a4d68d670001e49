"""Parts of the server without processes: counts of the last seconds, dispatching, settings, draining."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from serving_made import made_path, made_set

from tightrec.serving.paths import Device, PathSet, ServingPath
from tightrec.serving.scheduling.scheduler import Scheduler, SchedulerConfig
from tightrec.serving.server import serve
from tightrec.serving.server.config import ServeConfig
from tightrec.serving.server.dispatch import Dispatcher, Refused
from tightrec.serving.server.live import SECONDS, Live
from tightrec.serving.server.metrics import Metrics
from tightrec.serving.workers.pool import NoWorker, Scored, WorkerFailed, WorkerPool
from tightrec.snapshot.inputs import Batch

PATHS = made_set([made_path("one", "x"), made_path("two", "x", threads=2, accuracy=0.9, factor=0.5)], slots=2)


class StubPool:
    """Scores each row with its path's number of threads, unless told otherwise."""

    def __init__(self, step: int = 1) -> None:
        self.steps = {"one": step, "two": step}
        self.down: set[str] = set()
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.ran: list[tuple[str, list[int]]] = []
        self.alive = [1, 2]

    def pids(self) -> list[int]:
        return self.alive

    def can_run(self, path: ServingPath) -> bool:
        return path.name not in self.down

    async def score(self, path: ServingPath, queries: Sequence[Batch], patience_s: float) -> Scored:
        self.ran.append((path.name, [len(query) for query in queries]))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        found = [np.full(len(query), path.threads, np.float32) for query in queries]
        return Scored(scores=found, compute_ms=1.0)

    async def close(self) -> None:
        pass


def rows(count: int) -> Batch:
    empty = torch.zeros(0, dtype=torch.int64)
    return Batch(dense=torch.zeros(count, 0), ids=empty, offsets=empty, of_torch=False)


def dispatching(
    work: Callable[[Dispatcher, StubPool], Coroutine[Any, Any, None]], policy: str = "multi"
) -> None:
    async def run() -> None:
        pool: Any = StubPool()
        metrics = Metrics(["one", "two"])
        dispatcher = Dispatcher(Scheduler(PATHS, SchedulerConfig(policy=policy)), pool, metrics)
        async with asyncio.timeout(30):
            await work(dispatcher, pool)

    asyncio.run(run())


def ask(dispatcher: Dispatcher, count: int = 4, target_s: float = 60.0, path: str | None = None) -> Any:
    return asyncio.create_task(dispatcher.score(rows(count), target_s, path, time.monotonic()))


def test_queries_that_wait_together_are_one_batch_and_get_their_own_scores():
    async def work(dispatcher: Dispatcher, pool: StubPool) -> None:
        pool.gate.clear()
        asked = [ask(dispatcher, count, path="two") for count in (5, 1, 2, 3)]
        await asyncio.sleep(0.01)
        pool.gate.set()
        answers = await asyncio.gather(*asked)
        assert [len(answer.scores) for answer in answers] == [5, 1, 2, 3]
        assert pool.ran == [("two", [5]), ("two", [1, 2, 3])]
        assert all(answer.path == "two" and answer.version == "1" for answer in answers)
        assert not dispatcher.busy

    dispatching(work)


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (WorkerFailed("worker cpu-1-0 died."), WorkerFailed, "worker cpu-1-0 died"),
        (NoWorker("none."), Refused, "unavailable"),
        (KeyError("a mistake of ours"), WorkerFailed, "the batch failed"),
    ],
)
def test_a_batch_without_scores_is_told_to_all_its_queries_and_its_slots_are_free_again(
    error: Exception, raised: type[Exception], said: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.CRITICAL)

    async def work(dispatcher: Dispatcher, pool: StubPool) -> None:
        pool.error = error
        for result in await asyncio.gather(*(ask(dispatcher) for _ in range(6)), return_exceptions=True):
            assert isinstance(result, raised) and said in str(result)
        pool.error = None
        assert len((await ask(dispatcher)).scores) == 4

    dispatching(work)


def test_a_path_whose_batches_fail_is_left_for_one_that_works():
    async def work(dispatcher: Dispatcher, pool: StubPool) -> None:
        pool.error = WorkerFailed("a device that is gone.")
        for _ in range(3):
            with pytest.raises(WorkerFailed):
                await ask(dispatcher)
        pool.error = None
        assert (await ask(dispatcher)).path == "one"
        assert (await ask(dispatcher, path="two")).path == "two"

    dispatching(work, policy="greedy")


def test_a_batch_that_may_have_waited_for_a_worker_teaches_nothing():
    async def work(dispatcher: Dispatcher, pool: StubPool) -> None:
        for alive, learns in (([1], False), ([1, 2], True)):
            pool.alive = alive
            pool.gate.clear()
            asked = ask(dispatcher, path="two")
            await asyncio.sleep(0.1)
            pool.gate.set()
            await asked
            assert (dispatcher.scheduler.correction("two") != 1.0) == learns

    dispatching(work)


def test_a_scheduler_that_fails_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.CRITICAL)

    async def work(dispatcher: Dispatcher, pool: StubPool) -> None:
        pool.gate.clear()
        running = ask(dispatcher, path="two")
        await asyncio.sleep(0.01)
        waiting = ask(dispatcher, path="two")
        await asyncio.sleep(0.01)
        with monkeypatch.context() as broken:
            broken.setattr(dispatcher.scheduler, "_start", lambda *_: 1 // 0)
            asked = ask(dispatcher, path="two")
            for one in (waiting, asked):
                with pytest.raises(WorkerFailed, match="the scheduler failed"):
                    await one
        pool.gate.set()
        assert len((await running).scores) == len((await ask(dispatcher)).scores) == 4
        assert not dispatcher.busy

    dispatching(work)


def test_a_query_whose_start_raises_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    async def work(dispatcher: Dispatcher, pool: StubPool) -> None:
        with monkeypatch.context() as broken:
            broken.setattr(dispatcher, "_advance", lambda: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                await ask(dispatcher)
        assert not dispatcher.busy

    dispatching(work)


def test_another_path_stands_in_while_the_workers_of_one_are_replaced():
    async def work(dispatcher: Dispatcher, pool: StubPool) -> None:
        assert (await ask(dispatcher)).path == "two"
        pool.down = {"two"}
        answer = await ask(dispatcher)
        assert answer.path == "one" and set(answer.scores.tolist()) == {1.0}
        assert (await ask(dispatcher, path="two")).path == "two"  # waits for its own worker
        pool.down = {"one", "two"}
        assert (await ask(dispatcher)).path == "two"

    dispatching(work, policy="greedy")


def test_who_goes_is_forgotten_and_the_others_are_scored():
    async def work(dispatcher: Dispatcher, pool: StubPool) -> None:
        pool.gate.clear()
        running, going, staying = (ask(dispatcher, count, path="two") for count in (1, 2, 3))
        await asyncio.sleep(0.01)
        assert dispatcher.scheduler.waiting_queries == 2
        going.cancel()
        await asyncio.sleep(0.01)
        assert dispatcher.scheduler.waiting_queries == 1
        pool.gate.set()
        assert [len((await one).scores) for one in (running, staying)] == [1, 3]

    dispatching(work)


def test_what_waits_past_its_target_is_shed_without_anything_else_happening():
    async def work(dispatcher: Dispatcher, pool: StubPool) -> None:
        pool.gate.clear()
        running = ask(dispatcher, path="two")
        await asyncio.sleep(0.01)
        late = ask(dispatcher, target_s=0.2, path="two")
        with pytest.raises(Refused, match="late"):
            await late
        assert not running.done()
        pool.gate.set()
        await running

    dispatching(work)


def test_after_a_swap_batches_go_to_the_new_pool_and_running_ones_end_in_the_old():
    async def work(dispatcher: Dispatcher, pool: StubPool) -> None:
        pool.gate.clear()
        before = ask(dispatcher, path="two")
        waiting = ask(dispatcher, path="two")
        await asyncio.sleep(0.01)
        new: Any = StubPool(step=2)
        old = dispatcher.swap(new)
        idle = asyncio.create_task(old.idle())
        await asyncio.sleep(0.01)
        assert not idle.done()
        pool.gate.set()
        assert (await before).version == "1" and (await waiting).version == "2"
        await idle
        assert pool.ran == [("two", [4])] and new.ran == [("two", [4])]

    dispatching(work)


def test_live_windows_count_the_last_whole_seconds_alone():
    now = 100.5
    live = Live(lambda: now)
    for second in range(70):
        now = 100.5 + second
        for place in range(100):
            live.served("a" if place < 75 else "b", 10, (place + 1) / 1e3, in_target=place < 90)
        live.shed("late")
    now = 170.1
    window = live.window(10)
    assert window["queries_per_s"] == 100 and window["rows_per_s"] == 1000 and window["late"] == 100
    assert window["shares"] == {"a": 0.75, "b": 0.25} and window["shed"] == {"late": 10}
    assert window["shed_share"] == pytest.approx(1 / 101)
    for name, expected in (("p50_ms", 50), ("p95_ms", 95), ("p99_ms", 99)):
        assert window[name] == pytest.approx(expected, rel=0.05)
    assert live.window(60)["queries_per_s"] == 100
    now = 170.1 + SECONDS
    empty = live.window(60)
    assert empty["queries_per_s"] == 0 and empty["p99_ms"] is None and empty["shares"] == {}


def test_paths_are_fitted_to_the_cores_of_this_machine():
    said: list[str] = []
    fitted = serve.usable(PATHS, 1, said.append)
    assert [path.name for path in fitted.paths] == ["one"] and fitted.device("cpu").slots == 1
    assert len(said) == 2 and "path two is left out" in said[1]
    assert serve.usable(PATHS, 8, said.append).device("cpu").slots == 8
    only = dataclasses.replace(PATHS, paths=(PATHS.path("two"),))
    with pytest.raises(ValueError, match="every path takes more than 1"):
        serve.usable(only, 1, said.append)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"port": -1}, "port=-1"),
        ({"max_rows": 0}, "max_rows=0"),
        ({"max_rows": 10, "queue_rows": 9}, "queue_rows=9"),
        ({"target_ms": 0.0}, "target_ms=0.0"),
        ({"target_ms": float("nan")}, "target_ms=nan"),
        ({"target_ms": 3_600_001.0}, "target_ms=3600001.0 must be at most 3600000"),
        ({"drain_s": float("inf")}, "drain_s=inf"),
        ({"cores": 0}, "cores=0"),
        ({"model": "a/b"}, "model='a/b'"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(changes: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        ServeConfig(**{"paths": Path("paths.json"), **changes})


def test_more_connections_than_files_are_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    allowed: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr(serve.resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(serve.resource, "setrlimit", lambda what, limits: allowed.append((what, limits)))
    with pytest.raises(ValueError, match=r"max_connections=4000 needs 4512 open files, .* allows 4096"):
        serve._allow_files(4000)
    serve._allow_files(2000)
    serve._allow_files(100)
    assert allowed == [(serve.resource.RLIMIT_NOFILE, (2512, 4096))]


@pytest.mark.parametrize(("signals", "drain_s"), [(0, 0.05), (1, 60.0)])
def test_draining_ends_with_its_time_and_with_a_second_signal(signals: int, drain_s: float):
    async def run() -> int:
        stops: asyncio.Queue[None] = asyncio.Queue()
        for _ in range(signals):
            stops.put_nowait(None)
        stuck: Any = SimpleNamespace(
            infer=SimpleNamespace(active=1, draining=False), dispatcher=SimpleNamespace(busy=True)
        )
        config = ServeConfig(paths=Path("x"), drain_s=drain_s)
        async with asyncio.timeout(20):
            return await serve._drain(config, stuck, stops)

    assert asyncio.run(run()) == 1


def test_a_recorded_device_is_refused_by_name(tmp_path: Path):
    paths = PathSet(
        devices=(Device(name="cuda:0", slots=1, recorded=True),),
        paths=(dataclasses.replace(made_path("far", tmp_path), device="cuda:0"),),
    )
    with pytest.raises(ValueError, match="path far is on cuda:0, whose profiles were recorded elsewhere"):
        asyncio.run(WorkerPool().start(paths))
