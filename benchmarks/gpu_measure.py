"""Times of encode and decode on one device, beside a plain copy of the same values in the same run.

Every sample starts with writes over more than the L2 cache holds, which also give the host time to queue the
call behind them, so that the figures are the device's; what the host spends on a call is measured apart.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tightrec.compression.bounds import Bounds
from tightrec.compression.codebooks import Codebooks, ReceivedCodebooks
from tightrec.compression.codec import (
    Mode,
    Modes,
    decode,
    decode_scratch_bytes,
    encode,
    encode_scratch_bytes,
)
from tightrec.compression.frames import Frames
from tightrec.compression.layout import Layout

FLUSH_BYTES, FLUSHES = 256 << 20, 3
NAMES = ("raw", "float16", "bfloat16", "packed", "dedup", "entropy", "dedup_entropy")


class Shape(NamedTuple):
    """One exchange: every peer gets ``rows`` rows of every table."""

    peers: int
    tables: int
    rows: int
    dim: int

    @property
    def uncompressed_bytes(self) -> int:
        """Bytes of the values as float32."""
        return 4 * self.peers * self.tables * self.rows * self.dim

    def layout(self) -> Layout:
        """A matrix as pooled lookups leave it: a peer is a run of rows, a table a run of columns."""
        return Layout.columns(rows=[self.rows] * self.peers, dims=[self.dim] * self.tables)


def make_values(shape: Shape, mode: Mode, device: torch.device) -> Tensor:
    """Normal values; for ``dedup`` the rows are drawn from a smaller pool, most often its first ones."""
    generator = torch.Generator(device=device).manual_seed(1)
    height, width = shape.peers * shape.rows, shape.tables * shape.dim
    values = torch.randn(height, width, generator=generator, device=device)
    if mode == "dedup":
        draw = torch.rand(height, shape.tables, generator=generator, device=device)
        source = (draw**4 * shape.rows).long() + torch.arange(height, device=device)[
            :, None
        ] // shape.rows * shape.rows
        rows = values.view(height, shape.tables, shape.dim)
        values = torch.stack([rows[source[:, t], t] for t in range(shape.tables)], 1).reshape(height, width)
    return values


class Clock:
    """Runs a function some times and tells how long each took, in microseconds."""

    def __init__(self, device: torch.device, samples: int) -> None:
        self.device = device
        self.samples = samples
        on_gpu = device.type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES if on_gpu else 1 << 16, dtype=torch.uint8, device=device)

    def device_us(self, run: Callable[[], object], warm_up: int = 3) -> list[float]:
        """Times between two events around each call; on a CPU, of the clock on the wall."""
        for _ in range(warm_up):
            run()
        if self.device.type != "cuda":
            return [self._host(run) for _ in range(self.samples)]
        pairs = []
        for _ in range(self.samples):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(FLUSHES):
                self.flush.zero_()
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in pairs]

    def host_us(self, run: Callable[[], object]) -> list[float]:
        """What the caller's thread spends on queueing one call."""
        times = []
        for _ in range(self.samples):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(self._host(run))
        return times

    @staticmethod
    def _host(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)


def spread(numbers: list[float]) -> dict[str, float]:
    """min, median and max."""
    ordered = (min(numbers), statistics.median(numbers), max(numbers))
    return dict(zip(("min", "median", "max"), (round(number, 3) for number in ordered), strict=True))


def row(
    shape: Shape, codec: str, step: str, times: list[float], copy_us: float, extra: dict[str, Any]
) -> dict[str, Any]:
    """One line of the result; ``gbps`` counts uncompressed bytes, and so does the copy's."""
    rates = [shape.uncompressed_bytes / 1e3 / time_us for time_us in times]
    return {
        "shape": shape._asdict(),
        "codec": codec,
        "step": step,
        "us": spread(times),
        "gbps": spread(rates),
        "ratio_to_copy": round(copy_us / statistics.median(times), 4),
        **extra,
    }


def copy_times(shape: Shape, clock: Clock) -> list[float]:
    """Times of a copy of the uncompressed values on the device."""
    values = make_values(shape, "packed", clock.device)
    target = torch.empty_like(values)
    return clock.device_us(lambda: target.copy_(values))


def measure_codec(
    shape: Shape, mode: Mode, bound: float, clock: Clock, copy_us: float, backend: str
) -> list[dict[str, Any]]:
    """Encode and decode of one mode.

    Raises:
        RuntimeError: a value came back further from the original than the bound, or a frame was refused.
    """
    device, layout = clock.device, shape.layout()
    values = make_values(shape, mode, device)
    bounds, modes = Bounds.of(bound, layout.tables), Modes.of(mode, layout.tables)
    books = Codebooks(shape.peers, shape.tables, device) if mode == "entropy" else None
    known = ReceivedCodebooks(shape.peers, shape.tables, device)
    frames = Frames.empty(layout, torch.float32, device)
    out, status = torch.empty_like(values), torch.zeros(1, dtype=torch.int64, device=device)
    there = encode_scratch_bytes(
        layout, torch.float32, bounds, modes, codebooks=books is not None, device=device, backend=backend
    )
    back = decode_scratch_bytes(layout, torch.float32, device=device, backend=backend)
    scratch = torch.empty(max(there, back), dtype=torch.uint8, device=device)

    def send() -> None:
        encode(values, layout, bounds, modes, frames, scratch, codebooks=books, backend=backend)

    def receive() -> None:
        decode(frames, layout, out, scratch, codebooks=known, status=status, backend=backend)

    # The codebooks are made, sent and received; what is measured is the steady state after that.
    send()
    if books is not None:
        books.refresh()
        send()
        receive()
        send()
    receive()
    worst = float((out - values).abs().max())
    if int(status) or not worst <= bound:
        raise RuntimeError(f"{mode}: status {int(status)}, worst error {worst} at a bound of {bound}")
    size = int(frames.sizes.sum())
    extra = {
        "compressed_bytes": size,
        "ratio": round(shape.uncompressed_bytes / size, 3),
        "bound": bound,
        "block_modes": block_modes(frames, shape),
    }
    return [
        row(shape, mode, step, clock.device_us(run), copy_us, extra | {"host_us": spread(clock.host_us(run))})
        for step, run in (("encode", send), ("decode", receive))
    ]


def block_modes(frames: Frames, shape: Shape) -> dict[str, int]:
    """How many blocks of the first peer's frame have each mode."""
    head = frames.frame(0)[24 : 24 + 24 * shape.tables : 24].tolist()
    return {NAMES[mode]: head.count(mode) for mode in sorted(set(head))}
