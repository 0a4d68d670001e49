"""The infer endpoint: reads a body within limits, has it scored, writes the answer."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from tightrec.serving.server.config import ServeConfig
from tightrec.serving.server.dispatch import Dispatcher, Refused
from tightrec.serving.server.http_errors import error
from tightrec.serving.server.protocol import HEADER_LENGTH, InferRequest, Protocol
from tightrec.serving.server.tensors import RequestError
from tightrec.snapshot.inputs import Inputs

CONTENT_TYPES = ("application/json", "application/octet-stream", "application/x-www-form-urlencoded")
"""The last one is what curl says of any body; aiohttp says the second where there is no header."""

ENCODINGS = ("", "identity", "gzip", "deflate")

THREAD_BYTES = 100_000
"""JSON of more bytes is read in a thread: the event loop goes on meanwhile, at least between its tensors."""

_IDS_A_BAG = 16
_JSON_ID_BYTES, _JSON_DENSE_BYTES, _JSON_REST_BYTES = 22, 24, 1 << 16


def largest_body(config: ServeConfig, protocol: Protocol) -> int:
    """Bytes of the largest body that is read."""
    if config.max_body_bytes is not None:
        return config.max_body_bytes
    ids = sum(_IDS_A_BAG if feature.multi_hot else 1 for feature in protocol.sparse)
    row = _JSON_ID_BYTES * ids + _JSON_DENSE_BYTES * len(protocol.dense)
    return _JSON_REST_BYTES + config.max_rows * row


class InferEndpoint:
    """Scores requests.

    Args:
        config: limits and the default target.
        protocol: of the model.
        inputs: checks ids and dense values.
        dispatcher: scores.
        path_names: that a request may ask for.
    """

    def __init__(
        self,
        config: ServeConfig,
        protocol: Protocol,
        inputs: Inputs,
        dispatcher: Dispatcher,
        path_names: frozenset[str],
    ) -> None:
        self._settings, self._protocol, self._inputs = config, protocol, inputs
        self._dispatcher, self._path_names = dispatcher, path_names
        self.largest_body = largest_body(config, protocol)
        self._most_held = max(int(config.max_held_mb * 1e6), self.largest_body)
        self._held = 0
        self._reading = asyncio.Lock()
        self.any_id = config.out_of_range == "overflow"
        self.active = 0
        self.draining = False

    async def infer(self, request: web.Request) -> web.Response:
        """Handles a POST whose model and version are known."""
        arrived = time.monotonic()
        if self.draining:
            raise Refused("draining")
        if request.content_type not in CONTENT_TYPES:
            return error(415, f"the content type must be one of {', '.join(CONTENT_TYPES)}.")
        encoding = request.headers.get("Content-Encoding", "").strip().lower()
        if encoding not in ENCODINGS:
            return error(415, "the content encoding must be gzip or deflate, or none.")
        length = request.content_length
        if length is None and request.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return error(411, "say the body's length: Content-Length is missing.")
        if length is not None and length > self.largest_body:
            return self._too_large()
        # What is compressed or chunked may become as large as is allowed.
        needed = length if length is not None and encoding in ("", "identity") else self.largest_body
        with self._holding(needed):
            body = await self._body(request)
            if isinstance(body, web.Response):
                return body
            return await self._answer(body, _header_length(request), arrived)

    async def _answer(self, body: bytes, header_length: int | None, arrived: float) -> web.Response:
        asked = await self._read(body, header_length)
        if asked.path is not None and asked.path not in self._path_names:
            raise RequestError(
                f"there is no path {asked.path[:100]!r}, only {', '.join(sorted(self._path_names))}."
            )
        try:
            rows = self._inputs.convert(asked.dense, asked.sparse)
        except ValueError as mistake:
            raise RequestError(str(mistake)) from None
        if not len(rows):
            scores, parameters, version = np.empty(0, np.float32), {}, None
        else:
            target_ms = self._settings.target_ms if asked.target_ms is None else asked.target_ms
            answer = await self._dispatcher.score(rows, target_ms / 1e3, asked.path, arrived)
            scores, version = answer.scores, answer.version
            finite = np.isfinite(scores)
            if not finite.all():
                row = int(finite.argmin())
                if asked.dense is None:
                    return error(500, f"row {row}: path {answer.path} gives a score that is not a number.")
                raise RequestError(
                    f"row {row}: the score is not a number, since dense values are too large for the model. "
                    "Scale them as the training data was scaled."
                )
            parameters = {
                "path": answer.path,
                "step": answer.step,
                "queue_ms": round(answer.queue_ms, 3),
                "compute_ms": round(answer.compute_ms, 3),
            }
        found, headers = self._protocol.write(asked, scores, parameters, version)
        return web.Response(body=found, headers=headers)

    async def _read(self, body: bytes, header_length: int | None) -> InferRequest:
        size = len(body) if header_length is None else header_length
        if size <= THREAD_BYTES:
            return self._protocol.read(body, header_length)
        # One after the other: JSON takes many times its size while it is read.
        async with self._reading:
            return await asyncio.to_thread(self._protocol.read, body, header_length)

    async def _body(self, request: web.Request) -> bytes | web.Response:
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                return await request.read()
        except TimeoutError:
            late = error(408, f"the body was not complete after {self._settings.body_timeout_s:g} s.")
            late.force_close()
            return late
        except web.HTTPRequestEntityTooLarge:
            return self._too_large()
        except (web.RequestPayloadError, HttpProcessingError):
            raise RequestError("the body is not what its headers say: is its encoding right?") from None

    def _too_large(self) -> web.Response:
        refusal = error(413, f"the body is larger than {self.largest_body} bytes, decompressed. Split it.")
        refusal.force_close()
        return refusal

    @contextmanager
    def _holding(self, needed: int) -> Iterator[None]:
        """Count a request and the bytes that it may take."""
        if self._held + needed > self._most_held:
            raise Refused("full")
        self._held += needed
        self.active += 1
        try:
            yield
        finally:
            self._held -= needed
            self.active -= 1


def _header_length(request: web.Request) -> int | None:
    text = request.headers.get(HEADER_LENGTH)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise RequestError(f"the header {HEADER_LENGTH} must be a number of bytes.")
    return int(text)
