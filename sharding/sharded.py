"""A sharded EmbeddingBagCollection whose exchange of pooled embeddings is ours."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.types import Awaitable, LazyAwaitable, LazyGetItemMixin
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from tightrec.sharding.compat import (
    leave_mean_to_us,
    module_lookups,
    module_tables,
    module_world,
    output_columns,
    parts_of,
)
from tightrec.sharding.config import CodecConfig
from tightrec.sharding.dedup import dedup_bags
from tightrec.sharding.exchange import Exchange
from tightrec.sharding.expand import Expansion
from tightrec.sharding.parts import Part
from tightrec.sharding.steering import Steering
from tightrec.sharding.step import Bags, Land, Launch, Step

_EPSILON = 1e-6
"""torchrec's guard against empty bags in MEAN pooling after the exchange."""


@dataclass
class ExchangeContext(EmbeddingBagCollectionContext):
    """torchrec's context of a batch, and what the exchange needs of it."""

    bags: Bags | None = None
    """This rank's own bags."""

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until ``stream`` has passed this point."""
        super().record_stream(stream)
        if self.bags is not None:
            tensors = [*self.bags.divisors.values(), *self.bags.filled.values()]
            for tensor in tensors if self.bags.inverse is None else [*tensors, self.bags.inverse]:
                tensor.record_stream(stream)


class CompressedShardedEmbeddingBagCollection(ShardedEmbeddingBagCollection):
    """torchrec's module with its output distribution replaced; keys of its state are the same.

    Args:
        codec: what travels.
        device: of the tables.
        arguments: of torchrec's class.
    """

    def __init__(self, codec: CodecConfig, device: torch.device | None = None, **arguments: Any) -> None:
        super().__init__(device=device, **arguments)
        leave_mean_to_us(self)
        self._parts = parts_of(self)
        group, self._world = module_world(self)
        self._output_names, self._output_dims = output_columns(self)
        self.codec = codec
        where = device or torch.device("cpu")
        self.steering = Steering(codec, module_tables(self), self._parts, group, where)
        self._exchange = Exchange(self._parts, self.steering.pilot, where)
        self._expansion: Expansion | None = None
        self._mean = sorted({slot.feature for part in self._parts for slot in part.received if slot.mean})

    def create_context(self) -> ExchangeContext:
        """See torchrec."""
        return ExchangeContext()

    def input_dist(self, ctx: ExchangeContext, features: KeyedJaggedTensor) -> Awaitable[Awaitable[KJTList]]:
        """Deduplicate, unless a loader did, and send ids to the ranks that hold them.

        Raises:
            ValueError: the features are none that the exchange can take, by name.
        """
        if not isinstance(features, KeyedJaggedTensor):
            raise ValueError(
                f"the sharded tables were given a {type(features).__name__}; give a KeyedJaggedTensor."
            )
        if self.codec.dedup or features.variable_stride_per_key():
            with record_function("tightrec::input_exchange"):
                features = dedup_bags(features)
        ctx.bags = self._bags(features)
        if self._expansion is None:
            slots = [slot for part in self._parts for slot in part.received]
            inverse_order = features.inverse_indices_or_none()
            keys = features.keys() if inverse_order is None else inverse_order[0]
            self._expansion = Expansion(slots, self._output_names, keys)
        return super().input_dist(ctx, features)

    def _bags(self, features: KeyedJaggedTensor) -> Bags:
        rows = dict(zip(features.keys(), features.stride_per_key(), strict=True))
        inverse = features.inverse_indices_or_none()
        batch = features.stride() if inverse is None else inverse[1].shape[1]
        divisors, filled = {}, {}
        if self._mean:
            lengths = features.lengths()
            sizes = lengths
            if features.weights_or_none() is not None:
                offsets = features.offsets()
                sizes = torch.segment_reduce(features.weights(), "sum", offsets=offsets, initial=0.0)
            at = 0
            for key, count in rows.items():
                if key in self._mean:
                    divisors[key] = sizes[at : at + count] + _EPSILON
                    filled[key] = (lengths[at : at + count] > 0).to(torch.float32)
                at += count
        return Bags(
            rows=rows,
            inverse=None if inverse is None else inverse[1],
            batch=batch,
            divisors=divisors,
            filled=filled,
        )

    def compute_and_output_dist(self, ctx: ExchangeContext, input: KJTList) -> LazyAwaitable[KeyedTensor]:
        """Look up, and send the pooled rows to the ranks whose batch they belong to."""
        assert ctx.bags is not None
        held = [
            _held_rows(part, features, context)
            for part, features, context in zip(self._parts, input, ctx.sharding_contexts, strict=True)
        ]
        with record_function("tightrec::lookup"):
            lookups = zip(module_lookups(self), input, strict=True)
            outputs = [lookup(padded(features)) for lookup, features in lookups]
        return self._send(ctx.bags, held, outputs)

    def compute(self, ctx: ExchangeContext, dist_input: KJTList) -> list[Tensor]:
        """Look up; for callers that distribute later."""
        ctx.held = [  # type: ignore[attr-defined]
            _held_rows(part, features, context)
            for part, features, context in zip(self._parts, dist_input, ctx.sharding_contexts, strict=True)
        ]
        return [
            lookup(padded(features))
            for lookup, features in zip(module_lookups(self), dist_input, strict=True)
        ]

    def output_dist(self, ctx: ExchangeContext, output: list[Tensor]) -> LazyAwaitable[KeyedTensor]:
        """Send what ``compute`` looked up."""
        assert ctx.bags is not None
        return self._send(ctx.bags, ctx.held, output)  # type: ignore[attr-defined]

    def update_shards(self, *arguments: Any, **more: Any) -> None:
        """Moving tables while a job runs is torchrec's alone.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "tables whose exchange is compressed cannot be resharded while a job runs: save a checkpoint and "
            "load it into a job with the other plan."
        )

    @torch.compiler.disable
    def _send(self, bags: Bags, held: list[np.ndarray], outputs: list[Tensor]) -> LazyAwaitable[KeyedTensor]:
        assert self._expansion is not None
        self.steering.begin()
        step = Step(
            self._exchange,
            self._expansion,
            bags,
            held,
            division=self._world if get_gradient_division() else 1,
            what=self.steering.pilot.what,
        )
        remote = [outputs[number] for number in step.remote]
        local = [outputs[number] for number in step.local]
        step.keep_shapes(remote, local)
        token = Launch.apply(step, *remote)

        def land() -> KeyedTensor:
            values = Land.apply(step, token, *local)
            pooled = KeyedTensor(
                keys=self._output_names, length_per_key=self._output_dims, values=values, key_dim=1
            )
            self.steering.landed(pooled, bags.rows)
            return pooled

        return Pooled(land)


class Pooled(LazyGetItemMixin[str, Tensor], LazyAwaitable[KeyedTensor]):
    """The pooled output, waited for when it is first used."""

    def __init__(self, land: Callable[[], KeyedTensor]) -> None:
        super().__init__()
        self._land: Callable[[], KeyedTensor] | None = land

    def _wait_impl(self) -> KeyedTensor:
        assert self._land is not None
        # Dropped, so that the step's buffers do not live as long as the awaitable.
        land, self._land = self._land, None
        return torch.compiler.disable(land)()


def padded(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same bags with empty ones behind each feature's, so that all features have equally many.

    Any lookup operator then does: those for a fixed number of bags know all optimizers and devices. Empty
    bags cost their length, no lookup; the host knows all counts, so nothing waits for a device.
    """
    if not features.variable_stride_per_key():
        return features
    counts = features.stride_per_key()
    height = max(counts, default=0)
    lengths = features.lengths()
    if any(count != height for count in counts):
        given = torch.tensor(counts).unsqueeze(1) > torch.arange(height)
        filled = lengths.new_zeros(len(counts), height)
        lengths = filled.masked_scatter_(given.to(lengths.device, non_blocking=True), lengths).view(-1)
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        weights=features.weights_or_none(),
        lengths=lengths,
        stride=height,
        length_per_key=features.length_per_key_or_none(),
        offset_per_key=features.offset_per_key_or_none(),
    )


def _held_rows(part: Part, features: KeyedJaggedTensor, context: Any) -> np.ndarray:
    """int64 [ranks, slots]: rows of the lookup's output for each rank, in the order in which they lie."""
    slots = len(part.held)
    ranks = int(np.prod([peers.size for peers in part.peers], dtype=np.int64))
    if features.variable_stride_per_key():
        if not slots:
            return np.zeros((ranks, 0), dtype=np.int64)
        return np.array(features.stride_per_key_per_rank(), dtype=np.int64).T
    by_rank = list(context.batch_size_per_rank) or [features.stride()]
    if part.kind == "local":
        by_rank = [features.stride()]
    rows = np.array(by_rank, dtype=np.int64)
    if part.kind == "two_level":
        inner, outer = part.peers
        # torchrec counts ranks machine by machine, while the rows lie by place in the machine.
        rows = rows.reshape(outer.size, inner.size).T.reshape(-1)
    return np.repeat(rows[:, None], slots, axis=1)
