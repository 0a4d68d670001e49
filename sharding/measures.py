"""What the exchange saw: bytes, rows, modes, errors and times, by direction and table.

Kept twice: for the log, since it last asked, and for the choice of modes, since the step before.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tightrec.compression.policy.config import Direction
from tightrec.compression.telemetry import FrameTables
from tightrec.kernels.format import Mode

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


@dataclass
class TableMeasures:
    """One table in one direction, sums over sampled steps of what this rank sent to others in frames."""

    rows: float = 0.0
    """Rows given to the codec: one for each distinct bag."""
    distinct: float = 0.0
    """Of these, rows that were not equal to another after quantisation, or all where nobody looked."""
    values: float = 0.0
    sent_bytes: float = 0.0
    worst: float | None = None
    """Largest error over its bound that was seen."""
    modes: dict[str, int] = field(default_factory=dict)
    """Blocks by mode."""


@dataclass
class DirectionMeasures:
    """One direction over some training steps."""

    transfers: int = 0
    """Uses of a wire."""
    timed: int = 0
    """Steps whose times are in the sums below."""
    framed: int = 0
    """Of these, such that sent frames."""
    steps: int = 0
    sampled: int = 0
    """Steps whose frames were looked into."""
    encode_s: float = 0.0
    exchange_s: float = 0.0
    """What the step waited for sizes and for what was sent; none of it where something else overlapped."""
    decode_s: float = 0.0
    sizes_s: float = 0.0
    """Of ``exchange_s``, the time in which sizes were told."""
    sent_bytes: float = 0.0
    """To other ranks, sizes included."""
    received_bytes: float = 0.0
    """From other ranks."""
    tables: dict[str, TableMeasures] = field(default_factory=dict)


class Measures:
    """Collects; cheap enough for every step. Evaluations are left out: ``active`` says which is under way."""

    def __init__(self, device: torch.device) -> None:
        self.active = True
        self._device = device
        self._timed = True
        self._window = {way: DirectionMeasures() for way in DIRECTIONS}
        self._step = {way: DirectionMeasures() for way in DIRECTIONS}

    def take(self) -> dict[Direction, DirectionMeasures]:
        """What was collected since the last call, which starts anew."""
        taken, self._window = self._window, {way: DirectionMeasures() for way in DIRECTIONS}
        return taken

    def take_step(self, way: Direction) -> DirectionMeasures | None:
        """The same of the last step; None where there was none."""
        taken, self._step[way] = self._step[way], DirectionMeasures()
        return taken if taken.transfers else None

    def begin_step(self, sampled: Mapping[Direction, bool], timed: bool) -> None:
        """A training step begins.

        Args:
            sampled: by direction, whether it has frames that are looked into.
            timed: whether times of a GPU count, whose clock then waits for it; those of a CPU always do.
        """
        self._timed = timed or self._device.type == "cpu"
        for way in DIRECTIONS:
            for book in (self._window[way], self._step[way]):
                book.steps += 1
                book.sampled += sampled[way]
                book.timed += self._timed

    def now(self) -> float:
        """Seconds of a clock; in a timed step on a GPU, once the device has come so far."""
        if self._timed and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return time.perf_counter()

    def _books(self, way: Direction) -> list[DirectionMeasures]:
        return [self._window[way], self._step[way]] if self.active else []

    def add(
        self,
        way: Direction,
        *,
        encode_s: float = 0.0,
        exchange_s: float = 0.0,
        decode_s: float = 0.0,
        sizes_s: float = 0.0,
        sent_bytes: float = 0.0,
        received_bytes: float = 0.0,
        transfers: int = 0,
        framed: int = 0,
    ) -> None:
        """Add to the sums of a direction."""
        for book in self._books(way):
            if self._timed:
                book.encode_s += encode_s
                book.exchange_s += exchange_s
                book.decode_s += decode_s
                book.sizes_s += sizes_s
            book.received_bytes += received_bytes
            book.sent_bytes += sent_bytes
            book.transfers += transfers
            book.framed += framed

    def frames(
        self, way: Direction, tables: Sequence[Sequence[str]], found: FrameTables, copies: int
    ) -> None:
        """Add what frames hold.

        Args:
            way: direction of the exchange.
            tables: [P][T] table of each block.
            found: of the same blocks.
            copies: how many peers get each frame.
        """
        filled = found.rows > 0
        # What belongs to no table, headers of empty blocks too, is shared out; in an empty frame over all.
        counted = np.where(filled.any(1, keepdims=True), filled, True)
        unfilled = np.where(filled, 0, found.bytes).sum(1)
        share = (found.overhead + unfilled) / counted.sum(1).clip(min=1)
        for peer, place in zip(*(axis.tolist() for axis in counted.nonzero()), strict=True):
            for book in self._books(way):
                entry = book.tables.setdefault(tables[peer][place], TableMeasures())
                if not filled[peer, place]:
                    entry.sent_bytes += float(share[peer]) * copies
                    continue
                entry.rows += int(found.rows[peer, place]) * copies
                entry.distinct += int(found.distinct[peer, place]) * copies
                entry.values += int(found.values[peer, place]) * copies
                entry.sent_bytes += float(found.bytes[peer, place] + share[peer]) * copies
                mode = Mode(int(found.mode[peer, place])).name.lower()
                entry.modes[mode] = entry.modes.get(mode, 0) + copies

    def worst(self, way: Direction, tables: Sequence[str], errors: Sequence[float]) -> None:
        """Note errors over bounds, one for each table."""
        for book in self._books(way):
            for table, error in zip(tables, errors, strict=True):
                entry = book.tables.setdefault(table, TableMeasures())
                entry.worst = error if entry.worst is None else max(entry.worst, error)
