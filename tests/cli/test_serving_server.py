"""The server as clients meet it: Triton's own client, plain HTTP, metrics, refusals by name."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from serving_server import Server, request_of, rows, scores, serving
from tritonclient.utils import InferenceServerException

from tightrec.serving.paths import read_paths
from tightrec.snapshot import Snapshot, load

INFER = "/v2/models/tightrec/infer"
LONG = {"target_ms": 60_000.0}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from serving_made import write_two_paths

    return write_two_paths(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(file: Path) -> Iterator[Server]:
    with serving(file, "max_rows=500") as started:
        yield started
        assert started.stop() == 0, started.lines


@pytest.fixture(scope="module")
def snapshots(file: Path) -> dict[str, Snapshot]:
    return {path.name: load(path.snapshot) for path in read_paths(file).paths}


@pytest.fixture
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as made:
        yield made


def tensors(count: int, binary: bool, seed: int = 0) -> list[triton.InferInput]:
    dense, sparse = rows(count, seed)
    found = []
    for name, values in {"dense": dense, **sparse}.items():
        found.append(triton.InferInput(name, values.shape, "FP32" if name == "dense" else "INT64"))
        found[-1].set_data_from_numpy(values, binary_data=binary)
    return found


def test_tritons_client_finds_a_live_ready_server_and_its_model(client: triton.InferenceServerClient):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("tightrec") and client.is_model_ready("tightrec", "1")
    assert not client.is_model_ready("other") and not client.is_model_ready("tightrec", "2")
    assert client.get_server_metadata()["name"] == "tightrec"
    told = client.get_model_metadata("tightrec")
    assert told["versions"] == ["1"]
    assert [tensor["name"] for tensor in told["inputs"]] == ["dense", "f0", "f1", "f2", "f2.offsets"]
    assert told["inputs"][1]["parameters"]["cardinality"] == 50
    assert told["outputs"] == [{"name": "probability", "datatype": "FP32", "shape": [-1]}]
    assert client.get_model_config("tightrec")["max_batch_size"] == 0
    assert client.get_model_repository_index()[0]["state"] == "READY"
    assert client.get_inference_statistics("tightrec")["model_stats"][0]["name"] == "tightrec"


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritons_client_gets_the_scores_that_predict_gives(
    client: triton.InferenceServerClient,
    snapshots: dict[str, Snapshot],
    binary_in: bool,
    binary_out: bool,
    compression: str | None,
):
    for name, snapshot in snapshots.items():
        answer = client.infer(
            "tightrec",
            tensors(100, binary_in),
            model_version="1",
            outputs=[triton.InferRequestedOutput("probability", binary_data=binary_out)],
            request_id="some id",
            parameters={"path": name, **LONG},
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )
        found = answer.as_numpy("probability")
        assert found is not None and found.dtype == np.float32
        np.testing.assert_array_equal(found, snapshot.predict(*rows(100)))
        told = answer.get_response()
        assert told["id"] == "some id" and told["model_version"] == "1"
        assert told["parameters"]["path"] == name and told["parameters"]["compute_ms"] > 0


def test_without_words_about_outputs_they_are_binary_for_triton_and_json_for_curl(
    server: Server, client: triton.InferenceServerClient
):
    answer = client.infer("tightrec", tensors(3, True), parameters=LONG).get_response()
    assert answer["outputs"][0]["parameters"] == {"binary_data_size": 12}
    reply = server.infer(request_of(3))
    assert reply.headers["Content-Type"] == "application/json"
    assert len(scores(reply)) == 3


def test_bags_ids_of_32_bits_and_no_rows_at_all(server: Server, snapshots: dict[str, Snapshot]):
    asked = request_of(3, path="best")
    dense, sparse = rows(3)
    asked["inputs"][1]["datatype"] = "INT32"
    asked["inputs"][3:] = [
        {"name": "f2", "shape": [4], "datatype": "INT64", "data": [5, 6, 7, 8]},
        {"name": "f2.offsets", "shape": [4], "datatype": "INT64", "data": [0, 1, 1, 4]},
    ]
    expected = snapshots["best"].predict(dense, {**sparse, "f2": [[5], [], [6, 7, 8]]})
    np.testing.assert_array_equal(scores(server.infer(asked)), expected)
    assert len(scores(server.infer(request_of(0)))) == 0


def test_the_most_accurate_path_serves_what_has_time(server: Server):
    assert json.loads(server.infer(request_of(3)).body)["parameters"]["path"] == "best"


def test_what_can_no_longer_meet_its_target_is_shed_by_name(
    server: Server, client: triton.InferenceServerClient
):
    reply = server.infer(request_of(400, target_ms=0.001))
    assert reply.status == 503 and reply.headers["X-Shed"] == "late"
    assert reply.headers["Retry-After"] == "1" and reply.error.startswith("shed: late")
    with pytest.raises(InferenceServerException, match="shed: late"):
        client.infer("tightrec", tensors(400, True), parameters={"target_ms": 0.001})


def changed(place: int, **fields: Any) -> dict[str, Any]:
    asked = request_of(2)
    asked["inputs"][place].update(fields)
    return asked


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        (changed(1, data=[1, 50]), 400, "feature 'f0': row 1 has id 50"),
        (changed(1, data=[-1, 5]), 400, "feature 'f0': row 0 has id -1"),
        (changed(1, shape=[3], data=[1, 2, 3]), 400, "'f1' has 2 rows where 'f0' has 3"),
        (changed(0, shape=[2, 2], data=[1, 2, 3, 4]), 400, "dense has shape [2, 2] where [2, 3] is due"),
        (changed(0, data=[0, 1e39, 0, 0, 0, 0]), 400, "dense column 'd1': row 0 is inf"),
        (changed(0, data=[0, 0, 0, 3e38, 3e38, 3e38]), 400, "row 1: the score is not a number"),
        (changed(3, shape=[2, 0], data=[]), 200, ""),
        (request_of(501), 400, "has 501 rows, and a request at most 500"),
        (request_of(2, path="slow"), 400, "there is no path 'slow', only best, quick"),
        ({**request_of(2), "inputs": []}, 400, "list `inputs`"),
    ],
)
def test_a_request_with_a_mistake_is_told_which(server: Server, asked: Any, status: int, said: str):
    reply = server.infer(asked)
    assert reply.status == status, reply
    assert said in reply.body.decode().replace('\\"', '"')


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "said"),
    [
        ("GET", "/v2/models/other", None, {}, 404, "no model 'other', only 'tightrec'"),
        ("GET", "/v2/models/tightrec/versions/9", None, {}, 404, "no version '9' now, only '1'"),
        ("POST", "/v2/models/other/infer", b"{}", {}, 404, "no model 'other'"),
        ("POST", "/v2/models/tightrec/versions/9/infer", b"{}", {}, 404, "no version '9'"),
        ("GET", "/nowhere", None, {}, 404, "nothing at /nowhere"),
        ("GET", INFER, None, {}, 405, "takes POST"),
        ("DELETE", "/metrics", None, {}, 405, "takes GET,HEAD"),
        ("POST", INFER, b"{}", {"Content-Type": "text/html"}, 415, "content type"),
        ("POST", INFER, b"{}", {"Content-Encoding": "br"}, 415, "content encoding"),
        ("POST", INFER, b"{}", {"Content-Encoding": "gzip"}, 400, "is its encoding right"),
        ("POST", INFER, gzip.compress(b"{}")[:-9], {"Content-Encoding": "gzip"}, 400, ""),
        ("POST", INFER, gzip.compress(b"{"), {"Content-Encoding": "gzip"}, 400, "valid JSON"),
        ("POST", INFER, b"{}", {"Inference-Header-Content-Length": "x"}, 400, "number of bytes"),
        ("POST", INFER, b"{}", {"Inference-Header-Content-Length": "3"}, 400, "the body has 2 bytes"),
        ("POST", INFER, b" " * 400_000, {}, 413, "larger than"),
        ("POST", INFER, gzip.compress(bytes(10**8)), {"Content-Encoding": "gzip"}, 413, "decompressed"),
        ("POST", INFER, zlib.compress(bytes(10**8)), {"Content-Encoding": "deflate"}, 413, "decompressed"),
        ("POST", "/v2/repository/models/tightrec/load", b"{}", {}, 404, "nothing at"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    server: Server, method: str, path: str, body: bytes, headers: dict[str, str], status: int, said: str
):
    reply = server.ask(method, path, body, headers)
    assert reply.status == status, reply
    assert reply.headers["Content-Type"].startswith("application/json")
    assert said in reply.error


def test_metrics_count_what_happened(server: Server):
    def value(line: str) -> float:
        text = server.ask("GET", "/metrics").body.decode()
        found = [one for one in text.splitlines() if one.startswith(line + " ")]
        return float(found[0].split()[-1]) if found else 0.0

    names = {
        "rows": 'tightrec_rows_total{path="quick"}',
        "queries": 'tightrec_queries_total{path="quick"}',
        "latency": 'tightrec_latency_seconds_count{path="quick"}',
        "late": 'tightrec_shed_queries_total{reason="late"}',
        "status": 'tightrec_requests_total{endpoint="/v2/models/{model}/infer",status="400"}',
    }
    before = {key: value(line) for key, line in names.items()}
    assert server.infer(request_of(7, path="quick")).status == 200
    assert server.infer(request_of(400, target_ms=0.001)).status == 503
    assert server.infer([]).status == 400
    after = {key: value(line) - before[key] for key, line in names.items()}
    assert after == {"rows": 7, "queries": 1, "latency": 1, "late": 1, "status": 1}
    assert value('tightrec_snapshot_step{path="best"}') == 1 and value("tightrec_ready") == 1
    assert value('tightrec_slots{device="cpu"}') == 1 and value("tightrec_workers") == 1


def test_the_status_that_the_page_shows(server: Server):
    server.infer(request_of(5))
    status = server.get("/api/status")
    assert status["ready"] and status["version"] == "1" and status["policy"] == "multi"
    assert [path["name"] for path in status["paths"]] == ["quick", "best"]
    assert set(status["windows"]) == {"10", "60"}


def test_the_server_is_for_this_machine_alone_by_default(server: Server):
    assert "http://127.0.0.1:" in server.wait_for(" at http://")
