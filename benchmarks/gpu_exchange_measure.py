"""Times, bytes and waits of every way to exchange a step's rows and gradients on one device."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import gpu_baselines
import torch
from gpu_exchange_ways import Batch, Direction, Framed, Transfer, Unbounded, Waits
from gpu_measure import FLUSHES, Clock, Shape, spread
from torch import Tensor

from tightrec.compression.bounds import Bound
from tightrec.compression.codec import Mode

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
WARM_UP = 4
"""Passes before those that are timed: codebooks are made after the first, sent with the second."""
SYNC_WARNING = "called a synchronizing CUDA operation"


class Timeline:
    """How long the parts of passes took, in microseconds: by events on a GPU, by the clock on a CPU."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._on_gpu = clock, clock.device.type == "cuda"
        self._passes: list[list[tuple[str, Any]]] = []

    def start(self) -> None:
        """Begin a pass, behind writes over more than the L2 cache holds."""
        if self._on_gpu:
            for _ in range(FLUSHES):
                self._clock.flush.zero_()
        self._passes.append([])
        self.mark("")

    def mark(self, part: str) -> None:
        """The part that began at the mark before ends here."""
        stamp: Any = time.perf_counter()
        if self._on_gpu:
            stamp = torch.cuda.Event(enable_timing=True)
            stamp.record()
        self._passes[-1].append((part, stamp))

    def times(self) -> dict[str, list[float]]:
        """Of each part in every pass; ``whole``: from first to last mark; ``device``: that less the wire."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found: dict[str, list[float]] = {}
        for marks in self._passes:
            for (_, before), (part, after) in pairwise(marks):
                found.setdefault(part, []).append(self._between(before, after))
            whole = self._between(marks[0][1], marks[-1][1])
            found.setdefault("whole", []).append(whole)
            found.setdefault("device", []).append(whole - found["wire"][-1])
        return found

    def _between(self, before: Any, after: Any) -> float:
        return 1e3 * before.elapsed_time(after) if self._on_gpu else 1e6 * (after - before)


def measure(
    shape: Shape,
    modes: Sequence[Mode],
    bounds: Mapping[Direction, Bound],
    clock: Clock,
    backend: str,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Every way of sending in both directions, and which of them failed and why.

    Ways without ``dedup`` in their name send all rows, as torchrec does; the others the distinct ones. A
    fixed-rate format that cannot be imported has a row with the reason under ``missing``.
    """
    batch = Batch(shape, clock.device)
    found: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for direction in DIRECTIONS:
        everything, distinct = batch.grads.view(-1, shape.dim), torch.empty_like(batch.distinct)
        batch.collect(distinct)
        if direction == "forward":
            everything, distinct = batch.expand(batch.distinct).view(-1, shape.dim), batch.distinct
        waits = Waits(clock.device)
        ways: dict[str, Callable[[], Transfer]] = {"plain": lambda r=everything: Unbounded(r)}
        missing: dict[str, str] = {}
        for prefix, rows in (("", everything), ("dedup ", distinct)):
            there, absent = gpu_baselines.find(rows, bounds[direction].value)
            for name in ("int8", "mx4"):
                codec = next((one for one in there if one.name == f"fbgemm {name}"), None)
                if codec is None:
                    missing[prefix + name] = absent[f"fbgemm {name}"]
                else:
                    ways[prefix + name] = lambda r=rows, c=codec: Unbounded(r, c)
        ways["dedup"] = lambda r=distinct: Unbounded(r)
        for mode in modes:
            ways[f"dedup lossy {mode}"] = lambda m=mode, r=distinct, d=direction, w=waits: Framed(
                r, batch, d, bounds[d], m, w, backend
            )
        about = {"shape": shape._asdict(), "direction": direction, "distinct_rows": sum(batch.counts)}
        for name, make in ways.items():
            try:
                figures = _measure_way(batch, name, direction, make(), distinct, clock, waits)
            except Exception as error:  # the other figures are worth having
                failed[f"{name} {direction}, {shape}"] = f"{type(error).__name__}: {error}"
            else:
                found.append({**about, "way": name, **figures})
        found += [{**about, "way": name, "missing": reason} for name, reason in missing.items()]
    return found, failed


def _measure_way(
    batch: Batch,
    name: str,
    direction: Direction,
    transfer: Transfer,
    distinct: Tensor,
    clock: Clock,
    waits: Waits,
) -> dict[str, Any]:
    """Times, bytes and waits of one way in one direction.

    Raises:
        RuntimeError: a value came back further from the original than its bound.
        FrameError: a frame was refused.
    """
    dedup = name.startswith("dedup")

    def run(timeline: Timeline) -> None:
        timeline.start()
        if dedup and direction == "backward":
            batch.collect(distinct)
            timeline.mark("collect")
        arrived = transfer.send(timeline.mark)
        if dedup and direction == "forward":
            batch.expand(arrived)
            timeline.mark("expand")

    for turn in range(WARM_UP):
        run(Timeline(clock))
        if turn == 0:
            transfer.refresh()
    worst = transfer.worst()
    if worst is not None and not worst <= 1.0:
        raise RuntimeError(f"the worst error is {worst} times the bound")
    waits.counts.clear()
    warned = _synchronising_calls(lambda: run(Timeline(clock)), clock.device)
    counts = dict(waits.counts)
    timeline = Timeline(clock)
    for _ in range(clock.samples):
        run(timeline)
    plain_bytes = 4 * batch.grads.numel()
    return {
        "plain_bytes": plain_bytes,
        "sent_bytes": transfer.sent_bytes(),
        "ratio": round(plain_bytes / transfer.sent_bytes(), 3),
        "us": {part: spread(times) for part, times in timeline.times().items()},
        "waits": counts,
        "synchronising_calls": warned,
        "error_over_bound": worst,
    }


def _synchronising_calls(run: Callable[[], object], device: torch.device) -> int | None:
    """Run, and tell how many calls torch itself says have waited for the device; None on a CPU."""
    if device.type != "cuda":
        run()
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(SYNC_WARNING in str(warning.message) for warning in caught)
