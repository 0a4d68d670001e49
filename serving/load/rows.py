"""Rows that the load generator sends: a prepared folder's, or made-up ones with a model's features."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tightrec.formats.schema import Schema, SparseColumn
from tightrec.serving.load.config import LoadClientConfig
from tightrec.serving.load.requests import InferRequests, synthetic_columns

OFFSETS = ".offsets"
"""What follows a feature's name in that of its bags' offsets."""


def requests_of(config: LoadClientConfig, told: Mapping[str, Any]) -> InferRequests:
    """Requests over the rows that ``config`` asks for.

    Args:
        told: the server's metadata of the model.

    Raises:
        ValueError: no such rows, or they do not fit what the server reads.
    """
    if config.data is not None:
        # Not needed for synthetic rows, and it takes torch and pyarrow with it.
        from tightrec.formats.schema import load_schema
        from tightrec.snapshot.rows import read_rows

        columns = read_rows(config.data, config.split, config.pool_rows)
        schema = load_schema(config.data)
    else:
        schema = snapshot_schema(config.snapshot) if config.snapshot is not None else told_schema(told)
        columns = synthetic_columns(schema, config.pool_rows, config.zipf, config.seed)
    require_inputs(schema, told, config.url)
    return InferRequests(
        columns,
        schema,
        max_rows=config.max_rows,
        order=config.order,
        seed=config.seed,
        dense_name=_inputs(told)[0],
    )


def snapshot_schema(folder: Path) -> Schema:
    """The columns that a snapshot's model reads."""
    from tightrec.snapshot.manifest import read_manifest

    features = read_manifest(folder.resolve()).features
    sparse = tuple(
        SparseColumn(
            name=column["name"],
            cardinality=column["cardinality"],
            multi_hot=column.get("multi_hot", False),
        )
        for column in features["sparse"]
    )
    return _schema(tuple(features["dense"]), sparse, str(folder))


def told_schema(told: Mapping[str, Any]) -> Schema:
    """The columns that a server says its model reads.

    A feature's input carries its cardinality among its parameters.

    Raises:
        ValueError: a feature has none.
    """
    _, dense, inputs = _inputs(told)
    sparse = []
    for name, one in inputs.items():
        parameters = one.get("parameters") or {}
        if "cardinality" not in parameters:
            raise ValueError(
                f"the server does not say how many ids {name!r} has. Give rows with data=FOLDER, or a "
                "snapshot with snapshot=FOLDER."
            )
        column = SparseColumn(
            name=name,
            cardinality=int(parameters["cardinality"]),
            multi_hot=bool(parameters.get("multi_hot", False)),
        )
        sparse.append(column)
    return _schema(tuple(f"dense {i}" for i in range(dense)), tuple(sparse), "a server")


def require_inputs(schema: Schema, told: Mapping[str, Any], url: str) -> None:
    """Refuse rows whose columns are not the inputs that a server names.

    Raises:
        ValueError: naming the first column that differs.
    """
    _, dense, wanted = _inputs(told)
    for name in schema.sparse_names:
        if name not in wanted:
            raise ValueError(
                f"the rows have a column {name!r}, which the model at {url} does not read; it reads "
                f"{', '.join(wanted)}. Give the data set that it was trained on."
            )
    for name in wanted:
        if name not in schema.sparse_names:
            raise ValueError(f"the model at {url} reads {name!r}, which the rows do not have.")
    if dense != len(schema.dense):
        raise ValueError(
            f"the rows have {len(schema.dense)} dense columns, but the model at {url} reads {dense}."
        )


def _inputs(told: Mapping[str, Any]) -> tuple[str, int, dict[str, Any]]:
    """Name and columns of the dense input, which alone is of floats, and the features' inputs by name."""
    inputs = {one["name"]: one for one in told["inputs"]}
    dense_name, dense = "", 0
    for name, one in inputs.items():
        if one.get("datatype") == "FP32" and one["shape"]:
            dense_name, dense = name, int(one["shape"][-1])
    sparse = {
        name: one
        for name, one in inputs.items()
        if name != dense_name and not (name.endswith(OFFSETS) and name.removesuffix(OFFSETS) in inputs)
    }
    return dense_name, dense, sparse


def _schema(dense: tuple[str, ...], sparse: tuple[SparseColumn, ...], source: str) -> Schema:
    return Schema(dense=dense, sparse=sparse, label="label", rows={}, source=source)
