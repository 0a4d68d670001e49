"""The one on-disk layout: a folder of parquet files beside a ``schema.json``.

    FOLDER/schema.json
    FOLDER/train/part-00000.parquet, part-00001.parquet, ...
    FOLDER/valid/..., FOLDER/test/...          splits may be absent

One parquet column per column of the schema, named alike:

- label: float32, 0 or 1, no nulls;
- dense: float32, finite, no nulls;
- single-hot sparse: int64 ids in [0, cardinality), no nulls;
- multi-hot sparse: list<int64> of such ids, empty lists allowed, no nulls.

No other column stands in a file. Row groups are the unit of shuffling and of sharing work between ranks.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tightrec.formats.settings import from_mapping

SCHEMA_FILE = "schema.json"
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class SparseColumn:
    """One categorical column."""

    name: str
    """Name of the parquet column and of the feature in the KeyedJaggedTensor."""

    cardinality: int
    """Number of ids; every id lies in [0, cardinality)."""

    multi_hot: bool = False
    """Whether a row holds a list of ids instead of exactly one."""

    def __post_init__(self) -> None:
        if self.cardinality < 1:
            raise ValueError(
                f"sparse column {self.name!r}: cardinality {self.cardinality} must be at least 1."
            )


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What a data set holds, and how it was made."""

    dense: tuple[str, ...]
    """Names of the dense columns, in the order of the model's dense input."""

    sparse: tuple[SparseColumn, ...]
    """The sparse columns, in the order of the KeyedJaggedTensor's keys."""

    label: str
    """Name of the label column."""

    rows: dict[str, int]
    """Rows per split, for the splits that exist."""

    source: str
    """Where the rows came from, in words."""

    preparation: dict[str, Any] = field(default_factory=dict)
    """The settings of the preparation that produced the folder."""

    format_version: int = 1
    """Version of this layout."""

    def __post_init__(self) -> None:
        names = [self.label, *self.dense, *(column.name for column in self.sparse)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"column names must differ, but {', '.join(twice)} stands more than once.")
        if self.format_version != 1:
            raise ValueError(
                f"format_version {self.format_version} is not known here (known: 1). "
                "Prepare the data again, or use the tightrec that wrote it."
            )

    @property
    def sparse_names(self) -> list[str]:
        """Names of the sparse columns, in order."""
        return [column.name for column in self.sparse]

    def save(self, folder: Path) -> None:
        """Write ``schema.json`` into ``folder``, atomically."""
        partial = folder / (SCHEMA_FILE + ".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        partial.rename(folder / SCHEMA_FILE)


def load_schema(folder: Path) -> Schema:
    """Read the schema of a prepared folder.

    Raises:
        ValueError: the folder or its schema is missing, or the schema does not parse.
    """
    path = folder / SCHEMA_FILE
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist. Name a folder written by "
            "`python -m tightrec.trainer.data.prepare`, or prepare one first."
        )
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Prepare the data again.") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must hold one JSON object. Prepare the data again.")
    return from_mapping(Schema, values, str(path))
