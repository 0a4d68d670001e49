"""Settings of the command line, one dataclass a command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tightrec.snapshot.precision import RANGE_METHODS, ROW_SEARCHES


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Which number types, found or forced, and what they may cost."""

    precision: str = "int8"
    """``auto``: the smallest mixture within ``budget_ne``, searched. ``int8``, ``int4``, ``int2``: tables of
    that type, layers int8. ``fp16``, ``bf16`` (tables fp16), ``fp32``: everything. Else a YAML file with
    ``tables`` and ``layers``, each a type or a mapping from names or patterns to types."""

    budget_ne: float = 0.0002
    """What the snapshot may lose: its NE divided by the float32 model's, minus 1, on the same rows."""

    row_search: Literal["min_max", "greedy"] = "greedy"
    """Range of an int4 or int2 row: its extremes, or narrowed as long as the L2 error falls."""

    ranges: Literal["mixed", "dynamic", "min_max", "percentile", "l2", "kl"] = "mixed"
    """Range of an int8 layer's input. ``dynamic``: each row's own. ``min_max`` to ``kl``: fixed, from a
    histogram of held-out rows: faster, and inaccurate where a few large values carry much. ``mixed``: fixed
    by ``l2`` behind a ReLU and in decoders, each row's own elsewhere. A score never depends on the rows
    beside it."""

    data: Path | None = None
    """Prepared folder with held-out rows; None: the one that the checkpoint names."""

    search_split: str = "valid"
    """Split that ranges and types are chosen on."""

    search_rows: int = 100_000
    """Rows of it, evenly spread; all if fewer. With few rows a search keeps larger types, to be safe."""

    verify_split: str = "test"
    """Split that the snapshot is verified on."""

    verify_rows: int = 100_000
    """Rows of it, evenly spread; all if fewer."""

    batch_size: int = 1024
    """Rows that are scored at once."""

    threads: int | None = None
    """Intra-op CPU threads; None: what OMP_NUM_THREADS or torch says."""

    def __post_init__(self) -> None:
        if not 0 <= self.budget_ne < 1:
            raise ValueError(f"budget_ne={self.budget_ne} must lie between 0 and 1; 0.0002 is 0.02 %.")
        for name in ("search_rows", "verify_rows", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads={self.threads} must be at least 1, or null.")
        assert self.row_search in ROW_SEARCHES
        assert self.ranges in RANGE_METHODS


@dataclass(frozen=True, kw_only=True)
class ExportConfig(PrecisionConfig):
    """``export``: one checkpoint becomes one snapshot."""

    checkpoint: Path
    """A run folder (its newest complete checkpoint) or one ``step-...`` folder in it."""

    out: Path
    """The snapshot's folder; made by this command."""

    replace: bool = False
    """Put the new snapshot in the place of one that is there."""

    verify: bool = True
    """Compare with float32 on held-out rows and publish nothing past ``budget_ne``. ``false`` is written
    into the manifest."""
