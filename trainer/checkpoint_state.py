"""The leaves of a job's state: their names, and copies of them that training cannot alter.

A job's state is a mapping from names to objects with ``state_dict``; its leaves get dotted names such as
``model.sparse_arch.embedding_bag_collection.embedding_bags.t_user.weight`` and
``optimizer.state.<parameter>.t_user.momentum1``.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer


class Stateful(Protocol):
    """What a checkpoint holds: modules, sharded modules, keyed optimizers."""

    def state_dict(self) -> dict[str, Any]:
        """Nested mapping of leaves; tensors alias the object's own."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take over loaded leaves."""
        ...


@dataclass(frozen=True)
class Leaf:
    """One value of a nested state dict, with the mapping that holds it."""

    holder: dict[str, Any]
    """The innermost mapping."""

    key: str
    """The value's key there."""

    @property
    def value(self) -> Any:
        """The value itself."""
        return self.holder[self.key]


def leaves_of(nested: Mapping[str, Any]) -> dict[str, Leaf]:
    """All leaves of nested mappings, by dotted name; lists are leaves."""
    found: dict[str, Leaf] = {}

    def walk(prefix: str, holder: Any) -> None:
        for key, value in holder.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping):
                walk(f"{name}.", value)
            else:
                assert name not in found, f"two leaves are called {name}"
                found[name] = Leaf(holder, key)

    walk("", nested)
    return found


def shape_of(value: Any) -> tuple[int, ...] | None:
    """Global shape of a leaf; None for one that is not a tensor."""
    if isinstance(value, ShardedTensor):
        return tuple(value.metadata().size)
    return tuple(value.size()) if isinstance(value, Tensor) else None


def refuse_local_optimizer_state(leaves: Mapping[str, Leaf]) -> None:
    """Refuse state of sharded tables that is kept as local tensors, of which one rank's would be saved.

    Raises:
        ValueError: naming the first such table.
    """
    sharded = [name for name, leaf in leaves.items() if isinstance(leaf.value, ShardedTensor)]
    parameters = {name.partition(".")[2] for name in sharded if ".state." not in name}
    for name, leaf in leaves.items():
        parameter = name.partition(".state.")[2].rpartition(".")[0]
        if parameter in parameters and shape_of(leaf.value) and not isinstance(leaf.value, ShardedTensor):
            raise ValueError(
                f"{parameter} is sharded but trained by a dense optimizer, whose state cannot be saved: it "
                "does not know its place in the whole table. Shard it with compute_kernel='fused'."
            )


class SnapshotPlanner(DefaultSavePlanner):
    """A save planner that writes copies taken when it was made, so that training can go on meanwhile.

    torchrec's shards of several tables are views of one buffer, and copying a ShardedTensor as a whole
    (what torch's own stagers do) would copy that buffer once per table; here each shard is copied alone, to
    CPU memory.
    """

    def __init__(self, leaves: Mapping[str, Leaf]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.state: dict[str, Any] = {}
        """What to hand to ``dcp.save``: copies, but of sharded leaves the live ones, read for shapes only."""
        self._shards: dict[str, dict[torch.Size, Tensor]] = {}
        for name, leaf in leaves.items():
            value = leaf.value
            if isinstance(value, ShardedTensor):
                self.state[name] = value
                self._shards[name] = {
                    torch.Size(shard.metadata.shard_offsets): _copy(shard.tensor)
                    for shard in value.local_shards()
                }
            else:
                self.state[name] = _copy(value) if isinstance(value, Tensor) else copy.deepcopy(value)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The copy of the shard or leaf that a write item names."""
        shards = self._shards.get(index.fqn)
        return super().lookup_object(index) if shards is None else shards[index.offset]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def initialise_optimizers(state: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Create optimizer state that torch makes lazily at the first step, where the checkpoint holds some.

    Runs a step with gradients of zero on such an optimizer: load its parameters afterwards.
    """
    for name, value in state.items():
        if not isinstance(value, KeyedOptimizer):
            continue
        for prefix, optimizer in _single_optimizers(value, f"{name}.state."):
            lazy = [key for key, parameter in optimizer.params.items() if parameter not in optimizer.state]
            if any(leaf.startswith(f"{prefix}{key}.") for key in lazy for leaf in stored):
                optimizer.init_state()
                optimizer.zero_grad(set_to_none=True)


def _single_optimizers(optimizer: KeyedOptimizer, prefix: str) -> list[tuple[str, KeyedOptimizer]]:
    if not isinstance(optimizer, CombinedOptimizer):
        return [(prefix, optimizer)]
    parts = []
    for key, part in optimizer.optimizers:
        parts += _single_optimizers(part, f"{prefix}{key}." if key else prefix)
    return parts
