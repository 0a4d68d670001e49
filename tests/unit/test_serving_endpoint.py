"""The infer endpoint without HTTP, its document, and what the server says of snapshots as it starts."""

import asyncio
import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from serving_made import made_path, made_set, made_snapshot

from tightrec.serving.open_inference import MOST_TARGET_MS
from tightrec.serving.server import openapi, serve
from tightrec.serving.server.config import ServeConfig
from tightrec.serving.server.dispatch import Answer
from tightrec.serving.server.http_infer import THREAD_BYTES, InferEndpoint
from tightrec.serving.server.protocol import Protocol
from tightrec.serving.server.tensors import RequestError
from tightrec.serving.workers.paths import fingerprint_of
from tightrec.snapshot.inputs import Inputs
from tightrec.snapshot.manifest import Feature

FEATURES = (Feature(name="f", cardinality=50, multi_hot=False),)


def answered(
    dense: tuple[str, ...], scores: list[float], read_in: list[str] | None = None, size: int = 0
) -> Any:
    """What becomes of a request for ``scores``, with ``size`` blanks in front."""
    protocol = Protocol("m", "1", dense, FEATURES, 100)
    read = protocol.read

    def watched(body: bytes, length: int | None) -> Any:
        if read_in is not None:
            read_in.append(threading.current_thread().name)
        return read(body, length)

    protocol.read = watched  # type: ignore[method-assign]

    async def score(*_: Any) -> Answer:
        found = np.array(scores, np.float32)
        return Answer(scores=found, path="only", step=1, version="1", queue_ms=0, compute_ms=0)

    config = ServeConfig(paths=Path("paths.json"))
    inputs = Inputs(dense, FEATURES, "refuse", torch.device("cpu"))
    dispatcher: Any = SimpleNamespace(score=score)
    endpoint = InferEndpoint(config, protocol, inputs, dispatcher, frozenset({"only"}))
    rows = len(scores)
    tensors: list[dict[str, Any]] = [{"name": "f", "datatype": "INT64", "shape": [rows], "data": [1] * rows}]
    if dense:
        tensors.append({"name": "dense", "datatype": "FP32", "shape": [rows, 1], "data": [1.0] * rows})
    body = b" " * size + orjson.dumps({"inputs": tensors})
    return asyncio.run(endpoint._answer(body, None, 0.0))


def test_a_score_that_is_no_number_is_the_clients_mistake_only_where_it_gave_dense_values():
    assert answered((), [0.5, 0.25]).status == 200
    broken = answered((), [0.5, np.nan])
    assert broken.status == 500
    assert b"row 1: path only gives a score that is not a number" in broken.body
    with pytest.raises(RequestError, match=r"row 1: .* dense values are too large"):
        answered(("d",), [0.5, np.nan])


def test_large_json_is_read_in_a_thread():
    for size, alone in ((0, True), (THREAD_BYTES, False)):
        read_in: list[str] = []
        assert answered((), [0.5], read_in, size).status == 200
        assert (read_in == [threading.main_thread().name]) == alone


def test_the_document_allows_the_targets_that_are_taken():
    protocol = Protocol("m", "1", ("d",), FEATURES, 100)
    asked = openapi.document(protocol, ["only"], False)["components"]["schemas"]["InferRequest"]
    target = asked["properties"]["parameters"]["properties"]["target_ms"]
    assert (target["exclusiveMinimum"], target["maximum"]) == (0, MOST_TARGET_MS)


def test_the_document_allows_the_ids_that_are_taken():
    protocol = Protocol("m", "1", ("d",), (*FEATURES, Feature(name="g", cardinality=9, multi_hot=True)), 100)

    def limits(any_id: bool) -> dict[str, tuple[int, int]]:
        found = openapi.document(protocol, ["only"], any_id)["components"]["schemas"]["InferRequest"]
        told = {}
        for tensor in found["properties"]["inputs"]["items"]["oneOf"]:
            values = tensor["properties"]["data"]["items"]["anyOf"][0]
            if values["type"] == "integer":
                told[tensor["properties"]["name"]["enum"][0]] = values["minimum"], values["maximum"]
        return told

    offsets = (0, 2**63 - 1)
    assert limits(False) == {"f": (0, 49), "g": (0, 8), "g.offsets": offsets}
    assert limits(True) == {"f": (-(2**63), 2**63 - 1), "g": (-(2**63), 2**63 - 1), "g.offsets": offsets}


def test_a_snapshot_that_is_not_the_measured_one_is_named_once(tmp_path: Path):
    measured, other = made_snapshot(tmp_path / "measured"), made_snapshot(tmp_path / "other", seed=5)
    same = dataclasses.replace(made_path("same", measured), fingerprint=fingerprint_of(measured))
    paths = made_set([same, made_path("new", other), made_path("new-2", other, threads=2)])
    said: list[str] = []
    serve.say_unmeasured(paths, said.append)
    assert len(said) == 1 and str(other) in said[0] and "not the one that was measured" in said[0]
