"""Which number type every table and dense layer of a snapshot has."""

from dataclasses import dataclass

TABLE_TYPES = ("fp32", "fp16", "int8", "int4", "int2")
"""Of embedding rows, from exact to smallest; the integers have a scale and a bias a row."""

LAYER_TYPES = ("fp32", "bf16", "fp16", "int8")
"""Of dense layers."""

ROW_SEARCHES = ("min_max", "greedy")
"""How the range of an int4 or int2 row is found: its extremes, or the narrower range of least L2 error."""

RANGE_METHODS = ("mixed", "dynamic", "min_max", "percentile", "l2", "kl")
"""How the range of an int8 layer's input is found: of each row (``dynamic``), or once from held-out rows by
their extremes, 99.99 % of them, the least squared error or the least divergence. ``mixed``: ``l2`` behind
a ReLU and in decoders, ``dynamic`` elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A type for every table and every dense layer."""

    tables: dict[str, str]
    """Type by table's name, see TABLE_TYPES."""

    layers: dict[str, str]
    """Type by layer's name, see LAYER_TYPES."""

    row_search: str = "greedy"
    """Of int4 and int2 tables, see ROW_SEARCHES."""

    ranges: str = "mixed"
    """Of int8 layers' inputs, see RANGE_METHODS."""

    @property
    def counts(self) -> str:
        """How many parts have which type, such as ``tables 20 int4, 6 int8; layers 5 int8``."""
        return f"tables {_counted(self.tables, TABLE_TYPES)}; layers {_counted(self.layers, LAYER_TYPES)}"


def _counted(types: dict[str, str], known: tuple[str, ...]) -> str:
    kinds = list(types.values())
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in reversed(known) if kind in kinds) or "none"
