"""How large a model is, whatever the ranks hold of it."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from tightrec.models.config import ModelConfig
from tightrec.models.representation import Cardinalities, representations, with_table
from tightrec.sharding.plan_table import size

_BYTES = 4
"""Of a parameter, which is float32."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Features by what makes their vectors, and parameters of the whole model."""

    features: dict[str, int]
    """Number of features with a ``table``, with a deep hash embedding (``dhe``), with both (``hybrid``)."""

    table_parameters: int
    """Of all tables, all ranks together and each table once."""

    dhe_parameters: int
    """Of the decoders of deep hash embeddings; every rank holds them all."""

    dense_parameters: int
    """Of all else."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.table_parameters + self.dhe_parameters + self.dense_parameters

    @property
    def bytes(self) -> int:
        """Of all parameters; optimizer state not counted."""
        return _BYTES * self.parameters

    def words(self) -> str:
        """One line for the console."""
        kinds = {"table": "table", "dhe": "deep hash embedding", "hybrid": "both (hybrid)"}
        told = ", ".join(f"{count} {kinds[kind]}" for kind, count in self.features.items() if count)
        line = f"features: {told}; {self.parameters:,} parameters, {size(self.bytes)}"
        if self.dhe_parameters:
            line += (
                f", of which deep hash embeddings {self.dhe_parameters:,}, "
                f"{size(_BYTES * self.dhe_parameters)}, on every rank"
            )
        return line

    def to_json(self) -> dict[str, object]:
        """As ``run.json`` holds it."""
        return {
            "features": self.features,
            "table_parameters": self.table_parameters,
            "dhe_parameters": self.dhe_parameters,
            "dense_parameters": self.dense_parameters,
            "parameters": self.parameters,
            "bytes": self.bytes,
        }


def size_of(model: nn.Module, columns: Cardinalities, config: ModelConfig) -> ModelSize:
    """The size of ``model``, sharded or not: a DLRM, or what wraps one.

    Args:
        columns: name and cardinality of its sparse features.
    """
    kinds = Counter[str](representations(columns, config.representation).values())
    tabled = with_table(columns, config.representation)
    counts = {"hashed_arch": 0, "dense": 0}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "embedding_bags" not in parts:
            counts["hashed_arch" if "hashed_arch" in parts else "dense"] += parameter.numel()
    return ModelSize(
        features={kind: kinds[kind] for kind in ("table", "dhe", "hybrid")},
        table_parameters=sum(rows for name, rows in columns if name in tabled) * config.embedding_dim,
        dhe_parameters=counts["hashed_arch"],
        dense_parameters=counts["dense"],
    )
