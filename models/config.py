"""Configuration of the models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Representation = Literal["table", "dhe", "hybrid"]
"""What makes the vectors of one feature."""

HASHING = ("hashes", "buckets", "transform", "decoder", "activation", "hash_seed")
"""Settings of :class:`RepresentationConfig` that only deep hash embeddings read."""


def table_name(feature: str) -> str:
    """The embedding table of a sparse feature; every feature has one of its own."""
    return f"t_{feature}"


@dataclass(frozen=True, kw_only=True)
class RepresentationConfig:
    """How ids become vectors: by a table, by a deep hash embedding (DHE, Kang et al. 2021) or by both, as in
    MP-Rec (arXiv 2302.10872)."""

    kind: Literal["table", "dhe", "hybrid", "select"] = "table"
    """Of all features. ``table``: one row an id. ``dhe``: hashes of the id through a small network, no
    table. ``hybrid``: both vectors enter the interaction. ``select``: DHE for the features of ``select``,
    tables for the others."""

    features: dict[str, Representation] = field(default_factory=dict)
    """Of single features, by name; wins over ``kind``."""

    select: int | tuple[str, ...] = 5
    """Features by name, or the n with the most ids (``kind=select`` only)."""

    hashes: int = 1024
    """k, universal hashes an id: inputs of the decoder."""

    buckets: int = 1_000_000
    """m, values of a hash."""

    transform: Literal["uniform", "gaussian"] = "uniform"
    """Distribution of the decoder's inputs: uniform in [-1, 1], or standard normal (Box-Muller)."""

    decoder: tuple[int, ...] = (128,)
    """Hidden widths of each feature's decoder; a last layer of embedding_dim is appended."""

    activation: Literal["sigmoid", "relu", "mish", "linear"] = "sigmoid"
    """Behind the decoder's last layer; a ReLU stands between its layers."""

    hash_seed: int = 0
    """Draws the hashes, together with the feature's name. Not to be changed once trained."""

    def __post_init__(self) -> None:
        for name in ("hashes", "buckets"):
            if getattr(self, name) < 2:
                raise ValueError(f"model.representation.{name}={getattr(self, name)} must be at least 2.")
        if self.buckets >= 2**24:
            raise ValueError(
                f"model.representation.buckets={self.buckets} must be below 2**24: float32 holds no more."
            )
        if self.transform == "gaussian" and self.hashes % 2:
            raise ValueError(
                f"model.representation.hashes={self.hashes} must be even with transform=gaussian, which "
                "makes two values of two hashes."
            )
        if any(width < 1 for width in self.decoder):
            raise ValueError("model.representation.decoder must hold widths of at least 1.")
        if isinstance(self.select, int) and self.select < 1:
            raise ValueError(f"model.representation.select={self.select} must be at least 1, or names.")

    @property
    def hashing(self) -> bool:
        """Whether some feature may have a deep hash embedding."""
        return self.kind != "table" or any(kind != "table" for kind in self.features.values())


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

    representation: RepresentationConfig = RepresentationConfig()
    """What makes the vectors of the sparse features."""

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


def config_of(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration that JSON ``values`` hold, as ``dataclasses.asdict`` gave them.

    Raises:
        TypeError: a field that there is not.
        ValueError: values that do not fit.
    """
    fields = _tuples(values)
    if "representation" in fields:
        fields["representation"] = RepresentationConfig(**_tuples(fields["representation"]))
    return ModelConfig(**fields)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
