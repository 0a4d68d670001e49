"""Configuration of sharding and of the embedding exchange's codec."""

from dataclasses import dataclass, field
from typing import Literal

ShardingName = Literal[
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "grid_shard",
    "data_parallel",
]
CodecName = Literal["none", "fp16", "bf16", "int8", "fp8", "mx4"]


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """Which rank holds which part of which table."""

    type: Literal["auto"] | ShardingName = "auto"
    """``auto``: torchrec's planner chooses. Else every table is sharded that way."""

    tables: dict[str, ShardingName] = field(default_factory=dict)
    """Sharding type by table name or shell pattern (``t_C*``), before ``type``; the last match counts."""

    exclude: tuple[ShardingName, ...] = ()
    """Types that the planner may not choose (``auto`` only)."""

    memory_gb: float | None = None
    """Memory a rank may fill with tables, for the planner; None: the device's own, 16 GB on CPU."""

    def __post_init__(self) -> None:
        if self.memory_gb is not None and not self.memory_gb > 0:
            raise ValueError(f"sharding.memory_gb={self.memory_gb} must be above 0.")
        if self.exclude and self.type != "auto":
            raise ValueError(
                f"sharding.exclude is only read with sharding.type=auto, not {self.type}. "
                "Remove one of the two."
            )


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """What the exchanged embeddings and their gradients look like on the wire."""

    forward: CodecName = "none"
    """Pooled embeddings, from the ranks that hold tables to the ranks that hold rows of the batch."""

    backward: CodecName = "none"
    """Gradients of the pooled embeddings, the other way."""
