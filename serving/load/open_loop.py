"""Sends queries at their times whatever the answers do: an open loop, as users are.

Latency counts from the *intended* arrival, so that a sender that falls behind makes latencies longer instead
of hiding them (coordinated omission); how far it fell behind is kept beside them.
"""

import asyncio
import ctypes
import os
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tightrec.serving.outcomes import Outcome

GRACE_S = 1.0
"""How long an interrupted run waits for the answers that are due, in seconds."""

_START_S = 0.05
_MONOTONIC, _ABSOLUTE = 1, 1


@dataclass(frozen=True, slots=True)
class Reply:
    """How a query was answered: by a path, by a word on why it was shed, or not as it should be."""

    path: str | None = None
    """Path that scored it."""

    shed: str | None = None
    """Why it was shed."""

    failure: str | None = None
    """What went wrong, in a sentence."""


Ask = Callable[[int, int, float], Awaitable[Reply]]
"""Sends query number i with so many rows, meant to arrive at a moment of ``time.monotonic()``; must end. What
it raises is a failure."""


@dataclass(kw_only=True)
class Driven:
    """What a run saw."""

    outcomes: list[Outcome] = field(default_factory=list)
    """Of every query that was answered or failed, in order of its end; times in seconds from the start."""

    lags_s: list[float] = field(default_factory=list)
    """Of every query that was sent: how long after its arrival."""

    failures: Counter[str] = field(default_factory=Counter)
    """Queries by what went wrong."""

    unanswered: int = 0
    """Queries that an interrupted run sent and gave up."""

    most_waiting: int = 0
    """Most queries that were sent and not yet answered at one time."""

    interrupted: bool = False
    """Whether it was stopped before the last arrival."""

    seconds: float = 0.0
    """From the start until sending ended."""


async def drive(
    queries: Sequence[tuple[float, int]],
    target_s: Callable[[int], float] | float,
    ask: Ask,
    *,
    stop: asyncio.Event | None = None,
    seen: Callable[[Outcome], None] | None = None,
) -> Driven:
    """Send ``queries`` (second of arrival, rows; ascending) at their times and wait for every answer.

    Args:
        target_s: latency target of every query, or of query number i.
        stop: ends sending when it is set; what is due gets a second.
        seen: called with every outcome as it comes.
    """
    driven = Driven()
    waiting: set[asyncio.Task[None]] = set()
    idle = asyncio.Event()
    alarm = Alarm()
    begin = time.monotonic() + _START_S

    async def one(number: int, arrived: float, rows: int) -> None:
        driven.lags_s.append(time.monotonic() - begin - arrived)
        try:
            reply = await ask(number, rows, begin + arrived)
        except Exception as error:  # a query is never lost, whatever went wrong with it
            reply = Reply(failure=f"{type(error).__name__}: {error}")
        finished = time.monotonic() - begin if reply.path is not None else None
        target = target_s if isinstance(target_s, float | int) else target_s(number)
        outcome = Outcome(
            rows=rows,
            arrived=arrived,
            target_s=target,
            finished=finished,
            path=reply.path,
            shed=reply.shed,
        )
        driven.outcomes.append(outcome)
        if reply.failure is not None:
            driven.failures[reply.failure] += 1
        if seen is not None:
            seen(outcome)

    def ended(task: asyncio.Task[None]) -> None:
        waiting.discard(task)
        if not waiting:
            idle.set()

    try:
        for number, (arrived, rows) in enumerate(queries):
            await alarm.until(begin + arrived)
            if stop is not None and stop.is_set():
                driven.interrupted = True
                break
            task = asyncio.get_running_loop().create_task(one(number, arrived, rows))
            waiting.add(task)
            idle.clear()
            task.add_done_callback(ended)
            driven.most_waiting = max(driven.most_waiting, len(waiting))
        driven.seconds = max(time.monotonic() - begin, 0.0)
        while waiting and not (stop is not None and stop.is_set()):
            await _first(idle, stop)
        if waiting:
            driven.interrupted = True
            await asyncio.wait(set(waiting), timeout=GRACE_S)
        driven.unanswered = len(waiting)
    finally:
        alarm.close()
        for task in waiting:
            task.cancel()
    return driven


async def _first(*events: asyncio.Event | None) -> None:
    """Wait until one of ``events`` is set."""
    waits = [asyncio.ensure_future(event.wait()) for event in events if event is not None]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


class Alarm:
    """Waits until a moment of ``time.monotonic()`` with a kernel timer.

    Event loops wait in whole milliseconds, which is much beside a target of 5 ms. Without Linux's timerfd
    they must do.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._descriptor = _timer()
        self._rung: asyncio.Future[None] | None = None
        if self._descriptor is not None:
            self._loop.add_reader(self._descriptor, self._ring)

    async def until(self, moment: float) -> None:
        """Return at ``moment``, or after one turn of the event loop if that has passed."""
        left = moment - time.monotonic()
        if left <= 0 or self._descriptor is None:
            # At least once, and again where the event loop rounds to before the moment.
            await asyncio.sleep(max(left, 0))
            while self._descriptor is None and (left := moment - time.monotonic()) > 0:
                await asyncio.sleep(max(left, 1e-4))
            return
        self._rung = self._loop.create_future()
        _set(self._descriptor, moment)
        try:
            await self._rung
        finally:
            self._rung = None

    def close(self) -> None:
        """Give the timer back; twice is no mistake."""
        if self._descriptor is not None:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def _ring(self) -> None:
        assert self._descriptor is not None
        os.read(self._descriptor, 8)
        if self._rung is not None and not self._rung.done():
            self._rung.set_result(None)


class _Span(ctypes.Structure):
    """The C library's ``struct itimerspec``."""

    _fields_ = [
        ("every_s", ctypes.c_long),
        ("every_ns", ctypes.c_long),
        ("at_s", ctypes.c_long),
        ("at_ns", ctypes.c_long),
    ]


@cache
def _library() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _timer() -> int | None:
    """A timer's descriptor, None where there are none; it does not block."""
    if not sys.platform.startswith("linux"):
        return None
    found = _library().timerfd_create(_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    return None if found < 0 else found


def _set(descriptor: int, moment: float) -> None:
    at_ns = round(moment * 1e9)
    span = _Span(0, 0, at_ns // 1_000_000_000, at_ns % 1_000_000_000)
    if _library().timerfd_settime(descriptor, _ABSOLUTE, ctypes.byref(span), None) < 0:
        raise OSError(ctypes.get_errno(), "timerfd_settime")
