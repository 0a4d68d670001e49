"""Which mode each table is sent in, and whether a direction is compressed at all: measured and agreed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from tightrec.compression.codec import MODES, Mode
from tightrec.compression.policy.choice import (
    PUBLISHED_SPEEDS,
    ModeChooser,
    published_choice,
    published_speed_up,
)
from tightrec.compression.policy.config import Direction
from tightrec.compression.policy.estimates import ModeTrial
from tightrec.sharding.config import FRAMED
from tightrec.sharding.measures import DIRECTIONS
from tightrec.sharding.pilot import Pilot

_FIRST = 20
"""Training steps before the first examination: links and caches are warm by then."""
_WARM = 5
"""First training steps whose times do not count."""
_TRIALS = 4
"""Tables tried at an examination after the first, which tries all; others keep their last measurements."""
_SAMPLED_STEPS = 8
"""Steps before an examination whose frames are looked into."""
_PLAIN_STEPS = (-5, -3)
"""Of these, steps that ``auto`` sends plain."""


class ModeSteering:
    """Of one module.

    Args:
        pilot: is told the modes.
        tables: that travel, in an order common to all ranks.
        group: all ranks, for agreements.
        device: of the exchange.
    """

    def __init__(self, pilot: Pilot, tables: Sequence[str], group: Any, device: torch.device) -> None:
        self._pilot, self._tables, self._group, self._device = pilot, list(tables), group, device
        config = pilot.config
        self._every = config.examine_every
        self._choosers: dict[Direction, ModeChooser] = {}
        for way in DIRECTIONS:
            codec = getattr(config, way)
            if codec in FRAMED and (config.mode in ("measured", "published") or codec == "auto"):
                # A mode given by name is the one to measure.
                initial = config.mode if config.mode in MODES else "auto"
                self._choosers[way] = ModeChooser(way, tables, initial=initial)
        self._trial = ModeTrial()
        # At first all; as published, all tables are chosen for at once each time.
        self._trials = len(self._tables)
        self._due: dict[Direction, set[str]] = {}
        self._examined = False
        self._how: dict[Direction, str] = {}
        self._sizes_s = {way: np.zeros(2) for way in DIRECTIONS}
        self._told: list[str] = []
        self._reports: list[dict[str, Any]] = []

    def begin(self, step: int) -> None:
        """A training forward begins: decide, where the last step was an examination; a collective then."""
        if not self._choosers:
            return
        pilot = self._pilot
        for way, chooser in self._choosers.items():
            self._note(way, chooser, step)
        if self._examined:
            self._decide(step)
        into = -_steps_until(step, self._every)
        self._examined = into == 0
        pilot.sizes_wanted = -_SAMPLED_STEPS < into <= 0
        # Frames are about of one size: exchanges of plain rows tell what a byte costs.
        pilot.plain_now = None if not -_SAMPLED_STEPS < into <= 0 else into in _PLAIN_STEPS
        if self._examined:
            self._due = {
                way: set(chooser.trials_due(self._trials)) for way, chooser in self._choosers.items()
            }
            if pilot.config.mode != "published":
                self._trials = _TRIALS
        pilot.trial = self._try if self._examined else None

    def _note(self, way: Direction, chooser: ModeChooser, step: int) -> None:
        """What the step before measured."""
        last = self._pilot.measures.take_step(way)
        if last is None or not last.timed:
            return
        # A rank that held nothing counts too: these are means over ranks.
        if last.sampled:
            values = np.array([last.tables[t].values if t in last.tables else 0.0 for t in self._tables])
            sent = np.array([last.tables[t].sent_bytes if t in last.tables else 0.0 for t in self._tables])
            chooser.record_tables(values, sent)
        # Trying modes and checking errors delays whoever waits for the frames; the first steps compile.
        every = self._pilot.config.shadow_every
        checked = every > 0 and (step - 1) % every == 0
        if step <= _WARM or checked or self._examined:
            return
        wire_bytes = max(last.sent_bytes, last.received_bytes)
        if not last.framed:
            chooser.link_estimate.record(wire_bytes, last.exchange_s)
            return
        self._sizes_s[way] += (last.sizes_s, 1.0)
        chooser.record_step(
            wire_bytes=wire_bytes,
            encode_s=last.encode_s,
            # Of frames alone: the verdict adds what it takes to tell sizes.
            exchange_s=last.exchange_s - last.sizes_s,
            decode_s=last.decode_s,
        )

    def _try(self, way: Direction, table: str, rows: Tensor) -> None:
        """Try every mode on a block of a table that is due."""
        if way not in self._due or table not in self._due[way] or not rows.numel():
            return
        self._due[way].discard(table)
        bound = self._pilot.policy.bound(way, table)
        if bound is not None:
            self._choosers[way].record_trial(table, self._trial.run(rows, bound))

    def _decide(self, step: int) -> None:
        pilot = self._pilot
        for way, chooser in self._choosers.items():
            measured = chooser.measurements()
            summed = torch.cat([measured, torch.from_numpy(self._sizes_s[way])]).to(self._device)
            dist.all_reduce(summed, group=self._group)
            self._sizes_s[way][:] = 0.0
            chooser.agree(summed[:-2].cpu())
            sizes_s, steps = summed[-2:].tolist()
            self._choose(way, chooser)
            if getattr(pilot.config, way) == "auto":
                verdict = chooser.plain_is_faster(
                    chooser.plain_bytes, size_exchange_s=sizes_s / steps if steps else 0.0
                )
                how = "plain" if verdict.plain else "compressed"
                if self._how.get(way) != how:
                    self._told.append(f"step {step}: {way} {how}: {verdict.reason}")
                self._how[way] = how
                pilot.plain[way] = verdict.plain
            report = chooser.report(step)
            if pilot.config.mode == "published":
                report["tables"] = _published_tables(pilot.modes_by_table[way], chooser.ratios())
            self._reports.append(report)
        pilot.modes_version += 1

    def _choose(self, way: Direction, chooser: ModeChooser) -> None:
        """Set the modes of a direction; the chooser knows which are in use."""
        pilot = self._pilot
        if pilot.config.mode == "measured":
            raw = pilot.policy.lossless(way, self._tables)
            whole = [table for table, exact in zip(self._tables, raw, strict=True) if exact]
            choices = chooser.choose(lossless=whole)
            pilot.modes_by_table[way] = {table: choice.mode for table, choice in choices.items()}
        elif pilot.config.mode == "published":
            # Tables that no rank has tried yet stay as they are: the smaller of the two.
            pilot.modes_by_table[way] = published_choice(chooser.ratios())
            chooser.modes = [pilot.modes_by_table[way].get(table, "auto") for table in self._tables]

    def messages(self) -> list[str]:
        """Decisions since the last call."""
        told, self._told = self._told, []
        return told

    def take_reports(self) -> list[dict[str, Any]]:
        """Records of kind ``choice`` since the last call."""
        taken, self._reports = self._reports, []
        return taken

    def state_dict(self) -> dict[str, Any]:
        """What was agreed, by direction."""
        return {way: chooser.state_dict() for way, chooser in self._choosers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``; directions that do not choose here are left out."""
        for way, chooser in self._choosers.items():
            if way in state:
                chooser.load_state_dict(state[way])
                if self._pilot.config.mode in ("measured", "published"):
                    self._pilot.modes_by_table[way] = dict(zip(chooser.tables, chooser.modes, strict=True))
                if getattr(self._pilot.config, way) == "auto":
                    self._pilot.plain[way] = bool(chooser.plain)
        self._pilot.modes_version += 1


def _published_tables(
    chosen: Mapping[str, Mode], ratios: Mapping[str, Mapping[Mode, float]]
) -> dict[str, dict[str, Any]]:
    """What the report says of tables whose mode follows from the published rule."""
    told = {}
    for table, mode in chosen.items():
        speeds = {of: published_speed_up(ratios[table][of], of) for of in PUBLISHED_SPEEDS}
        words = ", ".join(f"{of} {speed:.3g}x" for of, speed in speeds.items())
        reason = f"published model: {words}"
        told[table] = {"mode": mode, "reason": reason, "predicted_ms": None, "measured_ms": None}
    return told


def _steps_until(step: int, every: int) -> int:
    """Steps from ``step`` to the next examination: the first, and one each ``every`` steps."""
    regular = -step % every or (0 if step else every)
    return min(regular, _FIRST - step) if step <= _FIRST else regular
