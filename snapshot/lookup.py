"""Low-precision tables in memory, looked up by fbgemm's inference table-batched operator.

fbgemm's class holds the memory and says where each table lies in it. The operator is called directly: the
forward of that class, with its bookkeeping for caches and pruning, takes three times as long for one row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    BoundsCheckMode,
    EmbeddingLocation,
    PoolingMode,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
    IntNBitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn

from tightrec.snapshot.packed import check_shape, row_bytes

_POOLING = {"sum": PoolingMode.SUM, "mean": PoolingMode.MEAN}

_FILL_BYTES = 1 << 24
"""Copied at a time: a GPU stages that much, never a whole table."""


@dataclass(frozen=True, kw_only=True)
class TableShape:
    """One table of a lookup."""

    name: str
    """Which fill() takes."""

    kind: str
    """How its rows are stored, see TABLE_TYPES."""

    rows: int
    """R, without the overflow row."""

    dim: int
    """D, values in a row: a multiple of 4."""


class Lookup(nn.Module):
    """Pooled embeddings of all features, one table each, in one call of the operator.

    Every table gets one row of zeros after its own: id R gives the zero vector in every type.
    """

    def __init__(
        self, shapes: Sequence[TableShape], pooling: Literal["sum", "mean"], device: torch.device
    ) -> None:
        """Reserves the memory, all zeros until fill().

        Raises:
            ValueError: No table, two of one name, an unknown type or pooling, or a dim that is not allowed.
        """
        super().__init__()
        self.shapes = tuple(shapes)
        names = [shape.name for shape in self.shapes]
        if not names:
            raise ValueError("a lookup needs at least one table")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"table {twice!r} is there twice: give every table a name of its own")
        if pooling not in _POOLING:
            raise ValueError(f"pooling {pooling!r} is unknown: choose one of {', '.join(_POOLING)}")
        for shape in self.shapes:
            row_bytes(shape.kind, shape.dim)

        place = EmbeddingLocation.HOST if device.type == "cpu" else EmbeddingLocation.DEVICE
        self.tables = IntNBitTableBatchedEmbeddingBagsCodegen(
            [(shape.name, shape.rows + 1, shape.dim, SparseType(shape.kind), place) for shape in self.shapes],
            pooling_mode=_POOLING[pooling],
            device=device,
            bounds_check_mode=BoundsCheckMode.NONE,
            output_dtype=SparseType.FP32,
            indices_dtype=torch.int64,
        )
        self.tables.initialize_weights()
        self._unfilled = set(names)
        self._arguments = self.operator_arguments()

    def fill(self, name: str, data: Tensor) -> None:
        """Copies a table's rows into the operator's memory, piece by piece.

        Args:
            name: Of the table.
            data: uint8 [R, row_bytes], may be memory-mapped.

        Raises:
            ValueError: Unknown table, or data of another shape.
        """
        index = next((index for index, shape in enumerate(self.shapes) if shape.name == name), None)
        if index is None:
            raise ValueError(f"table {name!r} is unknown: there are {', '.join(s.name for s in self.shapes)}")
        shape = self.shapes[index]
        try:
            check_shape(data, shape.kind, shape.dim)
        except ValueError as error:
            raise ValueError(f"table {name!r}: {error}") from None
        if len(data) != shape.rows:
            raise ValueError(f"table {name!r} has {shape.rows} rows, but {len(data)} were given to fill it")
        # uint8 [R + 1, row_bytes and, on a GPU, padding]
        memory = self.tables.split_embedding_weights(split_scale_shifts=False)[index][0]
        width = data.shape[1]
        step = max(1, _FILL_BYTES // width)
        for start in range(0, shape.rows, step):
            stop = min(start + step, shape.rows)
            memory[start:stop, :width].copy_(data[start:stop])
        self._unfilled.discard(name)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Looks up B bags of each of the F features.

        Args:
            ids: int64 [sum of sizes] on the lookup's device, 0 to R of their tables: not checked here.
            offsets: int64 [F*B+1] on the lookup's device; bag f*B+b is feature f of row b.

        Returns:
            float32 [B, F*D], features in the order of the shapes; an empty bag gives zeros.

        Raises:
            RuntimeError: A table was not filled.
        """
        if self._unfilled:
            raise RuntimeError(f"tables {', '.join(sorted(self._unfilled))} are to be filled before a lookup")
        return torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            *self._arguments[0], ids, offsets, *self._arguments[1]
        )

    @property
    def size_bytes(self) -> int:
        """Memory of all tables, with overflow rows and padding."""
        return self.tables.host_size + self.tables.dev_size

    def operator_arguments(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What the operator takes before and after ids and offsets, in its schema's order."""
        tables = self.tables
        before = (
            tables.weights_host if tables.host_size > 0 else tables.weights_dev,
            tables.weights_uvm,
            tables.weights_placements,
            tables.weights_offsets,
            tables.weights_tys,
            tables.D_offsets,
            tables.total_D,
            tables.max_int2_D,
            tables.max_int4_D,
            tables.max_int8_D,
            tables.max_float16_D,
            tables.max_float32_D,
        )
        after = (
            int(tables.pooling_mode),
            None,  # weights of single ids
            tables.output_dtype,
            tables.lxu_cache_weights,
            torch.empty(
                0, dtype=torch.int32, device=tables.current_device
            ),  # places in a cache that is not there
            tables.row_alignment,
        )
        return before, after
