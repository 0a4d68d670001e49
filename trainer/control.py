"""What ranks agree on while they train: when to stop, and that every loss was a number."""

import signal
import time
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor
from torch import distributed as dist

from tightrec.trainer.data.batch import Batch

_STOP, _NOT_A_NUMBER = 0, 1


class NotANumber(ArithmeticError):
    """The loss was NaN or infinite; the message says at which step, on which rank and with which batch."""

    def __init__(self, words: str, step: int) -> None:
        super().__init__(words)
        self.step = step


@dataclass
class StopRequest:
    """Set by SIGTERM and Ctrl-C; the loop looks at it between steps."""

    signal_name: str | None = None
    """The first signal that asked."""

    asked_at: float = 0.0
    """When, on the monotonic clock."""


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request to stop at the next agreed step, inside the ``with``.

    A second Ctrl-C, a second or more after the first, interrupts at once: torchrun passes on the terminal's
    own Ctrl-C, so that a rank sees the first one twice.
    """
    request = StopRequest()

    def ask(number: int, _frame: FrameType | None) -> None:
        late = request.signal_name is not None and time.monotonic() - request.asked_at > 1.0
        if number == signal.SIGINT and late:
            raise KeyboardInterrupt
        if request.signal_name is None:
            request.signal_name = signal.Signals(number).name
            request.asked_at = time.monotonic()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Control:
    """Agreement over ranks every few steps, without waiting for the slowest one.

    An all-reduce on a gloo group of its own starts at one agreement point and is read at the next, so that
    it costs no exposed time; ranks therefore stop at the same step, at most two intervals late.

    Args:
        group: a gloo group over all ranks, used by nobody else.
        every: steps between agreement points.
    """

    def __init__(self, group: dist.ProcessGroup, every: int, request: StopRequest) -> None:
        self._group = group
        self._every = every
        self._request = request
        self._flags: Tensor | None = None
        self._work: dist.Work | None = None
        self._losses: deque[tuple[int, Tensor, Batch]] = deque()
        self._first_bad: tuple[int, str] | None = None

    def watch(self, step: int, loss: Tensor, batch: Batch) -> None:
        """Remember a step's loss [scalar] until the next agreement point; does not synchronise."""
        self._losses.append((step, loss, batch))

    def point(self, step: int, now: bool = False) -> bool:
        """Call after step ``step`` on every rank; True once all ranks are to stop.

        Args:
            now: wait for this point's own answer, as before a checkpoint.

        Raises:
            NotANumber: on every rank, if any rank's loss was not finite.
        """
        if not now and step % self._every:
            return False
        flags = self._settle()
        self._launch()
        if now:
            flags = self._settle() or flags
        return bool(flags and flags[_STOP])

    def _launch(self) -> None:
        self._check_losses()
        flags = torch.tensor(
            [self._request.signal_name is not None, self._first_bad is not None], dtype=torch.int32
        )
        self._flags = flags
        self._work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _settle(self) -> list[bool] | None:
        if self._work is None or self._flags is None:
            return None
        self._work.wait()
        flags = [bool(flag) for flag in self._flags]
        self._work = self._flags = None
        if flags[_NOT_A_NUMBER]:
            found: list[tuple[int, str] | None] = [None] * dist.get_world_size(self._group)
            dist.all_gather_object(found, self._first_bad, group=self._group)
            step, rank, batch = min((bad[0], rank, bad[1]) for rank, bad in enumerate(found) if bad)
            raise NotANumber(
                f"the loss of step {step} on rank {rank} is not a finite number; batch {batch}", step
            )
        return flags

    def _check_losses(self) -> None:
        if self._losses and self._first_bad is None:
            finite = torch.isfinite(torch.stack([loss for _, loss, _ in self._losses])).tolist()
            for (step, _, batch), ok in zip(self._losses, finite, strict=True):
                if not ok:
                    self._first_bad = (step, fingerprint(batch))
                    break
        self._losses.clear()


def fingerprint(batch: Batch) -> str:
    """Short text that identifies a batch's contents: CRC-32 of every part, and what is odd in it."""
    parts = {
        "dense": batch.dense,
        "ids": batch.sparse.values(),
        "lengths": batch.sparse.lengths(),
        "labels": batch.labels,
    }
    inverse = batch.sparse.inverse_indices_or_none()
    if inverse is not None:
        parts["inverse"] = inverse[1]
    words = [
        f"{name} {zlib.crc32(part.detach().cpu().contiguous().numpy().tobytes()):08x}"
        for name, part in parts.items()
    ]
    odd = int((~torch.isfinite(batch.dense)).sum())
    note = f", {odd} dense value(s) not finite" if odd else ""
    return f"of {int(batch.weights.sum())} rows ({', '.join(words)}{note})"
