"""Which mode each table is sent in, and whether a direction is compressed at all: measured, agreed and re-examined."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from tightrec.compression.codec import Mode
from tightrec.compression.policy.choice import ModeChooser
from tightrec.compression.policy.config import Direction
from tightrec.compression.policy.estimates import ModeTrial
from tightrec.sharding.config import FRAMED
from tightrec.sharding.parts import Part
from tightrec.sharding.pilot import Pilot

_FIRST = 20
"""Training steps before the first examination: links and caches are warm by then."""
_TRIALS = 4
"""Tables tried at an examination; others keep their last measurements."""
_SAMPLED_STEPS = 8
"""Steps before an examination whose sizes are noted by table."""


class ModeSteering:
    """Of one module.

    Args:
        pilot: is told the modes.
        tables: that travel, in an order common to all ranks.
        parts: of the module.
        group: all ranks, for agreements.
        device: of the exchange.
    """

    def __init__(
        self, pilot: Pilot, tables: Sequence[str], parts: Sequence[Part], group: Any, device: torch.device
    ) -> None:
        self._pilot, self._tables, self._group, self._device = pilot, list(tables), group, device
        config = pilot.config
        self._every = config.examine_every
        self._choosers: dict[Direction, ModeChooser] = {}
        ways: tuple[Direction, ...] = ("forward", "backward")
        for way in ways:
            codec = getattr(config, way)
            if codec in FRAMED and (config.mode in ("measured", "published") or codec == "auto"):
                self._choosers[way] = ModeChooser(way, tables)
        self._trial = ModeTrial()
        self._due: dict[Direction, set[str]] = {}
        self._told: list[str] = []
        self.reports: list[dict[str, Any]] = []
        """Records of kind ``choice`` since they were last taken."""

    def begin(self, step: int) -> None:
        """A training forward begins: decide, where the last step was an examination; a collective then."""
        if not self._choosers:
            return
        pilot = self._pilot
        for way, chooser in self._choosers.items():
            self._note(way, chooser)
        if self._due:
            self._decide(step)
        into = step - _FIRST if step < self._every else step % self._every
        pilot.sizes_wanted = -_SAMPLED_STEPS < into <= 0
        if into == 0:
            self._due = {way: set(chooser.trials_due(_TRIALS)) for way, chooser in self._choosers.items()}
            pilot.plain = dict.fromkeys(pilot.plain, False)
        pilot.trial = self._try if self._due else None

    def _note(self, way: Direction, chooser: ModeChooser) -> None:
        """What the step before measured."""
        last = self._pilot.measures.take_step(way)
        if last is None:
            return
        if not last.framed:
            chooser.link_estimate.record(last.sent_bytes, last.exchange_s)
            return
        chooser.record_step(
            wire_bytes=last.sent_bytes,
            encode_s=last.encode_s,
            exchange_s=last.exchange_s,
            decode_s=last.decode_s,
        )
        if last.tables:
            values = np.array([last.tables[t].values if t in last.tables else 0.0 for t in self._tables])
            sent = np.array([last.tables[t].sent_bytes if t in last.tables else 0.0 for t in self._tables])
            chooser.record_tables(values, sent)

    def _try(self, way: Direction, table: str, rows: Tensor) -> None:
        """Try every mode on a block of a table that is due."""
        if way not in self._due or table not in self._due[way] or not rows.numel():
            return
        self._due[way].discard(table)
        bound = self._pilot.policy.bound(way, table)
        if bound is not None:
            self._choosers[way].record_trial(table, self._trial.run(rows, bound))

    def _decide(self, step: int) -> None:
        self._due = {}
        pilot = self._pilot
        for way, chooser in self._choosers.items():
            summed = chooser.measurements().to(self._device)
            dist.all_reduce(summed, group=self._group)
            chooser.agree(summed.cpu())
            whole = [
                t
                for t, raw in zip(self._tables, pilot.policy.lossless(way, self._tables), strict=True)
                if raw
            ]
            choices = chooser.choose(lossless=whole)
            modes: dict[str, Mode] = {table: choice.mode for table, choice in choices.items()}
            if pilot.config.mode == "published":
                modes = self._published(chooser)
            if pilot.config.mode in ("measured", "published"):
                pilot.modes_by_table[way] = modes
            if getattr(pilot.config, way) == "auto":
                verdict = chooser.plain_is_faster(pilot.plain_bytes)
                if verdict.plain != pilot.plain[way] or not self.reports:
                    self._told.append(
                        f"step {step}: {way} {'plain' if verdict.plain else 'compressed'}: {verdict.reason}"
                    )
                pilot.plain[way] = verdict.plain
            self.reports.append(chooser.report(step))
        pilot.modes_version += 1

    def _published(self, chooser: ModeChooser) -> dict[str, Mode]:
        raise NotImplementedError

    def messages(self) -> list[str]:
        """Decisions since the last call."""
        told, self._told = self._told, []
        return told

    def take_reports(self) -> list[dict[str, Any]]:
        """Records of kind ``choice`` since the last call."""
        taken, self.reports = self.reports, []
        return taken

    def state_dict(self) -> dict[str, Any]:
        """What was agreed, by direction."""
        return {way: chooser.state_dict() for way, chooser in self._choosers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``; directions that do not choose here are left out."""
        for way, chooser in self._choosers.items():
            if way in state:
                chooser.load_state_dict(state[way])
                if self._pilot.config.mode == "measured":
                    self._pilot.modes_by_table[way] = dict(zip(chooser.tables, chooser.modes, strict=True))
                if getattr(self._pilot.config, way) == "auto":
                    self._pilot.plain[way] = bool(chooser.plain)
        self._pilot.modes_version += 1
