"""Requests of the Open Inference Protocol: what is read, and what each malformed one is told."""

import json

import numpy as np
import pytest

from tightrec.serving.server.protocol import HEADER_LENGTH, Protocol
from tightrec.serving.server.tensors import RequestError
from tightrec.snapshot.manifest import Feature

SPARSE = (
    Feature(name="user", cardinality=50, multi_hot=False),
    Feature(name="genres", cardinality=20, multi_hot=True),
)
PROTOCOL = Protocol("tightrec", "7", ("age", "hour"), SPARSE, 100)


def tensor(name: str, values: object, datatype: str = "INT64", **changes: object) -> dict[str, object]:
    found: dict[str, object] = {"name": name, "shape": None, "datatype": datatype, "data": values}
    if "shape" not in changes:
        found["shape"] = list(np.shape(values))  # type: ignore[arg-type]
    return {name: value for name, value in {**found, **changes}.items() if value is not None}


DENSE = tensor("dense", [[1.5, 2], [3, 4]], "FP32")
USER = tensor("user", [1, 2])
GENRES = tensor("genres", [[3, 4], [5, 6]])


def body(*inputs: object, **others: object) -> bytes:
    return json.dumps({"inputs": list(inputs), **others}).encode()


def test_a_json_request_is_read_with_its_parameters():
    asked = PROTOCOL.read(
        body(DENSE, USER, GENRES, id="a7", parameters={"target_ms": 10, "path": "quick"}), None
    )
    assert asked.id == "a7" and asked.target_ms == 10 and asked.path == "quick"
    assert not asked.binary
    np.testing.assert_array_equal(asked.dense, [[1.5, 2], [3, 4]])
    np.testing.assert_array_equal(asked.sparse["user"], [1, 2])
    np.testing.assert_array_equal(asked.sparse["genres"], [[3, 4], [5, 6]])
    assert asked.sparse["user"].dtype == np.int64


def test_bags_come_as_values_and_offsets_and_flat_data_has_the_shape_it_says():
    genres = [tensor("genres", [3, 4, 5]), tensor("genres.offsets", [0, 0, 3])]
    dense = tensor("dense", [1, 2, 3, 4], "FP32", shape=[2, 2])
    asked = PROTOCOL.read(body(dense, USER, *genres), None)
    values, offsets = asked.sparse["genres"]
    assert values.tolist() == [3, 4, 5] and offsets.tolist() == [0, 0, 3]
    assert asked.dense is not None and asked.dense.tolist() == [[1, 2], [3, 4]]


def test_binary_tensors_follow_the_json_in_the_order_of_the_inputs():
    parts = [np.array([[1, 2]], "<f4"), np.array([9], "<i8"), np.array([[3, 4, 5]], "<i4")]
    kinds = ["FP32", "INT64", "INT32"]
    inputs = [
        tensor(name, None, kind, shape=list(part.shape), parameters={"binary_data_size": part.nbytes})
        for name, kind, part in zip(["dense", "user", "genres"], kinds, parts, strict=True)
    ]
    # A header of every length: tensors may stand at odd addresses.
    for spaces in range(8):
        head = body(*inputs) + b" " * spaces
        asked = PROTOCOL.read(head + b"".join(part.tobytes() for part in parts), len(head))
        assert asked.dense is not None and asked.dense.tolist() == [[1, 2]]
        assert asked.sparse["user"].tolist() == [9]
        assert asked.sparse["genres"].tolist() == [[3, 4, 5]] and asked.sparse["genres"].dtype == np.int64


def test_the_answer_echoes_the_id_and_has_the_scores_as_json_or_binary():
    scores = np.array([0.25, 0.1], np.float32)
    asked = PROTOCOL.read(body(DENSE, USER, GENRES, id="x"), None)
    found, headers = PROTOCOL.write(asked, scores, {"path": "quick"})
    values = json.loads(found)
    assert (
        values["id"] == "x" and values["model_version"] == "7" and values["parameters"] == {"path": "quick"}
    )
    assert values["outputs"] == [
        {"name": "probability", "datatype": "FP32", "shape": [2], "data": values["outputs"][0]["data"]}
    ]
    assert np.float32(values["outputs"][0]["data"]).tolist() == scores.tolist()
    assert HEADER_LENGTH not in headers
    outputs = [{"name": "probability", "parameters": {"binary_data": True}}]
    asked = PROTOCOL.read(body(DENSE, USER, GENRES, outputs=outputs), None)
    found, headers = PROTOCOL.write(asked, scores, {})
    length = int(headers[HEADER_LENGTH])
    assert json.loads(found[:length])["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert np.frombuffer(found, "<f4", offset=length).tolist() == scores.tolist()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"", "valid JSON"),
        (b"{", "valid JSON"),
        (b"[]", "JSON object"),
        (b"[" * 100_000, "valid JSON"),
        (b'{"inputs": ' + b"[" * 2000 + b"]" * 2000 + b"}", "valid JSON"),
        (b'{"inputs": [{"name": "user", "data": [NaN]}]}', "valid JSON"),
        (b'{"inputs": [{"name": "user", "data": [Infinity]}]}', "valid JSON"),
        (b'\xff{"inputs": []}', "valid JSON"),
        (body(), "list `inputs`"),
        (json.dumps({"inputs": {"user": [1]}}).encode(), "list `inputs`"),
        (body(7), "entry 0 must be an object"),
        (body({"name": ["user"]}), "entry 0 must be an object"),
        (body(DENSE, USER), "'genres' is missing: "),
        (body(DENSE, USER, GENRES | {"name": "genre"}), "'genres' is missing (and 'genre' is not known)"),
        (body(USER, GENRES), "'dense' is missing"),
        (body(DENSE, USER, GENRES, tensor("item", [1, 2])), "'item' is unknown"),
        (body(DENSE, USER, USER, GENRES), "'user' is given twice"),
        (body(DENSE, tensor("user", [1, 2], "FP32"), GENRES), "'user' must be INT64"),
        (body(DENSE, tensor("user", [1, 2], "UINT8"), GENRES), "'user': `datatype` must be one of"),
        (body(DENSE, tensor("user", [1, 2], datatype=["INT64"]), GENRES), "`datatype`"),
        (body(tensor("dense", [1, 2], "INT64"), USER, GENRES), "'dense' must be FP32"),
        (body(tensor("dense", [1.0, 2.0], "FP32"), USER, GENRES), "'dense' must be FP32 with the shape"),
        (body(DENSE, tensor("user", [1, 2], shape=[3]), GENRES), "holds 2 values where the shape [3] has 3"),
        (body(DENSE, tensor("user", [1, 2], shape=[-2]), GENRES), "whole numbers"),
        (body(DENSE, tensor("user", [1, 2], shape=[True, 2]), GENRES), "whole numbers"),
        (body(DENSE, tensor("user", [1, 2], shape=[2.0]), GENRES), "whole numbers"),
        (body(DENSE, tensor("user", [1, 2], shape=[2**31 - 1, 2**31 - 1]), GENRES), "holds 2 values"),
        (body(DENSE, tensor("user", [1, 2], shape=[2**70]), GENRES), "whole numbers"),
        (body(DENSE, tensor("user", [1, 2], shape=[1, 1, 2]), GENRES), "`shape` must be a list of 1 to 2"),
        (body(DENSE, tensor("user", [1, 2], shape=None), GENRES), "`shape`"),
        (body(DENSE, tensor("user", [1, 2.5]), GENRES), "integers of 64 bits alone"),
        (body(DENSE, tensor("user", [1, True]), GENRES), "integers of 64 bits alone"),
        (body(DENSE, tensor("user", [1, "2"]), GENRES), "integers of 64 bits alone"),
        (body(DENSE, tensor("user", [1, None]), GENRES), "integers of 64 bits alone"),
        (body(DENSE, tensor("user", [1, 2**63]), GENRES), "integers of 64 bits"),
        (body(DENSE, tensor("user", [1, 2**80]), GENRES), "integers of 64 bits"),
        (body(DENSE, tensor("user", [1, 2**31], "INT32"), GENRES), "integers of 32 bits"),
        (body(DENSE, USER, tensor("genres", [[1, 2], [3]], shape=[2, 2])), "nested"),
        (body(DENSE, USER, tensor("genres", [[1, 2], 3], shape=[2, 2])), "nested"),
        (body(DENSE, tensor("user", None, shape=[2]), GENRES), "list `data`"),
        (body(DENSE, {**USER, "parameters": {"binary_data_size": 16}}, GENRES), "not both"),
        (body(DENSE, {**USER, "parameters": {"shared_memory_region": "x"}}, GENRES), "not supported"),
        (body(DENSE, {**USER, "parameters": []}, GENRES), "`parameters`"),
        (body(DENSE, {**USER, "dtype": 1}, GENRES), "field 'dtype' is not known"),
        (body(DENSE, tensor("user", [1] * 101), GENRES), "has 101 rows, and a request at most 100"),
        (body(DENSE, USER, GENRES, id=7), "`id`"),
        (body(DENSE, USER, GENRES, id="x" * 2000), "`id`"),
        (body(DENSE, USER, GENRES, parameters=[1]), "`parameters`"),
        (body(DENSE, USER, GENRES, parameters={"target": 1}), "'target' is not known"),
        (body(DENSE, USER, GENRES, parameters={"target_ms": 0}), "'target_ms'"),
        (body(DENSE, USER, GENRES, parameters={"target_ms": "5"}), "'target_ms'"),
        (body(DENSE, USER, GENRES, parameters={"target_ms": 3_600_001}), "at most 3600000"),
        (body(DENSE, USER, GENRES, parameters={"target_ms": 1e308}), "at most 3600000"),
        (body(DENSE, USER, GENRES, parameters={"target_ms": True}), "'target_ms'"),
        (body(DENSE, USER, GENRES, parameters={"path": 1}), "'path'"),
        (body(DENSE, USER, GENRES, parameters={"binary_data_output": 1}), "'binary_data_output'"),
        (body(DENSE, USER, GENRES, outputs=[{"name": "score"}]), "'probability'"),
        (body(DENSE, USER, GENRES, outputs=[{"name": "probability"}] * 2), "asks for 2 tensors"),
        (body(DENSE, USER, GENRES, outputs="probability"), "`outputs`"),
        (
            body(DENSE, USER, GENRES, outputs=[{"name": "probability", "parameters": {"classification": 3}}]),
            "'classification' is not supported",
        ),
    ],
)
def test_what_is_malformed_is_named(given: bytes, said: str):
    with pytest.raises(RequestError) as caught:
        PROTOCOL.read(given, None)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("size", "rest", "said"),
    [
        (16, 15, "15 left"),
        (16, 17, "17 bytes follow the JSON"),
        (8, 8, "`binary_data_size` is 8 where the shape [2] of INT64 has 16 bytes"),
        (-16, 16, "`binary_data_size` is -16"),
        (16.0, 16, "`binary_data_size` is 16.0"),
        (True, 16, "`binary_data_size` is True"),
        (2**80, 16, "`binary_data_size` is 1.2089258196146292e+"),
    ],
)
def test_binary_sizes_must_be_those_of_shape_and_body(size: object, rest: int, said: str):
    user = tensor("user", None, shape=[2], parameters={"binary_data_size": size})
    head = body(DENSE, GENRES, user)
    with pytest.raises(RequestError) as caught:
        PROTOCOL.read(head + bytes(rest), len(head))
    assert said in str(caught.value)


def test_a_shape_that_claims_much_allocates_nothing():
    shape, size = [2**31 - 1, 2**20], 8 * (2**31 - 1) * 2**20
    user = tensor("user", None, shape=shape, parameters={"binary_data_size": size})
    head = body(DENSE, GENRES, user)
    with pytest.raises(RequestError, match="bytes are announced, and the body has 16 left"):
        PROTOCOL.read(head + bytes(16), len(head))


@pytest.mark.parametrize("length", [-1, 10**9])
def test_a_header_length_outside_of_the_body_is_refused(length: int):
    with pytest.raises(RequestError, match="the body has"):
        PROTOCOL.read(body(DENSE, USER, GENRES), length)


def test_a_feature_called_dense_does_not_hide_the_dense_columns():
    protocol = Protocol("m", "1", ("age",), (Feature(name="dense", cardinality=5, multi_hot=False),), 10)
    names = [value["name"] for value in protocol.metadata()["inputs"]]
    assert names == ["dense_", "dense"]
    asked = protocol.read(body(tensor("dense_", [[1.0]], "FP32"), tensor("dense", [4])), None)
    assert asked.dense is not None and asked.dense.tolist() == [[1.0]]
    assert asked.sparse["dense"].tolist() == [4]
