"""The command ``load``: sends a server queries in an open loop and says how it answered."""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any, Self

import aiohttp
import numpy as np

from tightrec.formats.command import DONE, FAILED, INTERRUPTED
from tightrec.serving.load.arrivals import LoadConfig, arrivals
from tightrec.serving.load.config import LoadClientConfig
from tightrec.serving.load.open_loop import Driven, Reply, drive
from tightrec.serving.load.requests import InferRequests, parameters_of, read_answer
from tightrec.serving.load.rows import requests_of
from tightrec.serving.load.summary import report_of, table
from tightrec.serving.loops import new_event_loop
from tightrec.serving.open_inference import HEADER_LENGTH, SHED
from tightrec.serving.output_files import require_writable
from tightrec.serving.paths import read_paths
from tightrec.serving.whole_files import write_whole

Queries = list[tuple[float, int]]

METADATA_S = 10.0
"""Most that the first answer may take, in seconds."""

_STARTS = 2


class HttpAsk:
    """Asks a server over HTTP; an asynchronous context manager, callable as :data:`open_loop.Ask`.

    Args:
        config: where the server is.
        requests: what to ask.
        starts: row at which query number i starts.
    """

    def __init__(self, config: LoadClientConfig, requests: InferRequests, starts: list[int]) -> None:
        self._requests, self._starts = requests, starts
        self._url = f"{config.url.rstrip('/')}/v2/models/{config.model}/infer"
        self._parameters = parameters_of(config.target_ms, config.path)
        self._timeout_s = config.timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._connections = config.connections

    async def __aenter__(self) -> Self:
        self._session = session(self._connections)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def __call__(self, number: int, rows: int, arrived: float) -> Reply:
        """Ask query ``number`` of ``rows`` rows."""
        assert self._session is not None
        body, length = self._requests.body(self._starts[number], rows, self._parameters)
        headers = {HEADER_LENGTH: str(length), "Content-Type": "application/octet-stream"}
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._session.post(self._url, data=body, headers=headers) as response,
            ):
                content = await response.read()
        except TimeoutError:
            return Reply(failure=f"no answer within {self._timeout_s:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return Reply(failure=f"{type(error).__name__}: {str(error) or 'no more is known'}")
        return reply_of(response.status, response.headers, content, rows)


def session(connections: int) -> aiohttp.ClientSession:
    """A client without limits of its own but for ``connections``."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections),
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def reply_of(status: int, headers: Mapping[str, str], body: bytes, rows: int) -> Reply:
    """What an HTTP answer to a query of ``rows`` rows means."""
    if status == 200:
        try:
            answer = read_answer(headers, body)
        except ValueError as error:
            return Reply(failure=str(error))
        if answer.rows != rows:
            return Reply(failure="an answer has another number of scores than the query has rows")
        return Reply(path=answer.path)
    if status == 503 and SHED in headers:
        return Reply(shed=headers[SHED])
    return Reply(failure=f"status {status}: {_told(body)}")


def _told(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:100].decode("utf-8", "replace").strip() or "nothing said"


def starts_of(config: LoadConfig, queries: int, rows: int) -> list[int]:
    """Row, of ``rows``, at which each query starts."""
    return np.random.default_rng([config.seed, _STARTS]).integers(0, rows, queries).tolist()


async def offer(
    config: LoadClientConfig, requests: InferRequests, queries: Queries, stop: asyncio.Event | None = None
) -> Driven:
    """Send ``queries`` to the server of ``config`` and wait for their answers."""
    starts = starts_of(config, len(queries), requests.rows)
    async with HttpAsk(config, requests, starts) as ask:
        return await drive(queries, config.target_ms / 1e3, ask, stop=stop)


async def metadata(config: LoadClientConfig) -> dict[str, Any]:
    """What the server says of the model.

    Raises:
        ValueError: it cannot be reached, has no such model, or does not speak this protocol.
    """
    url = f"{config.url.rstrip('/')}/v2/models/{config.model}"
    status, body = await _get(config, url)
    if status != 200:
        raise ValueError(
            f"model={config.model}: the server at {config.url} answers {status}, {_told(body).rstrip('.')}."
        )
    try:
        found = json.loads(body)
        found["inputs"] = [{"shape": [], **one, "name": str(one["name"])} for one in found["inputs"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{url} does not answer as the Open Inference Protocol says.") from None
    return found


async def require_path(config: LoadClientConfig) -> None:
    """Refuse a path that the server does not serve; one that does not tell its paths is not asked further.

    Raises:
        ValueError: names the paths that there are.
    """
    if config.path is None:
        return
    status, body = await _get(config, f"{config.url.rstrip('/')}/api/status")
    try:
        names = [str(path["name"]) for path in json.loads(body)["paths"]] if status == 200 else []
    except (ValueError, KeyError, TypeError):
        return
    if names and config.path not in names:
        raise ValueError(
            f"path={config.path}: the server at {config.url} has no such path, only {', '.join(names)}."
        )


async def _get(config: LoadClientConfig, url: str) -> tuple[int, bytes]:
    """Status and body of the answer to a GET."""
    timeout_s = min(config.timeout_s, METADATA_S)
    try:
        async with session(1) as client, asyncio.timeout(timeout_s), client.get(url) as response:
            return response.status, await response.read()
    except TimeoutError:
        why = f"no answer within {timeout_s:g} s"
    except aiohttp.ClientConnectorError as error:
        # Its own text speaks of ssl.
        number = error.os_error.errno
        why = os.strerror(number) if number and number > 0 else str(error.os_error.strerror or error.os_error)
        why = why[:1].lower() + why[1:]
    except (aiohttp.ClientError, OSError) as error:
        why = str(error) or "no answer"
    raise ValueError(
        f"the server at {config.url} cannot be reached ({why}). Start one with "
        "`python -m tightrec.serving serve`, or give its url."
    )


def load(config: LoadClientConfig, say: Any) -> int:
    """Carry out the command; returns its exit status: 1 if a query failed, 130 if it was interrupted.

    Raises:
        ValueError: a mistake in the settings, or a server that cannot be reached.
    """
    paths = read_paths(config.paths) if config.paths is not None else None
    if config.out is not None:
        require_writable("out", config.out)
    accuracies = {path.name: path.accuracy for path in paths.paths} if paths else {}
    told = asyncio.run(metadata(config))
    asyncio.run(require_path(config))
    requests = requests_of(config, told)
    longer = dataclasses.replace(config, duration_s=config.warmup_s + config.duration_s)
    queries = arrivals(longer)
    say(
        f"{len(queries):,} queries over {longer.duration_s:g} s to {config.url}, {config.pattern}, "
        f"target {config.target_ms:g} ms, rows of {config.data or 'synthetic ids'}"
    )
    driven = _run(_interruptible(config, requests, queries))
    report = report_of(driven, config, accuracies)
    for line in table(report):
        say(line)
    if config.out is not None:
        write_whole(config.out, json.dumps(report, indent=1) + "\n")
        say(f"written to {config.out}")
    if driven.interrupted:
        return INTERRUPTED
    return FAILED if report["summary"]["failed"] else DONE


async def _interruptible(config: LoadClientConfig, requests: InferRequests, queries: Queries) -> Driven:
    """Ctrl-C and SIGTERM end sending, a second one ends at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    me = asyncio.current_task()
    assert me is not None

    def asked() -> None:
        me.cancel() if stop.is_set() else stop.set()

    with _handled(loop, asked):
        return await offer(config, requests, queries, stop)


@contextlib.contextmanager
def _handled(loop: asyncio.AbstractEventLoop, asked: Any) -> Iterator[None]:
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _run(work: Any) -> Driven:
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(work)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
