"""What each table's rows cost in each mode, measured on every rank and agreed between them.

All numbers are those of a step of one rank, the mean over the ranks: what the ranks send together they
receive together, so that a table's encode and decode add up however tables are placed. T tables, M modes in
the order of ``codec.MODES``. What is not known is NaN.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tightrec.compression.codec import MODES, Mode
from tightrec.compression.policy.estimates import Link, LinkEstimate, Trial

Array = NDArray[np.float64]
MODE_NUMBERS: dict[str, int] = {mode: number for number, mode in enumerate(MODES)}
_CODED = np.array([mode not in ("raw", "half") for mode in MODES])
_RAW = MODE_NUMBERS["raw"]
_KEPT_SAMPLES = 256
_DISTURBED = 3.0
"""A table's time for a value is taken for disturbed beyond this many times the median of all tables."""
_MOST_DRIFT = 4.0
_MOST_FACTOR = 5.0


class TableCosts:
    """Running measurements of one direction; ``ModeChooser`` decides from them.

    The recording calls only append. ``agree`` makes them into what all ranks share.

    Args:
        tables: names, each once.
        link: where exchanges are recorded.
    """

    def __init__(self, tables: Sequence[str], link: LinkEstimate) -> None:
        self.tables = tuple(tables)
        self._index = {table: number for number, table in enumerate(self.tables)}
        self._link_estimate = link
        count, many = len(self.tables), len(MODES)
        self._shapes = {
            "steps": (5,),  # number, and sums of wire bytes, encode, exchange and decode seconds
            "samples": (1,),
            "sizes": (2, count),  # values and bytes in these samples
            "tried": (4, count, many),  # values, and their bytes, encode and decode seconds
            "calls": (3,),  # number, and seconds of encode and decode calls
            "lines": (2, 3),  # not fitted, fitted: number, and sums of latency and seconds of a byte
        }
        self._steps: deque[tuple[float, float, float, float]] = deque(maxlen=_KEPT_SAMPLES)
        self._sizes: deque[tuple[ArrayLike, ArrayLike]] = deque(maxlen=_KEPT_SAMPLES)
        self._tried = np.zeros(self._shapes["tried"])
        self._calls = np.zeros(3)
        self.link: Link | None = None
        """As agreed."""
        self.values = np.full(count, np.nan)
        """[T] values of a step, as agreed."""
        self.measured_ms = np.full(count, np.nan)
        """[T] time of a table's rows between the last two agreements: its shares of the exchange by bytes, of
        encode and decode by prediction; latency and the calls' fixed parts are not in it."""
        self._cost = np.full((3, count, many), np.nan)  # bytes, encode and decode seconds of a value
        self._call_s = np.zeros(2)  # fixed part of an encode and of a decode call
        self._factor = np.ones(2)  # measured over predicted seconds of encode and decode
        self._used_bytes = np.full(count, np.nan)  # of a value in the mode in use
        self._drift = np.ones(count)  # bytes measured over bytes tried

    def record_step(self, wire_bytes: float, encode_s: float, exchange_s: float, decode_s: float) -> None:
        """Note one compressed step: its bytes as in ``LinkEstimate``, and the times of its parts."""
        self._steps.append((wire_bytes, encode_s, exchange_s, decode_s))
        self._link_estimate.record(wire_bytes, exchange_s)

    def record_tables(self, values: ArrayLike, sent_bytes: ArrayLike) -> None:
        """Note what one compressed step held, [T] each; the arrays must not be written to afterwards."""
        self._sizes.append((values, sent_bytes))

    def record_trial(self, table: str, trial: Trial) -> None:
        """Note what every mode makes of a block of a table."""
        for mode, cost in trial.costs.items():
            each = np.array([1.0, cost.bytes_per_value, cost.encode_s, cost.decode_s])
            self._tried[:, self._index[table], MODE_NUMBERS[mode]] += trial.values * each
            self._calls += (1.0, cost.encode_call_s, cost.decode_call_s)

    def measurements(self) -> Tensor:
        """What this rank measured since the last agreement, float64 [K]: to be summed over the ranks."""
        steps = np.array(self._steps, dtype=np.float64).reshape(-1, 4)
        steps = steps[np.isfinite(steps).all(1)]
        sizes = np.zeros(self._shapes["sizes"])
        for values, sent in self._sizes:
            sizes[0] += values
            sizes[1] += sent
        lines = np.zeros(self._shapes["lines"])
        link = self._link_estimate.estimate()
        if link is not None:
            lines[int(link.fitted)] = (1.0, link.latency_s, link.seconds_per_byte)
        parts = {
            "steps": np.array([len(steps), *steps.sum(0)]),
            "samples": np.array([len(self._sizes)]),
            "sizes": sizes,
            "tried": self._tried,
            "calls": self._calls,
            "lines": lines,
        }
        return torch.from_numpy(np.concatenate([parts[name].ravel() for name in self._shapes]))

    def agree(self, summed: Tensor, modes: Sequence[Mode]) -> None:
        """Take over the sum of the ranks' ``measurements`` in these modes; what is measured starts anew.

        Raises:
            ValueError: it is of another length or not finite.
        """
        found = summed.detach().cpu().double().numpy()
        lengths = [math.prod(shape) for shape in self._shapes.values()]
        if found.shape != (sum(lengths),) or not np.isfinite(found).all():
            raise ValueError(
                f"the measurements of {len(self.tables)} tables are {sum(lengths)} finite numbers, not "
                f"{found.size}: sum what measurements() returns on every rank, with the same tables on all"
            )
        cut = np.split(found, np.cumsum(lengths)[:-1])
        part = {
            name: piece.reshape(shape) for (name, shape), piece in zip(self._shapes.items(), cut, strict=True)
        }
        number = np.array([MODE_NUMBERS[mode] for mode in modes], dtype=np.int64)
        self.measured_ms[:] = np.nan
        self._agree_link(part["lines"])
        self._agree_trials(part["tried"], part["calls"])
        if part["samples"][0]:
            self._agree_sizes(part["sizes"], part["sizes"][0] / part["samples"][0], number)
        if part["steps"][0] and self.link is not None:
            self._agree_times(part["steps"][1:] / part["steps"][0], self.link, number)
        self._steps.clear()
        self._sizes.clear()
        self._tried[:] = 0.0
        self._calls[:] = 0.0

    def _agree_link(self, lines: Array) -> None:
        line = lines[int(lines[1, 0] > 0)]
        if line[0]:
            self.link = Link(
                latency_s=float(line[1] / line[0]),
                seconds_per_byte=float(line[2] / line[0]),
                fitted=bool(lines[1, 0]),
            )

    def _agree_trials(self, tried: Array, calls: Array) -> None:
        seen = tried[0] > 0
        old, new = self._cost[:, seen], tried[1:, seen] / tried[0, seen]
        # Sizes are exact; times are disturbed by what else the machine does, so half of the old ones stays.
        new[1:] = np.where(np.isnan(old[1:]), new[1:], (new[1:] + old[1:]) / 2)
        self._cost[:, seen] = new
        if calls[0]:
            self._call_s = calls[1:] / calls[0]

    def _agree_sizes(self, sizes: Array, values: Array, number: NDArray[np.int64]) -> None:
        self.values = values
        held = values > 0
        self._used_bytes[held] = sizes[1, held] / sizes[0, held]
        drift = self._used_bytes / self._cost[0, np.arange(len(number)), number]
        known = held & np.isfinite(drift) & _CODED[number]
        self._drift[known] = drift[known].clip(1 / _MOST_DRIFT, _MOST_DRIFT)

    def _agree_times(self, means: Array, link: Link, number: NDArray[np.int64]) -> None:
        _, encode_s, exchange_s, decode_s = means
        spent = np.maximum(np.array([encode_s, decode_s]) - self._call_s, 0.0)
        each = self._codec_s()[:, np.arange(len(number)), number]
        codec = np.nan_to_num(self.values * each)
        total = codec.sum(1)
        used = total > 0
        self._factor[used] = (spent[used] / total[used]).clip(1 / _MOST_FACTOR, _MOST_FACTOR)
        weights = np.stack([np.nan_to_num(self.values * self._used_bytes), *codec])
        times = np.array([max(exchange_s - link.latency_s, 0.0), *spent])
        sums = weights.sum(1)
        shares = weights * np.where(sums > 0, times / np.where(sums > 0, sums, 1.0), 0.0)[:, None]
        self.measured_ms = np.where(self.values > 0, 1e3 * shares.sum(0), np.nan)

    def _codec_s(self) -> Array:
        """Encode and decode seconds of a value [2, T, M] as tried; disturbed ones cut, missing filled."""
        times = self._cost[1:]
        tried = ~np.isnan(times[0, :, 0])
        if not tried.any():
            return times
        median = np.median(times[:, tried], 1, keepdims=True)
        filled = np.where(np.isnan(times), median, times)
        return filled.clip(median / _DISTURBED, median * _DISTURBED)

    def predict(self, modes: Sequence[Mode]) -> tuple[Array, Array]:
        """(seconds, bytes) of each table's rows in each mode, [T, M]; ``modes`` are those in use."""
        number = np.array([MODE_NUMBERS[mode] for mode in modes], dtype=np.int64)
        each = np.where(_CODED, self._cost[0] * self._drift[:, None], self._cost[0])
        raw = each[:, _RAW]
        if not np.isnan(raw).all():
            each[:, _RAW] = np.where(np.isnan(raw), np.nanmedian(raw), raw)
        each = np.minimum(each, each[:, _RAW, None])
        used, rows = ~np.isnan(self._used_bytes), np.arange(len(number))
        each[rows[used], number[used]] = self._used_bytes[used]
        encode_s, decode_s = self._codec_s() * self._factor[:, None, None]
        per_byte = math.nan if self.link is None else self.link.seconds_per_byte
        empty = (self.values == 0)[:, None]
        seconds = self.values[:, None] * (each * per_byte + encode_s + decode_s)
        return np.where(empty, 0.0, seconds), np.where(empty, 0.0, self.values[:, None] * each)

    def ratios(self) -> dict[str, dict[Mode, float]]:
        """Plain bytes over bytes in each mode, of the tables that were tried."""
        found = 4.0 / self._cost[0]
        return {
            table: {mode: float(found[at, MODE_NUMBERS[mode]]) for mode in MODES}
            for table, at in self._index.items()
            if not np.isnan(found[at]).any()
        }

    @property
    def call_s(self) -> float:
        """Fixed seconds of an encode and a decode call together."""
        return float(self._call_s.sum())

    def forget(self, table: int) -> None:
        """The table's mode has changed: what was measured of it was of the old one."""
        self._used_bytes[table] = np.nan

    def state_dict(self) -> dict[str, Any]:
        """What was agreed, by table, in numbers and lists that JSON can hold."""
        link = self.link
        return {
            "link": link and [link.latency_s, link.seconds_per_byte, link.fitted],
            "call_s": self._call_s.tolist(),
            "factor": self._factor.tolist(),
            "tables": {
                table: {
                    "values": _number(self.values[at]),
                    "bytes_per_value": _number(self._used_bytes[at]),
                    "drift": float(self._drift[at]),
                    "modes": {
                        mode: [_number(cost) for cost in self._cost[:, at, number]]
                        for mode, number in MODE_NUMBERS.items()
                    },
                }
                for at, table in enumerate(self.tables)
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; tables that are not in it stay unknown, others in it are left out."""
        link = state["link"]
        if link is not None:
            self.link = Link(latency_s=link[0], seconds_per_byte=link[1], fitted=link[2])
        self._call_s = np.array(state["call_s"], dtype=np.float64)
        self._factor = np.array(state["factor"], dtype=np.float64)
        for at, table in enumerate(self.tables):
            kept = state["tables"].get(table)
            if kept is None:
                continue
            self.values[at] = _nan(kept["values"])
            self._used_bytes[at] = _nan(kept["bytes_per_value"])
            self._drift[at] = kept["drift"]
            for mode, cost in kept["modes"].items():
                if mode in MODE_NUMBERS:
                    self._cost[:, at, MODE_NUMBERS[mode]] = [_nan(part) for part in cost]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
