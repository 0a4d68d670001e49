"""Profiles a training step now and then, to say where its time goes."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tightrec.trainer.step_split import STEP, Event, TimeSplit, mean, split_step

_HOST_EVENTS = ("cpu_op", "user_annotation")
_DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")


class StepProfiler:
    """Splits the time of every ``every``-th step; a step that is not sampled costs nothing.

    A sampled step runs under torch.profiler: on CPU that adds about 5 us an operator, which the split
    includes. On CUDA the step is synchronised before and after.

    Every rank must sample the same steps, or those that do not sample wait for those that do.

    Args:
        every: steps between samples; 0: never.
        device: where the step computes.
    """

    def __init__(self, every: int, device: torch.device) -> None:
        self._every = every
        self._device = device
        self._splits: list[TimeSplit] = []
        if every:
            # The profiler writes two lines to stderr at each use, at a level above all others.
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            # Its first use in a process takes a second, which would stand in a step's time otherwise.
            with profile(activities=self._activities()):
                pass

    def step(self, step: int) -> AbstractContextManager[None]:
        """Put around step number ``step``, counted from 0; samples it if it is due.

        A step that runs under somebody else's profiler is not sampled: there can be one at a time.
        """
        due = self._every and (step + 1) % self._every == 0
        return self._sampled() if due and not torch.autograd._profiler_enabled() else nullcontext()

    def take(self) -> TimeSplit | None:
        """The mean over the steps sampled since the last call; None if there was none."""
        splits, self._splits = self._splits, []
        return mean(splits) if splits else None

    @contextmanager
    def _sampled(self) -> Iterator[None]:
        self._synchronise()
        with profile(activities=self._activities()) as recorded, record_function(STEP):
            yield
            self._synchronise()
        self._splits.append(split_step(_events(recorded)))

    def _activities(self) -> list[ProfilerActivity]:
        on_device = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        return [ProfilerActivity.CPU, *on_device]

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _events(recorded: profile) -> Iterator[Event]:
    """What the profiler recorded; read raw, because ``recorded.events()`` takes ten times as long."""
    for raw in recorded.profiler.kineto_results.events():
        kind: Any = raw.activity_type()
        if kind in _DEVICE_EVENTS:
            yield Event(
                name=raw.name(),
                start_ns=raw.start_ns(),
                end_ns=raw.end_ns(),
                kernel=True,
                launched_by=raw.linked_correlation_id(),
            )
        elif kind in _HOST_EVENTS and not raw.is_async():
            yield Event(
                name=raw.name(),
                start_ns=raw.start_ns(),
                end_ns=raw.end_ns(),
                thread=raw.start_thread_id(),
                id=raw.correlation_id(),
            )
