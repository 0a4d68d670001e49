"""Which features have a table, which a deep hash embedding, which both."""

import difflib
from collections.abc import Sequence

from tightrec.models.config import Representation, RepresentationConfig

Cardinalities = Sequence[tuple[str, int]]
"""Name and number of ids of every sparse feature, in the schema's order."""


def representations(columns: Cardinalities, config: RepresentationConfig) -> dict[str, Representation]:
    """The representation of each feature, in the order of ``columns``.

    Raises:
        ValueError: the configuration names a feature that is not there.
    """
    names = [name for name, _ in columns]
    selected = _selected(columns, config) if config.kind == "select" else ()
    _require_known(selected, names, "select")
    _require_known(config.features, names, "features")
    rest: Representation = "table" if config.kind == "select" else config.kind
    found: dict[str, Representation] = {name: "dhe" if name in selected else rest for name in names}
    return found | dict(config.features)


def with_table(columns: Cardinalities, config: RepresentationConfig) -> list[str]:
    """The features that have an embedding table, in order."""
    return [name for name, kind in representations(columns, config).items() if kind != "dhe"]


def with_dhe(columns: Cardinalities, config: RepresentationConfig) -> list[str]:
    """The features that have a deep hash embedding, in order."""
    return [name for name, kind in representations(columns, config).items() if kind != "table"]


def _selected(columns: Cardinalities, config: RepresentationConfig) -> Sequence[str]:
    if not isinstance(config.select, int):
        return config.select
    # Of equal sizes the first ones: sorting is stable.
    return [name for name, _ in sorted(columns, key=lambda column: -column[1])[: config.select]]


def _require_known(given: Sequence[str] | dict[str, Representation], names: list[str], setting: str) -> None:
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            meant = f" Did you mean {near[0]!r}?" if near else f" There are {', '.join(names)}."
            raise ValueError(
                f"model.representation.{setting} names {name!r}, but there is no such feature.{meant}"
            )
