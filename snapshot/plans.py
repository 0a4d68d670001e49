"""From the word or file that ``precision`` names to a type for every table and layer."""

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tightrec.snapshot.config import PrecisionConfig
from tightrec.snapshot.precision import LAYER_TYPES, TABLE_TYPES, Plan

AUTO = "auto"
FORCED = {
    "int8": ("int8", "int8"),
    "int4": ("int4", "int8"),
    "int2": ("int2", "int8"),
    "fp16": ("fp16", "fp16"),
    "bf16": ("fp16", "bf16"),
    "fp32": ("fp32", "fp32"),
}
"""Type of all tables and of all layers, by the word that forces them."""

KEYS = ("tables", "layers")


def forced_plan(config: PrecisionConfig, tables: Sequence[str], layers: Sequence[str]) -> Plan:
    """The plan that ``config.precision`` names, which must not be ``auto``.

    Raises:
        ValueError: no such word or file, or a file that leaves a table or layer without a type, names one
            that is not there, or names an unknown type.
    """
    if config.precision in FORCED:
        of_tables, of_layers = FORCED[config.precision]
        types = dict.fromkeys(tables, of_tables), dict.fromkeys(layers, of_layers)
    else:
        types = _from_file(config.precision, tables, layers)
    return Plan(tables=types[0], layers=types[1], row_search=config.row_search, ranges=config.ranges)


def _from_file(
    precision: str, tables: Sequence[str], layers: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
    # Here, so that reading a Plan does not need PyYAML.
    import yaml

    path = Path(precision)
    if not path.is_file():
        raise ValueError(f"precision={precision} is neither a file nor one of auto, {', '.join(FORCED)}.")
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(found, Mapping) or sorted(found) != sorted(KEYS):
        raise ValueError(
            f"{path} must hold the two keys tables and layers, each a type or a mapping from names or "
            "patterns to types, such as\n    tables: {'*': int4, t_user: int8}\n    layers: int8"
        )
    return (
        _types(path, "tables", found["tables"], tables, TABLE_TYPES),
        _types(path, "layers", found["layers"], layers, LAYER_TYPES),
    )


def _types(path: Path, key: str, given: Any, names: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """A type for each of ``names``; of several patterns that match, the last one given counts."""
    patterns = given if isinstance(given, Mapping) else {"*": given}
    types: dict[str, str] = {}
    for pattern, kind in patterns.items():
        if kind not in known:
            raise ValueError(f"{path}: {key}.{pattern} is {kind!r}, but must be one of {', '.join(known)}.")
        matched = fnmatch.filter(names, str(pattern))
        # A file for many models may hold patterns that match nothing here, but a name must be there.
        if not matched and not set("*?[") & set(str(pattern)):
            raise ValueError(f"{path}: {key}.{pattern} is not in this model, which has {', '.join(names)}.")
        types |= dict.fromkeys(matched, kind)
    missing = [name for name in names if name not in types]
    if missing:
        raise ValueError(
            f"{path}: {key} has no type for {', '.join(missing)}. Add a line '*': TYPE before the others."
        )
    return {name: types[name] for name in names}
