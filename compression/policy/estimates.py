"""What a byte costs on this job's link, and a value in each of the codec's modes, both measured.

``LinkEstimate`` is fed the sizes and times of exchanges, ``ModeTrial`` encodes and decodes a sampled block in
every mode. ``choice`` predicts from them.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tightrec.compression.bounds import BoundLike, Bounds
from tightrec.compression.codebooks import Codebooks, ReceivedCodebooks
from tightrec.compression.codec import (
    MODES,
    Mode,
    Modes,
    decode,
    decode_scratch_bytes,
    encode,
    encode_scratch_bytes,
)
from tightrec.compression.frames import Frames
from tightrec.compression.layout import Layout
from tightrec.compression.telemetry import frame_tables

_APART = 0.25
"""Sizes tell what a byte costs where they differ by this share of the largest one."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What an exchange takes: ``latency_s + bytes * seconds_per_byte``."""

    latency_s: float
    """Seconds of an exchange of no bytes: messages, waiting for slower ranks."""
    seconds_per_byte: float
    """Of a byte on a rank's wire; 0 where no difference can be measured."""
    fitted: bool
    """Whether exchanges of different sizes were seen. If not, the latency is an old one or 0, and then a byte
    seems to cost more than it does."""

    def seconds(self, wire_bytes: float) -> float:
        """What an exchange of so many bytes takes."""
        return self.latency_s + wire_bytes * self.seconds_per_byte

    @property
    def gb_s(self) -> float:
        """The rate, 10^9 bytes a second; infinite where a byte costs nothing."""
        return 1e-9 / self.seconds_per_byte if self.seconds_per_byte else math.inf


class LinkEstimate:
    """The link as recent exchanges show it, on one rank.

    A line through (bytes, seconds) by the median of the slopes between all pairs of exchanges of different
    size (Theil 1950, Sen 1968): up to a fourth of the exchanges may have waited for something else.

    Args:
        window: how many exchanges are looked back at.
    """

    def __init__(self, window: int = 64) -> None:
        if window < 2:
            raise ValueError(f"window={window}: a line needs at least 2 exchanges")
        self._recent: deque[tuple[float, float]] = deque(maxlen=window)
        self._latency = 0.0

    def record(self, wire_bytes: float, seconds: float) -> None:
        """Note one exchange. Only appends.

        Args:
            wire_bytes: to or from other ranks, whichever is more here.
            seconds: what it took.
        """
        self._recent.append((wire_bytes, seconds))

    def estimate(self) -> Link | None:
        """The line now; None before the first exchange of any bytes. Not for every step: it sorts pairs."""
        samples = np.array([s for s in self._recent if math.isfinite(s[1]) and s[1] >= 0.0], dtype=np.float64)
        size, seconds = samples.reshape(-1, 2).T
        if not size.any():
            return None
        apart = size[:, None] - size[None, :]
        first, second = np.nonzero(apart > _APART * size.max())
        if not len(first):  # all of one size: only how far the seconds exceed a latency known from before
            latency = min(self._latency, float(seconds.min()))
            rest = max(float(np.median(seconds)) - latency, 0.0)
            return Link(latency_s=latency, seconds_per_byte=rest / float(np.median(size)), fitted=False)
        slope = float(np.median((seconds[first] - seconds[second]) / apart[first, second]))
        if slope <= 0.0:  # larger exchanges take no longer
            self._latency = float(np.median(seconds))
            return Link(latency_s=self._latency, seconds_per_byte=0.0, fitted=True)
        self._latency = float(np.median(seconds - slope * size))
        if self._latency < 0.0:  # a line through the origin is nearer to what can be
            self._latency = 0.0
            sized = size > 0
            slope = float(np.median(seconds[sized] / size[sized]))
        return Link(latency_s=self._latency, seconds_per_byte=slope, fitted=True)

    def probe_bytes(self, plain_bytes: int) -> int | None:
        """A size worth timing a few times because recent exchanges say nothing about it; None if all is seen.

        What plain rows would take cannot be told from exchanges of small frames alone, nor what a byte costs
        from exchanges of one size. Ranks differ in what they sent: agree on the answer before acting on it.

        Args:
            plain_bytes: what a rank would send without compression.
        """
        largest = max((size for size, _ in self._recent), default=0.0)
        smallest = min((size for size, _ in self._recent), default=math.inf)
        if largest < plain_bytes / 2:
            return plain_bytes
        return plain_bytes // 16 if smallest > plain_bytes / 4 else None


@dataclass(frozen=True, kw_only=True)
class ModeCost:
    """What one mode makes of a block, and takes for it."""

    bytes_per_value: float
    """Payload and block header; a codebook not counted, as it comes along once."""
    encode_s: float
    """Seconds for each value more."""
    decode_s: float
    """The same of decode."""
    encode_call_s: float
    """Seconds of a call apart from its values."""
    decode_call_s: float
    """The same of decode."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A block tried in every mode."""

    values: int
    """Values of the block."""
    costs: dict[Mode, ModeCost]
    """For each mode."""


class ModeTrial:
    """Encodes and decodes a sampled block in every mode and times both.

    Times of one and of several copies of the block tell what a call costs from what a value costs; of each
    the fastest of some rounds counts. Nothing of the job's own codebooks or buffers is touched.

    Args:
        copies: of the block in the larger call, at least 2.
        rounds: how often each call is timed.
        max_rows: of the block that are tried: bounds what a trial takes.
        least_values: more copies are taken until the larger call has so many values, so that a device is
            busy; default 0 on the CPU and 2^22 on others.
        clock: seconds; for tests.
        backend: as in ``codec.encode``.
    """

    def __init__(
        self,
        *,
        copies: int = 4,
        rounds: int = 3,
        max_rows: int = 2048,
        least_values: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        backend: str = "",
    ) -> None:
        if copies < 2 or rounds < 1 or max_rows < 1:
            raise ValueError(
                f"copies={copies}, rounds={rounds}, max_rows={max_rows}: a trial needs at least 2 copies, 1 "
                f"round and 1 row"
            )
        self.copies = copies
        self.rounds = rounds
        self.max_rows = max_rows
        self.least_values = least_values
        self.clock = clock
        self.backend = backend

    def run(self, rows: Tensor, bound: BoundLike) -> Trial:
        """Try one block of a table: rows [N, D] for one peer, N at least 1.

        Waits for the device. The first call on a machine compiles the codec's loops.

        Raises:
            ValueError: there are no rows, or a shape or type that the codec does not take.
        """
        if rows.dim() != 2 or not rows.numel():
            raise ValueError(f"a trial needs rows [N, D] with N at least 1, not {tuple(rows.shape)}")
        block = rows.detach()[: self.max_rows].contiguous()
        least = self.least_values
        if least is None:
            least = 0 if block.device.type == "cpu" else 1 << 22
        copies = max(self.copies, -(-least // block.numel()))
        costs = {mode: self._cost(block, bound, mode, copies) for mode in MODES}
        return Trial(values=block.numel(), costs=costs)

    def _cost(self, block: Tensor, bound: BoundLike, mode: Mode, copies: int) -> ModeCost:
        used, encode_one, decode_one = self._times(block, bound, mode, 1)
        _, encode_all, decode_all = self._times(block, bound, mode, copies)
        encode_s, encode_call_s = _apart(encode_one, encode_all, copies, block.numel())
        decode_s, decode_call_s = _apart(decode_one, decode_all, copies, block.numel())
        return ModeCost(
            bytes_per_value=used / block.numel(),
            encode_s=encode_s,
            decode_s=decode_s,
            encode_call_s=encode_call_s,
            decode_call_s=decode_call_s,
        )

    def _times(self, block: Tensor, bound: BoundLike, mode: Mode, copies: int) -> tuple[int, float, float]:
        """Bytes of one block, and seconds of encode and decode of so many copies in one call."""
        device, backend = block.device, self.backend
        layout = Layout.flat([[len(block)]] * copies, [block.shape[1]])
        values = block.reshape(-1).repeat(copies)
        bounds, modes = Bounds.of(bound, layout.tables), Modes.of(mode, layout.tables)
        books = Codebooks(copies, 1, device) if mode in ("entropy", "auto") else None
        received = ReceivedCodebooks(copies, 1, device)
        needed = encode_scratch_bytes(
            layout, values.dtype, bounds, modes, codebooks=books is not None, device=device, backend=backend
        )
        scratch = torch.empty(needed, dtype=torch.uint8, device=device)
        needed = decode_scratch_bytes(layout, values.dtype, device=device, backend=backend)
        back = torch.empty(needed, dtype=torch.uint8, device=device)
        frames = Frames.empty(layout, values.dtype, device)
        again = torch.empty_like(values)
        status = torch.zeros(1, dtype=torch.int64, device=device)

        def send() -> None:
            encode(values, layout, bounds, modes, frames, scratch, codebooks=books, backend=backend)

        def receive() -> None:
            decode(frames, layout, again, back, codebooks=received, status=status, backend=backend)

        send()
        if books is not None:
            books.refresh()
            send()
        receive()  # what comes along once, the codebook
        encode_s = self._fastest(send, device)
        decode_s = self._fastest(receive, device)
        frame = frames.frame(0).cpu()
        first, size = torch.zeros(1, dtype=torch.int64), torch.tensor([frame.numel()])
        one = Layout.flat([[len(block)]], [block.shape[1]])
        return int(frame_tables(frame, first, size, one).bytes[0, 0]), encode_s, decode_s

    def _fastest(self, run: Callable[[], None], device: torch.device) -> float:
        """The shortest of some calls, in seconds."""
        best = math.inf
        for _ in range(self.rounds):
            _wait(device)
            begin = self.clock()
            run()
            _wait(device)
            best = min(best, self.clock() - begin)
        return best


def _apart(one: float, many: float, copies: int, values: int) -> tuple[float, float]:
    """(seconds of a value, seconds of a call) from the times of one and of many copies of a block."""
    per_value = (many - one) / ((copies - 1) * values)
    if per_value <= 0.0:  # the clock or the machine is too coarse: all of it to the values
        return many / (copies * values), 0.0
    return per_value, max(one - per_value * values, 0.0)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
