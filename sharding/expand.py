"""From distinct rows, as they arrived, to one row for each row of the batch, and the gradients back.

One ``index_select`` over rows of *units* (the greatest common divisor of all dims) makes the whole pooled
output: repeats of bags, the order of features and the columns of column-wise shards at once. Its backward is
one ``index_add_``: the gradients of equal bags are summed.
"""

from collections.abc import Sequence
from functools import cached_property
from math import gcd

import torch
from torch import Tensor

from tightrec.sharding.parts import Slot


class Expansion:
    """Where the columns of a pooled output come from; made once for a module.

    Args:
        slots: in the order in which their distinct rows lie.
        names: of the output's features, in order.
        features: keys of the batch, in the order of its inverse indices.
    """

    def __init__(self, slots: Sequence[Slot], names: Sequence[str], features: Sequence[str]) -> None:
        self.unit = gcd(*(slot.dim for slot in slots)) if slots else 1
        self._features = len(features)
        places = {name: place for place, name in enumerate(features)}
        order = {name: place for place, name in enumerate(names)}
        # (order of the name, column) sorts the slots as their columns stand in the output.
        columns = sorted(range(len(slots)), key=lambda i: (order[slots[i].name], slots[i].column))
        slot_of, within, feature_of, step = [], [], [], []
        for i in columns:
            units = slots[i].dim // self.unit
            for unit in range(units):
                slot_of.append(i)
                within.append(unit)
                feature_of.append(places[slots[i].feature])
                step.append(units)
        self.width = len(slot_of) * self.unit
        self._slot_of = torch.tensor(slot_of, dtype=torch.int64)
        self._within = torch.tensor(within, dtype=torch.int64)
        self._feature_of = torch.tensor(feature_of, dtype=torch.int64)
        self._step = torch.tensor(step, dtype=torch.int64)
        self._units = [slot.dim // self.unit for slot in slots]

    @cached_property
    def _plain_order(self) -> bool:
        """Whether column i comes from feature i and there are no others, as features without a table are."""
        return torch.equal(self._feature_of, torch.arange(self._features))

    def index(self, rows: Sequence[int], inverse: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """Which unit row each unit of the output is, int64 [batch * width / unit].

        Args:
            rows: distinct rows of each slot.
            inverse: int64 [F, batch], which distinct bag each bag is; None: every bag is its own.
            batch: rows of the batch.
            device: of the index.
        """
        starts, at = [], 0
        for count, units in zip(rows, self._units, strict=True):
            starts.append(at)
            at += count * units
        first = (torch.tensor(starts, dtype=torch.int64)[self._slot_of] + self._within).to(
            device, non_blocking=True
        )
        if inverse is None:
            picked = torch.arange(batch, device=device).unsqueeze(1)
        elif self._plain_order:
            picked = inverse.t()
        else:
            picked = inverse.index_select(0, self._on(device, "_feature_of")).t()
        if self._units and max(self._units) == 1:
            return (picked + first).reshape(-1)
        return torch.addcmul(first, picked, self._on(device, "_step")).reshape(-1)

    def _on(self, device: torch.device, name: str) -> Tensor:
        tensor: Tensor = getattr(self, name)
        if tensor.device != device:
            tensor = tensor.to(device)
            setattr(self, name, tensor)
        return tensor

    def expand(self, distinct: Tensor, index: Tensor, batch: int) -> Tensor:
        """[batch, width] of flat distinct rows."""
        picked = distinct.view(-1, self.unit).index_select(0, index)
        return picked.view(batch, self.width)

    def collect(self, grad: Tensor, index: Tensor, out: Tensor) -> Tensor:
        """Add up the gradients [batch, width] of equal bags in flat ``out``."""
        out.zero_()
        out.view(-1, self.unit).index_add_(0, index, grad.reshape(-1, self.unit))
        return out
