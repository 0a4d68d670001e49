"""Configuration of sharding and of the embedding exchange's codec."""

from dataclasses import dataclass, field
from typing import Literal

from tightrec.compression.policy.config import BoundConfig

ShardingName = Literal[
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "grid_shard",
    "data_parallel",
]
CodecName = Literal["none", "fp16", "bf16", "int8", "fp8", "mx4", "lossy", "auto"]
ModeName = Literal["auto", "measured", "published", "raw", "half", "packed", "dedup", "entropy"]

FRAMED: tuple[CodecName, ...] = ("lossy", "auto")
"""Codecs whose sizes vary: frames of ``compression/``."""


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
    """Pooled embeddings, from the ranks that hold tables to the ranks that hold rows of the batch.
    ``lossy``: error-bounded frames. ``auto``: the same, or plain where the link is too fast to gain."""

    backward: CodecName = "none"
    """Gradients of the pooled embeddings, the other way."""

    dedup: bool = True
    """Look up and send equal bags of a feature once, and sum the gradients of equal bags; lossless."""

    bound: BoundConfig = BoundConfig()
    """Error bounds (``lossy`` and ``auto``)."""

    budget_ne: float | None = None
    """Loss of normalised entropy that quantising the forward exchange may cost: bounds of all tables follow
    from it, by probes (``lossy`` and ``auto``)."""

    mode: ModeName = "auto"
    """How frames are written: ``auto`` the smallest for each block; ``measured`` by predicted time for each
    table; ``published`` SC'24's choice between dedup and entropy; or one mode for all."""

    transport: Literal["sizes", "capacity"] = "sizes"
    """``sizes``: byte counts travel first, then frames. ``capacity``: slots of a fixed size for each peer,
    from what it sent before; what does not fit follows in the same step."""

    checksums: bool = False
    """Stamp frames with a CRC-32 and check it on arrival (CPU ranks)."""

    exact_evaluation: bool = True
    """Send float32 in forwards without gradients: the scores are then those of the model that will be served,
    whose tables nobody exchanges."""

    refresh_every: int = 500
    """Steps between new codebooks for the entropy mode; the first come after 10."""

    examine_every: int = 500
    """Steps between choices of mode and of plain or compressed (``measured``, ``published``, ``auto``)."""

    stats_every: int = 20
    """Steps between samples of what frames hold, by table; 0: never."""

    shadow_every: int = 100
    """Steps between checks of the true error against the bound, by table; 0: never. Costs a decode."""

    def __post_init__(self) -> None:
        for name in ("refresh_every", "examine_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"codec.{name}={getattr(self, name)} must be at least 1.")
        for name in ("stats_every", "shadow_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"codec.{name}={getattr(self, name)} must be 0 or more.")
        if self.budget_ne is not None and not self.budget_ne > 0:
            raise ValueError(
                f"codec.budget_ne={self.budget_ne} must be above 0: the NE that compression may cost, such "
                "as 0.0002. For none at all use codec.bound.forward=lossless codec.bound.backward=lossless."
            )
        if self.budget_ne is not None and self.forward not in FRAMED:
            raise ValueError(
                f"codec.budget_ne sets error bounds, but codec.forward={self.forward} has none. "
                "Use codec=lossy."
            )

    @property
    def framed(self) -> bool:
        """Whether some direction is sent in error-bounded frames."""
        return self.forward in FRAMED or self.backward in FRAMED
