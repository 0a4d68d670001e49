"""Infer requests: what a body holds, what an answer says, and which rows fit a server."""

import itertools
import json
from typing import Any

import fake_infer_server as fake
import numpy as np
import pytest
import tritonclient.http as triton

from tightrec.formats.columns import Bags, Columns
from tightrec.formats.schema import Schema, SparseColumn
from tightrec.serving.load.client import reply_of
from tightrec.serving.load.open_loop import Reply
from tightrec.serving.load.requests import (
    InferRequests,
    parameters_of,
    read_answer,
    synthetic_columns,
)
from tightrec.serving.load.rows import require_inputs, told_schema
from tightrec.serving.open_inference import HEADER_LENGTH

TOLD = {"inputs": fake.INPUTS}


def rows_of(count: int = 40) -> tuple[Columns, Schema]:
    schema = told_schema(TOLD)
    generator = np.random.default_rng(1)
    sizes = generator.integers(0, 4, count)
    columns = Columns(
        generator.standard_normal((count, 2)).astype(np.float32),
        np.zeros(count, np.float32),
        (
            Bags(generator.integers(0, 50, count)),
            Bags(generator.integers(0, 9, sizes.sum()), np.concatenate([[0], np.cumsum(sizes)])),
        ),
    )
    return columns, schema


def query_of(body: bytes, length: int) -> fake.Query:
    return fake.Query(json.loads(body[:length]), body[length:])


@pytest.mark.parametrize(("start", "rows"), [(0, 1), (3, 17), (39, 1), (30, 25), (5, 100)])
def test_a_body_holds_the_rows_it_names_and_goes_on_with_the_first(start: int, rows: int) -> None:
    columns, schema = rows_of()
    requests = InferRequests(columns, schema, max_rows=100)
    query = query_of(*requests.body(start, rows, parameters_of(5, "x")))
    expected = columns.take(np.arange(start, start + rows) % len(columns))
    assert query.parameters == {"target_ms": 5, "path": "x"}
    assert (query.values["dense"] == expected.dense).all()
    assert (query.values["user"] == expected.sparse[0].ids).all()
    assert (query.values["tags"] == expected.sparse[1].ids).all()
    assert (query.values["tags.offsets"] == expected.sparse[1].offsets).all()
    again = requests.columns(start, rows)
    assert (again.sparse[1].ids == expected.sparse[1].ids).all()


def test_a_body_is_what_tritonclient_makes_of_the_same_inputs() -> None:
    columns, schema = rows_of()
    body, length = InferRequests(columns, schema, max_rows=8).body(4, 8, parameters_of(5))
    values = query_of(body, length).values
    inputs = []
    for name, array in values.items():
        kind = "FP32" if array.dtype == np.float32 else "INT64"
        inputs.append(triton.InferInput(name, list(array.shape), kind))
        inputs[-1].set_data_from_numpy(np.array(array))
    outputs = [triton.InferRequestedOutput("probability")]
    theirs, header = triton.InferenceServerClient.generate_request_body(
        inputs, outputs=outputs, parameters={"target_ms": 5.0}
    )
    assert body[length:] == theirs[header:]
    ours = json.loads(body[:length])
    for one in json.loads(theirs[:header])["inputs"]:
        assert one in ours["inputs"]
    assert ours["outputs"] == json.loads(theirs[:header])["outputs"]
    assert ours["parameters"] == json.loads(theirs[:header])["parameters"]


def test_rows_of_single_ids_share_headers_that_fit_their_size() -> None:
    schema = Schema(
        dense=(), sparse=(SparseColumn(name="user", cardinality=9),), label="l", rows={}, source=""
    )
    requests = InferRequests(synthetic_columns(schema, 20, 1.0), schema, max_rows=20)
    for rows, path in itertools.product((3, 7, 3), ("a", "b")):
        query = query_of(*requests.body(2, rows, parameters_of(5, path)))
        assert query.rows == rows
        assert query.parameters["path"] == path
        assert list(query.values) == ["user"]


def test_random_order_holds_every_row_once_and_another_seed_another_order() -> None:
    columns, schema = rows_of(200)
    orders = []
    for seed in (0, 0, 1):
        requests = InferRequests(columns, schema, max_rows=1, order="random", seed=seed)
        orders.append(requests.columns(0, 200).dense[:, 0].tolist())
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != columns.dense[:, 0].tolist()
    assert sorted(orders[0]) == sorted(columns.dense[:, 0].tolist())


def test_no_rows_are_refused() -> None:
    columns, schema = rows_of(5)
    with pytest.raises(ValueError, match="no rows"):
        InferRequests(columns.slice(0, 0), schema, max_rows=1)


def answer(values: dict[str, Any], data: bytes = b"") -> tuple[dict[str, str], bytes]:
    header = json.dumps(values).encode()
    return {HEADER_LENGTH: str(len(header))} if data else {}, header + data


def test_answers_are_read_binary_and_json() -> None:
    scores = np.array([0.25, 0.5], "<f4").tobytes()
    parameters = {"path": "table-int8-cpu-1"}
    told = read_answer(*answer({"outputs": [{"name": "probability"}], "parameters": parameters}, scores))
    assert (told.path, told.rows) == ("table-int8-cpu-1", 2)
    told = read_answer(*answer({"outputs": [{"name": "probability", "data": [0.1, 0.2, 1]}]}))
    assert (told.path, told.rows) == ("", 3)


@pytest.mark.parametrize(
    ("status", "headers", "body", "expected"),
    [
        (200, *answer({"outputs": [{"name": "probability", "data": [0.5]}]}), Reply(path="")),
        (503, {"X-Shed": "late"}, b"{}", Reply(shed="late")),
        (503, {}, b'{"error": "no worker"}', Reply(failure="status 503: no worker")),
        (400, {"X-Shed": "late"}, b'{"error": "bad"}', Reply(failure="status 400: bad")),
        (500, {}, b"", Reply(failure="status 500: nothing said")),
        (502, {}, b"\xff<html>", Reply(failure="status 502: \ufffd<html>")),
    ],
)
def test_an_answers_meaning_follows_its_status(
    status: int, headers: dict[str, str], body: bytes, expected: Reply
) -> None:
    assert reply_of(status, headers, body, 1) == expected


@pytest.mark.parametrize(
    ("headers", "body", "told"),
    [
        (*answer({"outputs": [{"name": "probability", "data": [0.5, 0.5]}]}), "another number of scores"),
        (*answer({"outputs": [{"name": "probability", "data": [1.5]}]}), "no probability"),
        (*answer({"outputs": [{"name": "probability"}]}, b"\0\0\xc0\x7f"), "no probability"),
        (*answer({"outputs": [{"name": "score", "data": [0.5]}]}), "cannot be read"),
        (*answer({"outputs": 3}), "cannot be read"),
        ({}, b"<html>", "cannot be read"),
        ({HEADER_LENGTH: "x"}, b"{}", "cannot be read"),
    ],
)
def test_a_wrong_answer_with_status_200_is_a_failure(headers: dict[str, str], body: bytes, told: str) -> None:
    reply = reply_of(200, headers, body, 1)
    assert reply.path is None
    assert told in (reply.failure or "")


def test_synthetic_ids_are_zipfs_and_in_range() -> None:
    schema = Schema(
        dense=(), sparse=(SparseColumn(name="a", cardinality=1000),), label="l", rows={}, source=""
    )

    def shares(exponent: float) -> np.ndarray:
        (bags,) = synthetic_columns(schema, 200_000, exponent, 5).sparse
        assert bags.ids.min() >= 0
        return np.bincount(bags.ids, minlength=1000)[:1000] / 200_000

    assert shares(0).max() < 0.0016
    for exponent in (1.0, 1.05, 1.5):
        edges = np.arange(1, 1002, dtype=float)
        below = np.log(edges) if exponent == 1 else (edges ** (1 - exponent)) / (1 - exponent)
        expected = np.diff(below) / (below[-1] - below[0])
        assert np.abs(shares(exponent) - expected).max() < 0.006
    (bags,) = synthetic_columns(told_schema(TOLD), 500, 1.05).sparse[1:]
    assert set(bags.sizes) == {1, 2, 3, 4, 5}
    assert bags.ids.max() < 9


# What the server says it reads


def test_the_servers_metadata_names_the_columns() -> None:
    schema = told_schema(TOLD)
    assert len(schema.dense) == 2
    assert [(c.name, c.cardinality, c.multi_hot) for c in schema.sparse] == [
        ("user", 50, False),
        ("tags", 9, True),
    ]
    require_inputs(schema, TOLD, "u")


@pytest.mark.parametrize(
    ("dense", "names", "told"),
    [
        (2, ["user"], "reads 'tags'"),
        (2, ["user", "tags", "film"], "a column 'film'"),
        (3, ["user", "tags"], "3 dense columns"),
    ],
)
def test_rows_that_the_model_does_not_read_are_refused(dense: int, names: list[str], told: str) -> None:
    schema = Schema(
        dense=tuple(f"d{i}" for i in range(dense)),
        sparse=tuple(SparseColumn(name=name, cardinality=2) for name in names),
        label="l",
        rows={},
        source="",
    )
    with pytest.raises(ValueError, match=told):
        require_inputs(schema, TOLD, "http://x")


def test_a_server_that_names_no_cardinality_needs_other_rows() -> None:
    with pytest.raises(ValueError, match="how many ids 'user' has"):
        told_schema({"inputs": [{"name": "user", "datatype": "INT64", "shape": [-1]}]})
