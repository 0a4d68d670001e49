"""A server with as much of the Open Inference Protocol as a load generator needs; it scores nothing."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from aiohttp import web

HEADER_LENGTH = "Inference-Header-Content-Length"

INPUTS = [
    {"name": "dense", "datatype": "FP32", "shape": [-1, 2]},
    {"name": "user", "datatype": "INT64", "shape": [-1], "parameters": {"cardinality": 50}},
    {
        "name": "tags",
        "datatype": "INT64",
        "shape": [-1],
        "parameters": {"cardinality": 9, "multi_hot": True},
    },
    {"name": "tags.offsets", "datatype": "INT64", "shape": [-1]},
]


class Query:
    """An infer request as it came: its values by name, its parameters, and when it came."""

    def __init__(self, header: dict[str, Any], data: bytes) -> None:
        self.parameters = header["parameters"]
        self.values: dict[str, np.ndarray] = {}
        place = 0
        for one in header["inputs"]:
            size = one["parameters"]["binary_data_size"]
            kind = {"FP32": "<f4", "INT64": "<i8"}[one["datatype"]]
            values = np.frombuffer(data[place : place + size], kind)
            self.values[one["name"]] = values.reshape(one["shape"])
            place += size
        assert place == len(data), "bytes that no input owns"
        self.rows = len(self.values["dense"]) if "dense" in self.values else len(self.values["user"])


Handle = Callable[[Query, int], Awaitable[web.Response]]
"""Answers request number i (from 0)."""


def scored(query: Query, path: str = "a", *, rows: int | None = None, value: float = 0.5) -> web.Response:
    """Scores for every row, or for ``rows``, from ``path``."""
    count = query.rows if rows is None else rows
    output = {"name": "probability", "datatype": "FP32", "shape": [count]}
    output["parameters"] = {"binary_data_size": 4 * count}
    header = json.dumps({"outputs": [output], "parameters": {"path": path}}).encode()
    body = header + np.full(count, value, "<f4").tobytes()
    return web.Response(body=body, headers={HEADER_LENGTH: str(len(header))})


def shed(why: str) -> web.Response:
    """A refusal as the server words it."""
    return web.json_response({"error": "shed"}, status=503, headers={"X-Shed": why})


class FakeServer:
    """What a test sees of the server."""

    def __init__(self) -> None:
        self.url = ""
        self.queries: list[Query] = []


@contextmanager
def serving(
    handle: Handle, inputs: list[dict[str, Any]] | None = None, paths: Sequence[str] | None = None
) -> Iterator[FakeServer]:
    """A server in a thread of its own, on a port of its own; it tells the names of its ``paths``, if any."""
    fake = FakeServer()
    loop = asyncio.new_event_loop()

    async def infer(request: web.Request) -> web.Response:
        body = await request.read()
        length = int(request.headers[HEADER_LENGTH])
        query = Query(json.loads(body[:length]), body[length:])
        fake.queries.append(query)
        return await handle(query, len(fake.queries) - 1)

    async def describe(request: web.Request) -> web.Response:
        model = request.match_info["model"]
        if model != "tightrec":
            told = f"there is no model {model!r}, only 'tightrec'."
            return web.json_response({"error": told}, status=404)
        return web.json_response({"name": model, "inputs": INPUTS if inputs is None else inputs})

    async def status(request: web.Request) -> web.Response:
        return web.json_response({"paths": [{"name": name} for name in paths or ()]})

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v2/models/tightrec/infer", infer)
        app.router.add_get("/v2/models/{model}", describe)
        if paths is not None:
            app.router.add_get("/api/status", status)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def end(runner: web.AppRunner) -> None:
        await runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    runner = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        asyncio.run_coroutine_threadsafe(end(runner), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
