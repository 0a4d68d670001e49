"""Steers a module's exchange from step to step: bounds, modes, samples and probes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torchrec.sparse.jagged_tensor import KeyedTensor

from tightrec.compression.policy.policy import BoundPolicy, TableFacts
from tightrec.sharding.config import FRAMED, CodecConfig
from tightrec.sharding.measures import Measures
from tightrec.sharding.modes import ModeSteering
from tightrec.sharding.parts import Part
from tightrec.sharding.pilot import Pilot
from tightrec.sharding.probe import Probe


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
        self.pilot = Pilot(config=codec, policy=self.policy, measures=Measures())
        self.probe = Probe(self.policy, parts, group, device)
        self.modes = ModeSteering(self.pilot, [table.name for table in facts], group, device)
        self._group, self._device = group, device
        self._counts_itself = True
        self._probing = codec.forward in FRAMED

    def set_step(self, step: int) -> None:
        """Say how many training steps came before the next one; without, training forwards are counted."""
        self._counts_itself = False
        self.pilot.step = step

    def begin(self) -> None:
        """A forward begins."""
        pilot = self.pilot
        pilot.training = pilot.measures.active = torch.is_grad_enabled()
        if not pilot.training:
            pilot.exact = False
            return
        step = pilot.step
        self.policy.set_step(step)
        if self._probing and self.policy.homogenisation_due(step):
            counts = torch.tensor(self.policy.homogenisation_counts(), dtype=torch.float64)
            self.policy.set_homogenisation(self._summed(counts).tolist())
        self.modes.begin(step)
        pilot.exact = self._probing and self.policy.probe_due(step)
        pilot.sampling_rows = self._probing and self.policy.sample_due(step)
        pilot.measures.begin_step(pilot.sampled)

    def landed(self, pooled: KeyedTensor) -> None:
        """A forward's pooled output has arrived."""
        if self.pilot.training:
            if self.pilot.exact:
                self.probe.keep(self.pilot.step, pooled)
            if self._counts_itself:
                self.pilot.step += 1

    def messages(self) -> list[str]:
        """Decisions since the last call, for the log."""
        return [*self.policy.messages(), *self.modes.messages()]

    def state_dict(self) -> dict[str, Any]:
        """What was learnt and chosen, JSON-able and by table name; the same on every rank."""
        return {"step": self.pilot.step, "bounds": self.policy.state_dict(), "modes": self.modes.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``, of a job on any number of ranks."""
        self.pilot.step = int(state["step"])
        self.policy.load_state_dict(state["bounds"])
        self.modes.load_state_dict(state["modes"])

    def _summed(self, numbers: Tensor) -> Tensor:
        numbers = numbers.to(self._device)
        dist.all_reduce(numbers, group=self._group)
        return numbers.cpu()
