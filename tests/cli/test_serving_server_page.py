"""The page in a real browser, and the OpenAPI document against a fuzzer."""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from serving_server import Server, request_of, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from serving_made import write_two_paths

    with serving(write_two_paths(tmp_path_factory.mktemp("served"))) as started:
        yield started
        assert started.stop() == 0, started.lines


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_shows_what_the_server_does(server: Server, tmp_path: Path):
    for _ in range(3):
        server.infer(request_of(100, path="quick"))
    server.infer(request_of(100, path="best"))
    done = threading.Event()

    def ask() -> None:
        while not done.wait(0.05):
            server.infer(request_of(100, path="quick"))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        dom = browser(f"http://127.0.0.1:{server.port}/", tmp_path)
    finally:
        done.set()
        asking.join()
    text = dom.split("<script>")[0]
    assert '<span id="state" class="good">ready</span>' in text
    assert "version 1 · policy multi · 1 worker · up" in text
    for name in ("queries", "rows", "p50", "p95", "p99"):
        shown = text.split(f'<b id="{name}">')[1].split("</b>")[0]
        assert float(shown.replace(",", "").split()[0]) > 0, f"{name}: {shown}"
    assert "<td>quick</td>" in text and "<td>best</td>" in text and "<td>0.8000</td>" in text


def browser(url: str, folder: Path) -> str:
    """The page's elements after it has polled."""
    assert CHROMIUM is not None
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
    command = [CHROMIUM, *words, "--virtual-time-budget=3000", "--dump-dom", url]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_page_loads_nothing_from_elsewhere(server: Server):
    reply = server.ask("GET", "/")
    assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
    assert b"http://" not in reply.body and b"https://" not in reply.body
    assert reply.body.count(b"\n") < 300


def test_the_document_describes_an_infer_request_that_is_served(server: Server):
    document = server.get("/openapi.json")
    schemas = document["components"]["schemas"]
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    whole = {**schemas["InferRequest"], "components": document["components"]}
    asked = request_of(3, path="quick")
    jsonschema_rs.validate(whole, asked)
    reply = server.infer(asked)
    jsonschema_rs.validate(
        {**schemas["InferResponse"], "components": document["components"]}, json.loads(reply.body)
    )
    asked["inputs"][1]["data"][0] = 50
    assert not jsonschema_rs.is_valid(whole, asked)


MODES = tuple(schemathesis.GenerationMode)


def test_no_request_of_a_fuzzer_gets_an_answer_beyond_the_document(server: Server):
    """Schemathesis: statuses, content types and bodies are as documented, never 500, and what breaks the
    schema is refused. What keeps to it may be refused too: a schema cannot say that shapes fit the data."""
    document = server.get("/openapi.json")
    found = list(schemathesis.openapi.from_dict(document).get_all_operations())
    assert len(found) == sum(map(len, document["paths"].values()))
    for operation in found:
        for mode in MODES if operation.ok().body else MODES[:1]:
            fuzz(operation.ok(), mode, f"http://127.0.0.1:{server.port}")


def fuzz(operation: schemathesis.APIOperation, mode: schemathesis.GenerationMode, url: str) -> None:
    # A request without a body is always the same one.
    examples = 40 if operation.body else 1
    check_all(operation.as_strategy(mode), examples, url)


def check_all(cases: st.SearchStrategy[schemathesis.Case], examples: int, url: str) -> None:
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=cases)
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(
            base_url=url, excluded_checks=[schemathesis.checks.positive_data_acceptance], timeout=30
        )

    ask()


SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 2, 49, 50, 2**31, 2**63 - 1, -(2**63), 2**64, 1e39, -0.5, 1e308])
    | st.sampled_from(["", "FP32", "INT32", "f0", "f1", "f2.offsets", "dense", "probability", "quick"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)
NUMBERS = st.sampled_from([0, 1, -1, 50, 110, 2**31, 2**63 - 1, 2**63, -(2**63), 1e39, -0.5])
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 9, 2**31, -1]), max_size=3)


@st.composite
def changed_requests(draw: st.DrawFn) -> Any:
    """A request that is served, with one to three changes: to a value, to a tensor's form, or anywhere."""
    asked = {**request_of(3, path="quick"), "outputs": [{"name": "probability"}], "id": "x"}
    if draw(st.booleans()):
        asked["inputs"].append(
            {"name": "f2.offsets", "shape": [4], "datatype": "INT64", "data": [0, 1, 1, 3]}
        )
    tensors = list(asked["inputs"])
    for _ in range(draw(st.integers(1, 3))):
        tensor = draw(st.sampled_from(tensors))
        kind = draw(st.sampled_from(["value", "rows", "field", "anywhere"]))
        if kind == "value" and isinstance(tensor.get("data"), list) and tensor["data"]:
            tensor["data"][draw(st.integers(0, len(tensor["data"]) - 1))] = draw(NUMBERS)
        elif kind == "rows":
            count = draw(st.integers(0, 5))
            tensor.update(shape=[count], data=[1] * count)
        elif kind == "field":
            tensor[draw(st.sampled_from(["shape", "data", "datatype", "parameters"]))] = draw(VALUES | SHAPES)
        else:
            change_anywhere(draw, asked)
    return asked


def change_anywhere(draw: st.DrawFn, values: Any) -> None:
    """Set, remove or double something at any depth."""
    key = draw(st.sampled_from(list(values) if isinstance(values, dict) else range(len(values))))
    if isinstance(values[key], dict | list) and values[key] and draw(st.integers(0, 3)):
        change_anywhere(draw, values[key])
    elif draw(st.booleans()) or not isinstance(values, list):
        values[key] = draw(VALUES)
    elif draw(st.booleans()):
        values.append(values[key])
    else:
        del values[key]


def test_no_change_to_a_served_request_gets_an_answer_beyond_the_document(server: Server):
    """What a fuzzer that starts from nothing never reaches: shapes that fit, and the checks behind them."""
    schema = schemathesis.openapi.from_dict(server.get("/openapi.json"))
    operation = schema["/v2/models/tightrec/infer"]["POST"]
    cases = changed_requests().map(lambda body: operation.Case(body=body, media_type="application/json"))
    check_all(cases, 250, f"http://127.0.0.1:{server.port}")


def test_the_worker_has_outlived_the_fuzzer(server: Server):
    assert server.get("/api/status")["restarts"] == 0
