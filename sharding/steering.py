"""Steers a module's exchange from step to step: bounds, modes, samples and probes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torchrec.sparse.jagged_tensor import KeyedTensor

from tightrec.compression.policy.policy import BoundPolicy, TableFacts
from tightrec.sharding.config import FRAMED, CodecConfig
from tightrec.sharding.measures import DIRECTIONS, Measures
from tightrec.sharding.modes import ModeSteering
from tightrec.sharding.parts import Part
from tightrec.sharding.pilot import Pilot
from tightrec.sharding.probe import Probe

_OF_A_STEP = ("training", "exact", "sampling_rows", "trial", "plain_now")
"""What the pilot keeps of a training step for its backward."""


class Steering:
    """One module's.

    Args:
        codec: what the user asked for.
        tables: torchrec's configurations of the module's tables.
        parts: which of them travel.
        group: all ranks, for agreements.
        device: of the exchange.
    """

    def __init__(
        self,
        codec: CodecConfig,
        tables: Sequence[Any],
        parts: Sequence[Part],
        group: Any,
        device: torch.device,
    ) -> None:
        travelling = {slot.table for part in parts if part.peers for slot in part.received}
        facts = [
            TableFacts(name=table.name, rows=table.num_embeddings, dim=table.embedding_dim)
            for table in tables
            if table.name in travelling
        ]
        others = [table.name for table in tables if table.name not in travelling]
        self.codec = codec
        self.policy = BoundPolicy(codec.bound, facts, codec.budget_ne, others)
        self.pilot = Pilot(config=codec, policy=self.policy, measures=Measures(device))
        self.probe = Probe(self.policy, parts, group, device)
        self.modes = ModeSteering(self.pilot, [table.name for table in facts], group, device)
        self._group, self._device = group, device
        self._counts_itself = True
        self._interrupted: dict[str, Any] | None = None
        self._probing = codec.forward in FRAMED

    def set_step(self, step: int) -> None:
        """Say how many training steps came before the next one; without, training forwards are counted."""
        self._counts_itself = False
        self.pilot.step = self.pilot.begun = step

    def begin(self) -> None:
        """A forward begins."""
        pilot = self.pilot
        if not torch.is_grad_enabled():
            self._begin_evaluation()
            return
        self._interrupted = None
        pilot.training = pilot.measures.active = True
        if self._counts_itself:
            pilot.step = pilot.begun
        step = pilot.step
        pilot.begun = step + 1
        self.policy.set_step(step)
        if self._probing and self.policy.homogenisation_due(step):
            counts = torch.tensor(self.policy.homogenisation_counts(), dtype=torch.float64)
            self.policy.set_homogenisation(self._summed(counts).tolist())
        self.modes.begin(step)
        pilot.exact = self._probing and self.policy.probe_due(step)
        pilot.sampling_rows = self._probing and self.policy.sample_due(step)
        pilot.measures.begin_step({way: pilot.samples(way) for way in DIRECTIONS}, pilot.sampled)

    def _begin_evaluation(self) -> None:
        """Nothing of it is sampled or tried; a backward that is still to come finds its step again."""
        pilot = self.pilot
        if pilot.training:
            self._interrupted = {name: getattr(pilot, name) for name in _OF_A_STEP}
        pilot.training = pilot.measures.active = pilot.exact = pilot.sampling_rows = False
        pilot.trial = pilot.plain_now = None

    def landed(self, pooled: KeyedTensor, rows: Mapping[str, int]) -> None:
        """A forward's pooled output has arrived, made of so many distinct bags by feature."""
        pilot = self.pilot
        if not pilot.training:
            for name, value in (self._interrupted or {}).items():
                setattr(pilot, name, value)
            pilot.measures.active = pilot.training
            self._interrupted = None
        elif pilot.exact:
            self.probe.keep(pilot.step, pooled, rows)

    def messages(self) -> list[str]:
        """Decisions since the last call, for the log."""
        return [*self.policy.messages(), *self.modes.messages()]

    def state_dict(self) -> dict[str, Any]:
        """What was learnt and chosen, JSON-able and by table name; the same on every rank."""
        return {
            "step": self.pilot.begun,
            "bounds": self.policy.state_dict(),
            "modes": self.modes.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``, of a job on any number of ranks."""
        self.pilot.step = self.pilot.begun = int(state["step"])
        self.policy.load_state_dict(state["bounds"])
        self.modes.load_state_dict(state["modes"])

    def _summed(self, numbers: Tensor) -> Tensor:
        numbers = numbers.to(self._device)
        dist.all_reduce(numbers, group=self._group)
        return numbers.cpu()
