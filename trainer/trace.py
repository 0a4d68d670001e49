"""A profiler trace of a few steps, for a trace viewer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, record_function

STEPS = 3


class StepTrace:
    """Writes ``trace-rankR.json`` (Chrome's format) of up to ``STEPS`` steps from ``first`` on.

    Args:
        first: the first step, counted from 1; None: no trace.
    """

    def __init__(self, folder: Path, rank: int, first: int | None) -> None:
        self._path = folder / f"trace-rank{rank}.json"
        self._first = first
        self._profile: profile | None = None

    def covers(self, step: int) -> bool:
        """Whether ``step`` is one of the steps to trace."""
        return self._first is not None and self._first <= step < self._first + STEPS

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Trace a covered step; the trace is written when the last one ends."""
        assert self._first is not None
        if self._profile is None:
            self._profile = profile(record_shapes=True)
            self._profile.start()
        with record_function(f"step {step}"):
            yield
        if step == self._first + STEPS - 1:
            self.close()

    def close(self) -> bool:
        """Write what has been traced so far; False if a trace was asked for and there is none."""
        if self._profile is not None:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._path))
            self._profile, self._first = None, None
        return self._first is None
