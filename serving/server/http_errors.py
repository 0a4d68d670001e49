"""Answers that are not scores: ``{"error": sentence}`` with a status, whatever went wrong."""

import logging
from collections.abc import Awaitable, Callable, Mapping

import orjson
from aiohttp import web

from tightrec.serving.open_inference import SHED
from tightrec.serving.server.dispatch import Refused
from tightrec.serving.server.metrics import Metrics
from tightrec.serving.server.tensors import RequestError
from tightrec.serving.workers.pool import WorkerFailed

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1

REASONS = {
    "late": "the query could not meet its latency target any more.",
    "full": "too much waits already.",
    "draining": "the server is being stopped.",
    "unavailable": "no worker of this path is running; it is being replaced.",
}
"""What each reason for shedding means."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def error(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """An answer that names what was wrong."""
    body = orjson.dumps({"error": sentence})
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


def shed(reason: str) -> web.Response:
    """503: the query was not scored; clients may ask again."""
    headers = {SHED: reason, "Retry-After": str(RETRY_AFTER_S)}
    return error(503, f"shed: {reason}: {REASONS.get(reason, 'the query was not scored.')}", headers)


def make_middleware(metrics: Metrics) -> Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]:
    """Turns whatever a handler raises into an answer, and counts it."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await _answered(request, handler, metrics)
        response.headers["Server"] = "tightrec"
        resource = request.match_info.route.resource
        metrics.request(resource.canonical if resource else "other", response.status)
        return response

    return middleware


async def _answered(request: web.Request, handler: Handler, metrics: Metrics) -> web.StreamResponse:
    try:
        return await handler(request)
    except RequestError as mistake:
        return error(400, str(mistake))
    except Refused as refused:
        metrics.shed(str(refused))
        return shed(str(refused))
    except WorkerFailed as failure:
        return error(500, str(failure))
    except web.HTTPRequestEntityTooLarge:
        raise
    except web.HTTPException as refusal:
        headers = {name: refusal.headers[name] for name in ("Allow",) if name in refusal.headers}
        return error(refusal.status, _sentence(request, refusal), headers)
    except Exception:
        logger.exception("%s %s", request.method, request.path)
        return error(500, "the server made a mistake; its log says which.")


def _sentence(request: web.Request, refusal: web.HTTPException) -> str:
    if refusal.status == 404:
        return f"there is nothing at {request.path[:200]}; /openapi.json lists what there is."
    if refusal.status == 405:
        return f"{request.path[:200]} takes {refusal.headers.get('Allow', 'other methods')}."
    return f"{refusal.reason}."
