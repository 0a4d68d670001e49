"""Which mode each table is sent in: the one whose ``bytes/link + encode + decode`` is predicted the shortest.

    chooser = ModeChooser("forward", tables)
    chooser.record_step(...); chooser.record_tables(...)            # sampled steps: these only append
    for table in chooser.trials_due(4):                             # now and then, where this rank holds rows
        chooser.record_trial(table, ModeTrial().run(rows, bound))
    chooser.agree(all_reduce(chooser.measurements()))               # summed over the ranks: all decide alike
    choices = chooser.choose()
    plain = chooser.plain_is_faster(plain_bytes, size_exchange_s=...).plain
    record = chooser.report(step)                                   # what was predicted, and what came

One chooser for each direction; what its numbers mean stands in ``costs``. ``published_choice`` is the rule of
the SC'24 paper instead.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from tightrec.compression.codec import MODES, Mode
from tightrec.compression.policy.config import Direction
from tightrec.compression.policy.costs import MODE_NUMBERS, TableCosts
from tightrec.compression.policy.estimates import Link, LinkEstimate, Trial

PUBLISHED_LINK_GB_S = 4.0
PUBLISHED_SPEEDS: dict[Mode, tuple[float, float]] = {"dedup": (45.0, 290.0), "entropy": (60.0, 40.0)}
"""GB/s of compress and decompress on an A100: vector LZ, whose place dedup takes here, and Huffman."""


@dataclass(frozen=True, kw_only=True)
class ChoiceConfig:
    """How modes are chosen."""

    candidates: tuple[Mode, ...] = ("raw", "half", "packed", "dedup", "entropy")
    """Modes that may be chosen; of equal predictions the first wins."""
    least_gain: float = 0.03
    """Share of the time that another mode, or compressing instead of plain rows, must gain: below it things
    stay as they are, so that noise does not move them back and forth."""

    def __post_init__(self) -> None:
        if not self.candidates or not set(self.candidates) <= set(MODES):
            raise ValueError(f"candidates={self.candidates}: choose one or more of {', '.join(MODES)}")
        if not 0.0 <= self.least_gain < 1.0:
            raise ValueError(f"least_gain={self.least_gain} must be a share from 0 to below 1, such as 0.03")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A table's mode."""

    mode: Mode
    """What to ask of the codec."""
    reason: str
    """Why, in words."""
    predicted_ms: float | None
    """Time of this table's rows in a step, without latency and the calls' fixed parts; None if unknown."""
    bytes: float | None
    """Bytes of this table's rows in a step; None if unknown."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a direction is better off with plain rows."""

    plain: bool
    """Send plain rows."""
    reason: str
    """Why, in words."""
    plain_ms: float | None
    """Predicted exchange of plain rows; None where too little is measured."""
    compressed_ms: float | None
    """Predicted encode, exchange and decode in the chosen modes; None where too little is measured."""


class ModeChooser:
    """Measures one direction and chooses its modes.

    Everything is decided from what was agreed over the ranks, so that equal calls give equal answers on all.

    Args:
        direction: forward or backward.
        tables: names, each once.
        config: candidates and the least gain.
        initial: mode of all tables before the first choice.
        link: an estimate that other exchanges are recorded in too; default an own one.

    Raises:
        ValueError: a name stands twice, or the initial mode is unknown.
    """

    def __init__(
        self,
        direction: Direction,
        tables: Sequence[str],
        *,
        config: ChoiceConfig = ChoiceConfig(),
        initial: Mode = "auto",
        link: LinkEstimate | None = None,
    ) -> None:
        if len(set(tables)) < len(tables):
            raise ValueError(f"a table stands twice among {', '.join(tables)}; each needs a name of its own")
        if initial not in MODES:
            raise ValueError(f"initial={initial!r} is no mode; choose one of {', '.join(MODES)}")
        self.direction: Direction = direction
        self.tables = tuple(tables)
        self.config = config
        self.link_estimate = link or LinkEstimate()
        """Record exchanges other than compressed steps here: those of sizes, and plain ones."""
        self.modes: list[Mode] = [initial] * len(self.tables)
        """[T] the modes in use."""
        self.plain: bool | None = None
        """The last verdict; None before the first."""
        self._costs = TableCosts(self.tables, self.link_estimate)
        self._choices: dict[str, Choice] = {}
        self._compared: dict[str, tuple[float | None, float]] = {}  # predicted, then measured milliseconds
        self._verdict_reason = "not examined yet"
        self._next_trial = 0

    @property
    def link(self) -> Link | None:
        """The link as agreed; None before anything was."""
        return self._costs.link

    def record_step(self, *, wire_bytes: float, encode_s: float, exchange_s: float, decode_s: float) -> None:
        """Note a compressed step on this rank: its times, and bytes as in ``LinkEstimate``. Only appends."""
        self._costs.record_step(wire_bytes, encode_s, exchange_s, decode_s)

    def record_tables(self, values: ArrayLike, sent_bytes: ArrayLike) -> None:
        """Note what a compressed step held: values given to the codec and bytes made of them, [T] each.

        ``telemetry.FrameTables`` tells both. Only appends: the arrays must not be written to afterwards.
        """
        self._costs.record_tables(values, sent_bytes)

    def record_trial(self, table: str, trial: Trial) -> None:
        """Note what every mode makes of a block of a table."""
        self._costs.record_trial(table, trial)

    def trials_due(self, count: int) -> list[str]:
        """The tables whose trial was asked for the longest ago, at most ``count``.

        Call it on all ranks alike. A rank that holds no rows of one of them leaves it to the others.
        """
        many = len(self.tables)
        due = [self.tables[(self._next_trial + at) % many] for at in range(min(count, many))]
        self._next_trial = (self._next_trial + len(due)) % max(many, 1)
        return due

    def measurements(self) -> Tensor:
        """What this rank measured since the last agreement, float64 [K] on the CPU: to be summed."""
        return self._costs.measurements()

    def agree(self, summed: Tensor) -> None:
        """Take over the sum over the ranks of their ``measurements``.

        Raises:
            ValueError: it is of another length or not finite.
        """
        self._costs.agree(summed, self.modes)
        for table, measured in zip(self.tables, self._costs.measured_ms.tolist(), strict=True):
            if table in self._choices and not math.isnan(measured):
                self._compared[table] = (self._choices[table].predicted_ms, measured)

    def choose(self, lossless: Collection[str] = ()) -> dict[str, Choice]:
        """The mode of every table, from what was agreed; they are ``modes`` from now on.

        Args:
            lossless: tables that are sent raw, whatever is faster.
        """
        seconds, sizes = self._costs.predict(self.modes)
        for at, table in enumerate(self.tables):
            mode, reason = self._decide(at, seconds[at], table in lossless)
            if mode != self.modes[at]:
                self._costs.forget(at)
                self._compared.pop(table, None)
                self.modes[at] = mode
            predicted, size = seconds[at, MODE_NUMBERS[mode]], sizes[at, MODE_NUMBERS[mode]]
            self._choices[table] = Choice(
                mode=mode,
                reason=reason,
                predicted_ms=None if math.isnan(predicted) else 1e3 * float(predicted),
                bytes=None if math.isnan(size) else float(size),
            )
        return dict(self._choices)

    def _decide(self, at: int, seconds: ArrayLike, lossless: bool) -> tuple[Mode, str]:
        """The mode of a table and the reason, from its predicted seconds in each mode."""
        if lossless:
            return "raw", "its bound is lossless"
        now = self.modes[at]
        took = {mode: float(np.asarray(seconds)[MODE_NUMBERS[mode]]) for mode in self.config.candidates}
        if any(math.isnan(second) for second in took.values()):
            return now, f"{now} stays: too little is measured yet"
        if self._costs.values[at] == 0:
            return now, f"{now} stays: no rows"
        ranked = sorted(took, key=lambda mode: took[mode])
        best = ranked[0]
        if best != now and now in took:
            gain = 1.0 - took[best] / took[now]
            if gain < self.config.least_gain:
                return (
                    now,
                    f"{now} stays: {best} would gain {gain:.1%}, less than {self.config.least_gain:.0%}",
                )
        if len(ranked) == 1:
            return best, f"{best} is the only candidate"
        return best, f"{1e3 * took[best]:.3g} ms, next {ranked[1]} {1e3 * took[ranked[1]]:.3g} ms"

    @property
    def plain_bytes(self) -> float:
        """What a rank would send in a step as float32, the mean; 0 before anything was agreed."""
        return 4.0 * float(np.nansum(self._costs.values))

    def ratios(self) -> dict[str, dict[Mode, float]]:
        """Plain bytes over bytes in each mode, of the tables that were tried."""
        return self._costs.ratios()

    def plain_is_faster(
        self, plain_bytes: float, *, size_exchange_s: float = 0.0, other_s: float = 0.0
    ) -> Verdict:
        """Whether to send plain rows in this direction, from what was agreed; ``plain`` from now on.

        The change from compressed to plain comes where compressing loses, the change back where it gains
        ``least_gain`` or more, which it must also the first time.

        Args:
            plain_bytes: the wire bytes of a rank without compression, the mean; equal on all ranks.
            size_exchange_s: seconds of the exchange of sizes that only frames need; equal on all ranks.
            other_s: what else compression takes in a step, such as copies; equal on all ranks.
        """
        number = [MODE_NUMBERS[mode] for mode in self.modes]
        rows = np.arange(len(number))
        seconds, sizes = (part[rows, number].sum() for part in self._costs.predict(self.modes))
        link = self._costs.link
        if link is None or math.isnan(seconds):
            self._verdict_reason = "too little is measured yet"
            return Verdict(
                plain=bool(self.plain), reason=self._verdict_reason, plain_ms=None, compressed_ms=None
            )
        plain_s = link.seconds(plain_bytes)
        # The time of the bytes is in ``seconds`` already.
        compressed_s = link.latency_s + float(seconds) + self._costs.call_s + size_exchange_s + other_s
        gain = 1.0 - compressed_s / plain_s if plain_s else -math.inf
        needed = 0.0 if self.plain is False else self.config.least_gain
        self.plain = gain < needed
        reason = (
            f"compressed {1e3 * compressed_s:.3g} ms with {sizes / 1e6:.3g} MB, plain {1e3 * plain_s:.3g} ms "
            f"with {plain_bytes / 1e6:.3g} MB at {link.gb_s:.3g} GB/s"
        )
        if self.plain and gain >= 0.0:
            reason += f"; a gain of {gain:.1%} is less than {needed:.0%}"
        if not link.fitted:
            reason += "; what a byte costs is a guess: all exchanges were of one size"
        self._verdict_reason = reason
        return Verdict(
            plain=self.plain, reason=reason, plain_ms=1e3 * plain_s, compressed_ms=1e3 * compressed_s
        )

    def report(self, step: int) -> dict[str, Any]:
        """A record of kind "choice": the modes in use, what was predicted of them and what came.

        ``measured_ms`` stands beside the prediction made before it was measured, in the same mode; it is None
        where nothing has been measured yet in this mode, and then the prediction is the newest.
        """
        tables = {}
        for table, choice in self._choices.items():
            predicted, measured = self._compared.get(table, (choice.predicted_ms, None))
            tables[table] = {
                "mode": choice.mode,
                "reason": choice.reason,
                "predicted_ms": predicted,
                "measured_ms": measured,
            }
        link = self._costs.link
        rate = link.gb_s if link is not None else math.inf
        return {
            "kind": "choice",
            "step": step,
            "direction": self.direction,
            "link_gb_s": rate if math.isfinite(rate) else None,
            "plain": bool(self.plain),
            "reason": self._verdict_reason,
            "tables": tables,
        }

    def state_dict(self) -> dict[str, Any]:
        """What was agreed and chosen, in numbers, strings and lists, by table."""
        return {
            "direction": self.direction,
            "plain": self.plain,
            "modes": dict(zip(self.tables, self.modes, strict=True)),
            "costs": self._costs.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Take over a state; new tables keep their initial mode.

        Returns:
            Tables of the state that there are none of here, which are left out.

        Raises:
            ValueError: it is of the other direction, or has a mode that this release does not know.
        """
        if state["direction"] != self.direction:
            raise ValueError(f"the state of modes is of {state['direction']}, not of {self.direction}")
        for table, mode in state["modes"].items():
            if mode not in MODES:
                raise ValueError(f"table {table!r}: the state's mode {mode!r} is none of {', '.join(MODES)}")
        self.plain = state["plain"]
        self.modes = [
            state["modes"].get(table, mode) for table, mode in zip(self.tables, self.modes, strict=True)
        ]
        self._costs.load_state_dict(state["costs"])
        return sorted(set(state["modes"]) - set(self.tables))


def published_speed_up(ratio: float, mode: Mode, link_gb_s: float = PUBLISHED_LINK_GB_S) -> float:
    """The modelled speed-up of an exchange by the SC'24 paper (arXiv 2407.04272).

    ``1 / (1/ratio + B * (1/Tc + 1/Td))`` with link B and the published throughputs of the coder.

    Args:
        ratio: plain bytes over bytes in this mode.
        mode: dedup or entropy.
        link_gb_s: B, 10^9 bytes a second.

    Raises:
        ValueError: the ratio is not positive, or the mode has no published throughput.
    """
    if mode not in PUBLISHED_SPEEDS:
        raise ValueError(f"mode {mode!r} has no published speed; choose {' or '.join(PUBLISHED_SPEEDS)}")
    if not ratio > 0.0:
        raise ValueError(f"a ratio of {ratio} is none: give plain bytes over sent bytes, above 0")
    compress, decompress = PUBLISHED_SPEEDS[mode]
    return 1.0 / (1.0 / ratio + link_gb_s * (1.0 / compress + 1.0 / decompress))


def published_choice(
    ratios: Mapping[str, Mapping[Mode, float]], link_gb_s: float = PUBLISHED_LINK_GB_S
) -> dict[str, Mode]:
    """dedup or entropy for each table, whichever has the larger modelled speed-up; dedup where equal.

    Args:
        ratios: for each table its measured ratio in both modes.
        link_gb_s: the link that is assumed, 10^9 bytes a second.

    Raises:
        ValueError: a ratio is missing or not positive; names the table.
    """
    chosen: dict[str, Mode] = {}
    for table, found in ratios.items():
        if not all(found.get(mode, 0.0) > 0.0 for mode in PUBLISHED_SPEEDS):
            raise ValueError(
                f"table {table!r}: the published choice needs a ratio above 0 of dedup and of entropy, not "
                f"{dict(found)}"
            )
        chosen[table] = max(
            PUBLISHED_SPEEDS, key=lambda mode: published_speed_up(found[mode], mode, link_gb_s)
        )
    return chosen
