"""Configuration of the models."""

from dataclasses import dataclass
from typing import Literal


def table_name(feature: str) -> str:
    """The embedding table of a sparse feature; every feature has one of its own."""
    return f"t_{feature}"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a DLRM-class model; feature counts come from the data's schema."""

    architecture: Literal["dlrm", "dcnv2"] = "dlrm"
    """``dlrm``: pairwise dot products (Naumov et al. 2019). ``dcnv2``: low-rank cross network
    (Wang et al. 2021), the MLPerf DLRM-DCNv2."""

    embedding_dim: int = 16
    """Width of every embedding row; also the width that the bottom MLP ends in."""

    bottom_layers: tuple[int, ...] = (64,)
    """Hidden widths of the MLP over dense features; a last layer of embedding_dim is appended.
    Unused when the data has no dense columns."""

    top_layers: tuple[int, ...] = (128, 64)
    """Hidden widths of the MLP over the interaction; the last layer of width 1 is appended."""

    cross_layers: int = 3
    """Number of cross layers (dcnv2 only)."""

    cross_rank: int = 32
    """Rank of each cross layer's factorised matrix (dcnv2 only)."""

    pooling: Literal["sum", "mean"] = "sum"
    """How the rows of a multi-hot bag become one vector."""

    dense_precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16`` runs everything after the lookup under autocast; tables and their exchange stay as
    they are."""

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "cross_layers", "cross_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1.")
        if self.embedding_dim % 4:
            raise ValueError(
                f"model.embedding_dim={self.embedding_dim} must be a multiple of 4: fbgemm's table "
                "operators require it."
            )
        if not self.top_layers:
            raise ValueError("model.top_layers must name at least one hidden width.")
        if any(width < 1 for width in (*self.bottom_layers, *self.top_layers)):
            raise ValueError("model.bottom_layers and model.top_layers must hold widths of at least 1.")
