"""Whether a checkpoint's embeddings are those of the job that is to continue it.

Hashes follow from the configuration and are in no checkpoint: with another seed or transform every shape
would fit, and the decoders would read codes that they were not trained on.
"""

import dataclasses
from pathlib import Path
from typing import Any

from tightrec.formats.checkpoint_files import read_manifest
from tightrec.formats.schema import Schema
from tightrec.models.config import HASHING, ModelConfig, RepresentationConfig, config_of
from tightrec.models.representation import representations

_MOST_TOLD = 3


def other_representation(checkpoint: Path, model: ModelConfig, schema: Schema) -> str | None:
    """The sentence to refuse ``checkpoint`` with; None: its embeddings are those of ``model``, or unknown.

    Args:
        schema: of the job's data.
    """
    try:
        saved = read_manifest(checkpoint).extra.get("model")
        before = config_of(saved).representation if saved else RepresentationConfig()
        columns = [(column.name, column.cardinality) for column in schema.sparse]
        then, now = _told(columns, before), _told(columns, model.representation)
    except (ValueError, TypeError):
        # Damage, and features of other data, are told when it is loaded, with what else does not fit.
        return None
    odd = [name for name in now if then.get(name, now[name]) != now[name]]
    if not odd:
        return None
    parts = [f"{name} was {then[name]}, is {now[name]}" for name in odd[:_MOST_TOLD]]
    if len(odd) > _MOST_TOLD:
        parts.append(f"and {len(odd) - _MOST_TOLD} more")
    return (
        f"The checkpoint {checkpoint} was trained with another representation: {'; '.join(parts)}. Resume it "
        "with the settings of model.representation that it has, or start afresh."
    )


def _told(columns: list[tuple[str, int]], config: RepresentationConfig) -> dict[str, Any]:
    """What makes each feature's vectors, and the settings of the deep hash embeddings where there is one."""
    kinds = representations(columns, config)
    told: dict[str, Any] = {f"feature {name}": kind for name, kind in kinds.items()}
    if any(kind != "table" for kind in kinds.values()):
        values = dataclasses.asdict(config)
        told |= {name: values[name] for name in HASHING}
    return told
