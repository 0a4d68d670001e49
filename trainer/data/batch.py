"""A training batch on its way from columns of numpy arrays to torchrec.

Shapes: B rows, D dense columns, F sparse columns.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from tightrec.formats.columns import Bags, Columns
from tightrec.formats.schema import Schema
from tightrec.sharding.dedup import dedup_bags


@dataclass
class Batch(Pipelineable):
    """Exactly B rows; rows that only fill up have weight 0.

    Every rank's every batch has the same B, because torchrec's collectives on gloo need equal strides.
    """

    dense: Tensor
    """float32 [B, D]; D may be 0."""

    sparse: KeyedJaggedTensor
    """Keys in the schema's order, ``stride()`` B, ids int64, lengths int32, no weights.

    Either B bags a feature, or each feature's distinct bags with inverse indices int64 [F, B]
    (:func:`tightrec.sharding.dedup.dedup_bags`).
    """

    labels: Tensor
    """float32 [B], 0 or 1."""

    weights: Tensor
    """float32 [B]: 1 for a row of the data, 0 for padding (zero dense, empty bags, label 0)."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The same batch on ``device``."""
        return Batch(
            dense=self.dense.to(device, non_blocking=non_blocking),
            sparse=self.sparse.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            weights=self.weights.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked host memory."""
        return Batch(
            dense=self.dense.pin_memory(),
            sparse=self.sparse.pin_memory(),
            labels=self.labels.pin_memory(),
            weights=self.weights.pin_memory(),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of every part until ``stream`` has passed this point."""
        for part in (self.dense, self.sparse, self.labels, self.weights):
            part.record_stream(stream)
        # torchrec's record_stream passes over the inverse indices.
        inverse = self.sparse.inverse_indices_or_none()
        if inverse is not None:
            inverse[1].record_stream(stream)


def to_batch(columns: Columns, schema: Schema, batch_size: int, *, dedup: bool = False) -> Batch:
    """A batch of the given ``columns`` (at most ``batch_size`` rows), padded up to ``batch_size``.

    Args:
        dedup: keep each feature's distinct bags only, with inverse indices.
    """
    rows = len(columns)
    assert rows <= batch_size, f"{rows} rows do not fit a batch of {batch_size}"
    lengths = np.zeros((len(columns.sparse), batch_size), np.int32)
    for feature, bags in enumerate(columns.sparse):
        lengths[feature, :rows] = 1 if bags.offsets is None else bags.sizes
    ids = np.concatenate([np.empty(0, np.int64), *(bags.ids for bags in columns.sparse)])
    weights = np.zeros(batch_size, np.float32)
    weights[:rows] = 1.0
    sparse = KeyedJaggedTensor(
        keys=schema.sparse_names,
        values=torch.from_numpy(ids),
        lengths=torch.from_numpy(lengths.reshape(-1)),
        stride=batch_size,
    )
    return Batch(
        dense=torch.from_numpy(_padded(columns.dense, batch_size)),
        sparse=dedup_bags(sparse) if dedup else sparse,
        labels=torch.from_numpy(_padded(columns.labels, batch_size)),
        weights=torch.from_numpy(weights),
    )


def padding_batch(schema: Schema, batch_size: int, *, dedup: bool = False) -> Batch:
    """A batch without a row of data: for a rank that takes part in a step but has nothing left.

    Args:
        dedup: as in :func:`to_batch`, so that every batch of a job has the same form.
    """
    nothing = Columns(
        dense=np.empty((0, len(schema.dense)), np.float32),
        labels=np.empty(0, np.float32),
        sparse=tuple(Bags(np.empty(0, np.int64)) for _ in schema.sparse),
    )
    return to_batch(nothing, schema, batch_size, dedup=dedup)


def _padded(values: np.ndarray, rows: int) -> np.ndarray:
    # torch takes the array over, and a view of a chunk would keep the whole chunk alive.
    padded = np.zeros((rows, *values.shape[1:]), np.float32)
    padded[: len(values)] = values
    return padded
