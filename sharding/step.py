"""One step of a sharded module between its lookups and its pooled output, as two autograd functions.

``Launch`` sends the lookups' outputs and hands out a token; ``Land`` waits, and makes the pooled output. What
lies between them overlaps with the exchange; in backward it is ``Land`` that sends gradients and ``Launch``
that waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from tightrec.compression.blocks import copy_blocks, packed_cells
from tightrec.sharding.exchange import Exchange, ExchangeStep
from tightrec.sharding.expand import Expansion
from tightrec.sharding.parts import Part, held_cells, leg_steps
from tightrec.sharding.transport import floats


@dataclass(frozen=True, kw_only=True)
class Bags:
    """This rank's bags of a batch: distinct ones where it was deduplicated."""

    rows: dict[str, int]
    """Bags by feature."""
    inverse: Tensor | None
    """int64 [F, batch]: which bag each row has; None: its own."""
    batch: int
    """Rows of the batch."""
    divisors: dict[str, Tensor] = field(default_factory=dict)
    """float32 [bags] by feature, of those whose sums are divided after the exchange."""
    filled: dict[str, Tensor] = field(default_factory=dict)
    """float32 [bags] by the same features: 0 where a bag is empty, else 1."""


@dataclass(frozen=True, kw_only=True)
class _Region:
    """Where the rows of a part lie among all."""

    start: int
    end: int


class Step:
    """Geometry and buffers of one step.

    Args:
        exchange: of the module.
        expansion: of the module.
        bags: of this rank's batch.
        held: by part, int64 [ranks, slots] rows of the lookup's output for each rank.
        division: what gradients of exchanged parts are divided by.
        what: of messages, such as "step 7".
    """

    def __init__(
        self,
        exchange: Exchange,
        expansion: Expansion,
        bags: Bags,
        held: Sequence[np.ndarray],
        division: int,
        what: str,
    ) -> None:
        self.exchange, self.expansion, self.bags, self.division = exchange, expansion, bags, division
        self.parts: list[Part] = exchange.parts
        self.local = [number for number, part in enumerate(self.parts) if part.kind == "local"]
        self.remote = [number for number, part in enumerate(self.parts) if part.kind != "local"]
        own_rows = [[bags.rows[slot.feature] for slot in part.received] for part in self.parts]
        legs = {n: leg_steps(self.parts[n], held[n], own_rows[n]) for n in self.remote}
        self._local_cells = {n: held_cells(self.parts[n], held[n])[0] for n in self.local}
        self.regions: list[_Region] = []
        self.rows: list[int] = []
        at = 0
        for part, rows in zip(self.parts, own_rows, strict=True):
            size = sum(count * slot.dim for count, slot in zip(rows, part.received, strict=True))
            self.regions.append(_Region(start=at, end=at + size))
            self.rows += rows
            at += size
        self.total = at
        self.moves: ExchangeStep = exchange.step(legs, what)
        self.index = expansion.index(self.rows, bags.inverse, bags.batch, exchange.device)

    def launch(self, outputs: Sequence[Tensor]) -> None:
        """Send the lookups' outputs of the remote parts."""
        self._buffer = self.exchange.buffers.take(4 * self.total)
        flat = floats(self._buffer, self.total)
        results = {n: flat[self.regions[n].start : self.regions[n].end] for n in self.remote}
        sources = {n: output.reshape(-1) for n, output in zip(self.remote, outputs, strict=True)}
        self.moves.send_forward(sources, results)

    def land(self, locals_: Sequence[Tensor]) -> Tensor:
        """The pooled output [batch, columns]."""
        self.moves.receive_forward()
        flat = floats(self._buffer, self.total)
        for number, matrix in zip(self.local, locals_, strict=True):
            cells, region = self._local_cells[number], self.regions[number]
            copy_blocks(matrix.reshape(-1), cells, flat[region.start : region.end], packed_cells(cells))
        self._divide(flat, gradients=False)
        with record_function("exchange: expand"):
            pooled = self.expansion.expand(flat, self.index, self.bags.batch)
        self.exchange.buffers.give(self._buffer)
        return pooled

    def launch_back(self, grad: Tensor) -> list[Tensor]:
        """Send the gradients of a pooled output; returns those of the local parts' lookups."""
        self._buffer = self.exchange.buffers.take(4 * self.total)
        flat = floats(self._buffer, self.total)
        with record_function("exchange: collect"):
            self.expansion.collect(grad, self.index, flat)
        self._divide(flat, gradients=True)
        grads = []
        for number in self.local:
            cells, region = self._local_cells[number], self.regions[number]
            matrix = torch.zeros(self._shapes[number], dtype=torch.float32, device=flat.device)
            copy_blocks(flat[region.start : region.end], packed_cells(cells), matrix.view(-1), cells)
            grads.append(matrix)
        if self.division != 1:
            for number in self.remote:
                flat[self.regions[number].start : self.regions[number].end].div_(self.division)
        self.moves.send_backward({n: flat[self.regions[n].start : self.regions[n].end] for n in self.remote})
        return grads

    def land_back(self) -> list[Tensor]:
        """Gradients of the remote parts' lookups."""
        arrived = self.moves.receive_backward()
        self.exchange.buffers.give(self._buffer)
        return [arrived[number].view(self._shapes[number]) for number in self.remote]

    def keep_shapes(self, outputs: Sequence[Tensor], locals_: Sequence[Tensor]) -> None:
        """Remember the lookups' shapes for their gradients."""
        pairs = [*zip(self.remote, outputs, strict=True), *zip(self.local, locals_, strict=True)]
        self._shapes = {number: output.shape for number, output in pairs}

    def _divide(self, flat: Tensor, gradients: bool) -> None:
        """MEAN pooling of sums that were made over ranks, on distinct rows.

        An empty bag's gradient reaches nothing, but divided by epsilon it would be the largest of its block.
        """
        at = 0
        slots = [slot for part in self.parts for slot in part.received]
        for slot, rows in zip(slots, self.rows, strict=True):
            size = rows * slot.dim
            if slot.mean and rows:
                block = flat[at : at + size].view(rows, slot.dim)
                block.div_(self.bags.divisors[slot.feature].unsqueeze(1))
                if gradients:
                    block.mul_(self.bags.filled[slot.feature].unsqueeze(1))
            at += size


class Launch(Function):
    """The lookups' outputs on their way; returns a token for :class:`Land`."""

    @staticmethod
    def forward(ctx: Any, step: Step, *outputs: Tensor) -> Tensor:
        """Start the forward exchange."""
        ctx.step = step
        with record_function("tightrec::embedding_exchange"):
            step.launch([output.detach() for output in outputs])
        return torch.empty(0, device=step.exchange.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Wait for the gradients."""
        with record_function("tightrec::backward_exchange"):
            return (None, *ctx.step.land_back())


class Land(Function):
    """The pooled output of what :class:`Launch` sent."""

    @staticmethod
    def forward(ctx: Any, step: Step, token: Tensor, *locals_: Tensor) -> Tensor:
        """Wait for the forward exchange and expand."""
        ctx.step = step
        with record_function("tightrec::embedding_exchange"):
            return step.land([matrix.detach() for matrix in locals_])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Add up the gradients of equal bags and start sending them."""
        with record_function("tightrec::backward_exchange"):
            local = ctx.step.launch_back(grad)
        return (None, grad.new_empty(0), *local)
