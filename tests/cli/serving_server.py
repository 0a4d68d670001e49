"""Starts ``python -m tightrec.serving serve`` for tests, and speaks to it in plain HTTP."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

import numpy as np
from serving_made import CARDINALITIES

PATIENCE_S = 60.0


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def error(self) -> str:
        return str(json.loads(self.body)["error"])


class Server:
    """A server process; use :func:`serving`."""

    def __init__(self, paths: Path, *words: str) -> None:
        command = [sys.executable, "-m", "tightrec.serving", "serve", f"paths={paths}", "port=0", *words]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line.rstrip() for line in iter(self.process.stdout.readline, ""))

    def wait_for(self, words: str) -> str:
        """The first line with ``words``."""
        wait_until(lambda: any(words in line for line in list(self.lines)) or self.process.poll() is not None)
        found = [line for line in self.lines if words in line]
        assert found, f"the server ended: {self.lines}"
        return found[0]

    @property
    def port(self) -> int:
        return int(self.wait_for(" at http://").rpartition(":")[2])

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = PATIENCE_S,
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return Reply(response.status, dict(response.headers), response.read())

    def infer(self, values: Any, **headers: str) -> Reply:
        return self.ask("POST", "/v2/models/tightrec/infer", json.dumps(values).encode(), headers)

    def get(self, path: str) -> Any:
        reply = self.ask("GET", path)
        assert reply.status == 200, reply
        return json.loads(reply.body)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def workers(self) -> list[int]:
        """Process ids of its workers."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end; the exit status."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        """Wait for its end; the exit status."""
        status = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status


@contextlib.contextmanager
def serving(paths: Path, *words: str) -> Iterator[Server]:
    """A server that is ready; killed at the end if it still runs."""
    server = Server(paths, *words)
    try:
        server.wait_for(" at http://")
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def wait_until(true: Callable[[], bool]) -> None:
    """Until ``true`` or for a minute, whichever comes first."""
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, "it did not happen within a minute"
        time.sleep(0.02)


def rows(count: int, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Dense values and ids of the made snapshots."""
    draw = np.random.default_rng(seed)
    sparse = {f"f{i}": draw.integers(0, size, count) for i, size in enumerate(CARDINALITIES)}
    return draw.standard_normal((count, 3), np.float32), sparse


def request_of(count: int, seed: int = 0, **parameters: Any) -> dict[str, Any]:
    """The JSON of an infer request, by default with a target that is always met."""
    dense, sparse = rows(count, seed)
    inputs = [{"name": "dense", "shape": [count, 3], "datatype": "FP32", "data": dense.ravel().tolist()}]
    inputs += [
        {"name": name, "shape": [count], "datatype": "INT64", "data": ids.tolist()}
        for name, ids in sparse.items()
    ]
    return {"inputs": inputs, "parameters": {"target_ms": 60_000, **parameters}}


def scores(reply: Reply) -> np.ndarray:
    assert reply.status == 200, reply
    (output,) = json.loads(reply.body)["outputs"]
    return np.array(output["data"], np.float32)
