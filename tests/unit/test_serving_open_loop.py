"""The open loop: sends at its times whatever the answers do, and loses no query."""

import asyncio
import time
from typing import Any

import pytest

from tightrec.serving.load import open_loop
from tightrec.serving.load.open_loop import Driven, Reply, drive


def test_sending_never_waits_for_answers() -> None:
    async def run() -> Driven:
        everyone, sent = asyncio.Event(), 0

        async def ask(number: int, rows: int, arrived: float) -> Reply:
            nonlocal sent
            sent += 1
            if sent == 30:
                everyone.set()
            # A closed loop would never get here thirty times.
            await asyncio.wait_for(everyone.wait(), 20)
            return Reply(path="a")

        return await drive([(i / 1000, i + 1) for i in range(30)], 0.5, ask)

    driven = asyncio.run(run())
    assert driven.most_waiting == 30
    assert sorted(outcome.rows for outcome in driven.outcomes) == list(range(1, 31))
    assert not driven.failures
    assert not driven.interrupted


def test_latency_counts_from_the_intended_arrival_and_lag_is_kept() -> None:
    async def ask(number: int, rows: int, arrived: float) -> Reply:
        if number == 0:
            time.sleep(0.2)
        return Reply(path="a")

    driven = asyncio.run(drive([(0.0, 1), (0.01, 1), (0.3, 1)], 0.05, ask))
    by_arrival = {outcome.arrived: outcome for outcome in driven.outcomes}
    assert max(driven.lags_s) >= 0.18
    assert len(driven.lags_s) == 3
    assert (by_arrival[0.01].latency_s or 0) >= 0.18
    assert not by_arrival[0.01].in_target


@pytest.mark.parametrize("timer", [True, False])
def test_nothing_is_sent_before_its_time(timer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not timer:
        monkeypatch.setattr(open_loop, "_timer", lambda: None)

    async def ask(number: int, rows: int, arrived: float) -> Reply:
        return Reply(path="a")

    driven = asyncio.run(drive([(i * 0.0037, 1) for i in range(40)], 1, ask))
    assert len(driven.lags_s) == 40
    assert min(driven.lags_s) >= 0


def test_what_asking_raises_is_a_failure_of_that_query_alone() -> None:
    async def ask(number: int, rows: int, arrived: float) -> Reply:
        if number == 1:
            raise RuntimeError("broken")
        return Reply(shed="late") if number == 2 else Reply(path="a")

    driven = asyncio.run(drive([(0.0, 1), (0.001, 1), (0.002, 1)], lambda number: 0.1 * (number + 1), ask))
    assert driven.failures == {"RuntimeError: broken": 1}
    assert [(o.path, o.shed, o.target_s) for o in sorted(driven.outcomes, key=lambda o: o.arrived)] == [
        ("a", None, 0.1),
        (None, None, 0.2),
        (None, "late", pytest.approx(0.3)),
    ]


def test_a_stopped_run_keeps_what_it_has_and_counts_what_it_gives_up(monkeypatch: Any) -> None:
    monkeypatch.setattr(open_loop, "GRACE_S", 0.05)

    async def run() -> Driven:
        stop = asyncio.Event()

        async def ask(number: int, rows: int, arrived: float) -> Reply:
            if number == 3:
                stop.set()
            if number in (2, 3):
                await asyncio.sleep(1000)
            return Reply(path="a")

        return await asyncio.wait_for(drive([(i * 0.01, 1) for i in range(1000)], 1, ask, stop=stop), 20)

    driven = asyncio.run(run())
    assert driven.interrupted
    assert driven.unanswered == 2
    assert 2 <= len(driven.outcomes) < 10
