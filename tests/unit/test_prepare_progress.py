"""Progress is told with rows/s and time left, as a bar on a terminal and in lines elsewhere."""

import io
import re
import time

import pytest
from rich.console import Console

from tightrec.trainer.data.prepare import progress
from tightrec.trainer.data.prepare.progress import Meter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_come_now_and_then_and_at_the_end(clock: Clock) -> None:
    told = io.StringIO()
    with Meter("reading [day] {0}", 1_000, 200, Console(file=told, width=100)) as meter:
        for second in range(1, 41):
            clock.now = 100.0 + second
            meter.update(200 + second * 20, 500)
    assert told.getvalue().splitlines() == [
        "reading [day] {0}: 42%, 500 rows/s, 29 s left",
        "reading [day] {0}: 64%, 500 rows/s, 18 s left",
        "reading [day] {0}: 86%, 500 rows/s, 7 s left",
        "reading [day] {0}: 100%, 500 rows/s, took 40 s",
    ]


def test_a_terminal_shows_a_bar() -> None:
    told = io.StringIO()
    console = Console(file=told, force_terminal=True, width=100)
    with Meter("reading [day] {0}", 1_000, 0, console) as meter:
        for read_bytes in (100, 300, 500):
            meter.update(read_bytes, 10)
            time.sleep(0.01)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told.getvalue())
    assert re.search(r"reading \[day\] \{0\} .* 50% [\d,]+ rows/s \d:\d\d:\d\d", text)


def test_a_run_that_fails_does_not_claim_to_be_complete(clock: Clock) -> None:
    told = io.StringIO()
    with pytest.raises(ValueError, match="bad"), Meter("reading", 10, 0, Console(file=told)) as meter:  # noqa: PT012
        meter.update(5, 1)
        raise ValueError("bad")
    assert told.getvalue() == ""
