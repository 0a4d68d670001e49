"""Counts of the bytes that the embedding exchange puts on the wire, by purpose.

A count is what this rank sends to *other* ranks, as the collective's payload: no protocol headers, no
copy to itself. A reduce-scatter or all-gather counts as if every peer's part were sent directly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch import distributed as dist

from tightrec.sharding.compat import replaced_collectives

Purpose = Literal["input", "forward", "backward"]


@dataclass
class Traffic:
    """Bytes sent to other ranks since the start or the last :meth:`take`."""

    sent_bytes: dict[Purpose, int] = field(default_factory=lambda: {"input": 0, "forward": 0, "backward": 0})
    """By purpose: ids of the batch; pooled embeddings; gradients of pooled embeddings."""

    def take(self) -> dict[Purpose, int]:
        """Return the counts and start again at 0."""
        counts, self.sent_bytes = self.sent_bytes, dict.fromkeys(self.sent_bytes, 0)
        return counts

    def add(self, purpose: Purpose | None, bytes_: int) -> None:
        """Count ``bytes_``; without a purpose, forward or backward as autograd's state tells."""
        if purpose is None:
            purpose = "backward" if torch._C._current_graph_task_id() != -1 else "forward"
        self.sent_bytes[purpose] += bytes_


_counting: list[Traffic] = []


def count(purpose: Purpose, bytes_: int) -> None:
    """Add what our own exchange sends to whoever counts at present."""
    for traffic in _counting:
        traffic.add(purpose, bytes_)


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count torchrec's collectives and ours inside the ``with``; microseconds a collective."""
    traffic = Traffic()
    embeddings = _Counting(traffic, None)
    inputs = _Counting(traffic, "input")
    _counting.append(traffic)
    try:
        with replaced_collectives(embeddings, inputs):
            yield traffic
    finally:
        _counting.remove(traffic)


class _Counting:
    """``torch.distributed`` with its collectives counted; everything else passes through."""

    def __init__(self, traffic: Traffic, purpose: Purpose | None) -> None:
        self._traffic = traffic
        self._purpose: Purpose | None = purpose

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: dist.ProcessGroup | None = None,
        **rest: Any,
    ) -> Any:
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        per_item = input[0].numel() if input.dim() > 1 and len(input) else 1
        items = sum(input_split_sizes) if input_split_sizes else len(input)
        own = input_split_sizes[rank] if input_split_sizes else items // world
        self._traffic.add(self._purpose, (items - own) * per_item * input.element_size())
        return dist.all_to_all_single(
            output, input, output_split_sizes, input_split_sizes, group=group, **rest
        )

    def reduce_scatter(self, output: Tensor, input_list: list[Tensor], *rest: Any, **more: Any) -> Any:
        rank = dist.get_rank(more.get("group"))
        others = sum(t.numel() for i, t in enumerate(input_list) if i != rank)
        self._traffic.add(self._purpose, others * output.element_size())
        return dist.reduce_scatter(output, input_list, *rest, **more)

    def reduce_scatter_tensor(self, output: Tensor, input: Tensor, *rest: Any, **more: Any) -> Any:
        self._traffic.add(self._purpose, (input.numel() - output.numel()) * input.element_size())
        return dist.reduce_scatter_tensor(output, input, *rest, **more)

    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor, *rest: Any, **more: Any) -> Any:
        self._traffic.add(self._purpose, (len(tensor_list) - 1) * tensor.numel() * tensor.element_size())
        return dist.all_gather(tensor_list, tensor, *rest, **more)

    def all_gather_into_tensor(self, output: Tensor, input: Tensor, *rest: Any, **more: Any) -> Any:
        self._traffic.add(self._purpose, (output.numel() - input.numel()) * input.element_size())
        return dist.all_gather_into_tensor(output, input, *rest, **more)
