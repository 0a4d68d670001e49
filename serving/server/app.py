"""The server's endpoints."""

import time
from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import web

from tightrec.serving.paths import PathSet
from tightrec.serving.server import openapi, page
from tightrec.serving.server.dispatch import Dispatcher
from tightrec.serving.server.http_errors import error, make_middleware
from tightrec.serving.server.http_infer import InferEndpoint
from tightrec.serving.server.metrics import Gauges, Metrics
from tightrec.serving.server.protocol import Protocol

WINDOWS_S = (10, 60)
"""What the page shows percentiles of."""

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Service:
    """Everything that endpoints look at.

    Args:
        paths: that are served.
        protocol: of the model.
        infer: the infer endpoint.
        dispatcher: scores.
        metrics: counts.
    """

    def __init__(
        self,
        paths: PathSet,
        protocol: Protocol,
        infer: InferEndpoint,
        dispatcher: Dispatcher,
        metrics: Metrics,
    ) -> None:
        self.paths, self.protocol, self.infer = paths, protocol, infer
        self.dispatcher, self.metrics = dispatcher, metrics
        self.restarts_before = 0
        self.swap_note: str | None = None
        self._began = time.monotonic()
        metrics.watch(self._gauges)

    @property
    def ready(self) -> bool:
        """Whether queries are taken."""
        return not self.infer.draining and self.dispatcher.current.pool.ready

    @property
    def restarts(self) -> int:
        """Workers replaced, over all generations."""
        return self.restarts_before + self.dispatcher.current.pool.restarts

    def status(self) -> dict[str, Any]:
        """What the page shows."""
        scheduler, pool = self.dispatcher.scheduler, self.dispatcher.current.pool
        windows = {str(seconds): self.metrics.live.window(seconds) for seconds in WINDOWS_S}
        return {
            "model": self.protocol.model,
            "version": self.protocol.version,
            "policy": scheduler.config.policy,
            "ready": self.ready,
            "draining": self.infer.draining,
            "uptime_s": time.monotonic() - self._began,
            "queue": {"queries": scheduler.waiting_queries, "rows": scheduler.waiting_rows},
            "workers": len(pool.pids()),
            "restarts": self.restarts,
            "swap": self.swap_note,
            "windows": windows,
            "paths": [
                {
                    "name": path.name,
                    "representation": path.representation,
                    "precision": path.precision,
                    "device": path.device,
                    "threads": path.threads,
                    "cache": path.cache.levels,
                    "accuracy": path.accuracy,
                    "step": pool.steps.get(path.name),
                    "running": pool.can_run(path),
                    "correction": scheduler.correction(path.name),
                }
                for path in self.paths.paths
            ],
        }

    def _gauges(self) -> Mapping[str, Gauges]:
        scheduler, pool = self.dispatcher.scheduler, self.dispatcher.current.pool
        slots: dict[tuple[str, ...], float] = {(d.name,): float(d.slots) for d in self.paths.devices}
        busy: dict[tuple[str, ...], float] = {(name,): float(n) for name, n in pool.busy().items()}
        return {
            "queue_queries": ("Queries that wait.", (), {(): scheduler.waiting_queries}),
            "queue_rows": ("Rows that wait.", (), {(): scheduler.waiting_rows}),
            "slots": ("Slots of a device.", ("device",), slots),
            "slots_busy": ("Slots of a device that compute.", ("device",), busy),
            "workers": ("Worker processes that are alive.", (), {(): len(pool.pids())}),
            "worker_restarts": ("Workers replaced.", (), {(): self.restarts}),
            "ready": ("Whether queries are taken.", (), {(): float(self.ready)}),
            "snapshot_step": (
                "Training step of the snapshot of a path.",
                ("path",),
                {(name,): float(step) for name, step in pool.steps.items()},
            ),
            "path_correction": (
                "Observed over profiled duration of a path, running mean.",
                ("path",),
                {(path.name,): scheduler.correction(path.name) for path in self.paths.paths},
            ),
        }


def make_app(service: Service) -> web.Application:
    """The application with all endpoints."""
    app = web.Application(
        middlewares=[make_middleware(service.metrics)], client_max_size=service.infer.largest_body
    )
    endpoints = _Endpoints(service)
    model = "/v2/models/{model}"
    app.router.add_get("/v2/health/live", endpoints.live)
    app.router.add_get("/v2/health/ready", endpoints.ready)
    app.router.add_get("/v2", endpoints.server)
    app.router.add_post("/v2/repository/index", endpoints.index)
    for base in (model, f"{model}/versions/{{version}}"):
        app.router.add_get(base, endpoints.metadata)
        app.router.add_get(f"{base}/ready", endpoints.model_ready)
        app.router.add_get(f"{base}/config", endpoints.config)
        app.router.add_get(f"{base}/stats", endpoints.statistics)
        app.router.add_post(f"{base}/infer", endpoints.infer)
    app.router.add_get("/metrics", endpoints.metrics)
    app.router.add_get("/api/status", endpoints.status)
    app.router.add_get("/openapi.json", endpoints.openapi)
    app.router.add_get("/", endpoints.page)
    return app


def _json(values: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(values), content_type="application/json")


class _Endpoints:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._page = page.html()

    def _unknown(self, request: web.Request) -> web.Response | None:
        """404 for another model or version."""
        protocol = self._service.protocol
        model, version = request.match_info["model"], request.match_info.get("version")
        if model != protocol.model:
            return error(404, f"there is no model {model[:100]!r}, only {protocol.model!r}.")
        if version is not None and version != protocol.version:
            return error(404, f"there is no version {version[:100]!r} now, only {protocol.version!r}.")
        return None

    async def live(self, request: web.Request) -> web.Response:
        return _json({"live": True})

    async def ready(self, request: web.Request) -> web.Response:
        ready = self._service.ready
        return _json({"ready": ready}, 200 if ready else 503)

    async def server(self, request: web.Request) -> web.Response:
        extensions = ["binary_tensor_data", "model_configuration", "model_repository(index)", "statistics"]
        return _json({"name": "tightrec", "version": openapi.VERSION, "extensions": extensions})

    async def index(self, request: web.Request) -> web.Response:
        protocol = self._service.protocol
        state = "READY" if self._service.ready else "UNAVAILABLE"
        return _json([{"name": protocol.model, "version": protocol.version, "state": state, "reason": ""}])

    async def metadata(self, request: web.Request) -> web.Response:
        return self._unknown(request) or _json(self._service.protocol.metadata())

    async def model_ready(self, request: web.Request) -> web.Response:
        return self._unknown(request) or await self.ready(request)

    async def config(self, request: web.Request) -> web.Response:
        return self._unknown(request) or _json(self._service.protocol.config())

    async def statistics(self, request: web.Request) -> web.Response:
        if (refusal := self._unknown(request)) is not None:
            return refusal
        protocol, total = self._service.protocol, self._service.metrics.total()
        stats = {"name": protocol.model, "version": protocol.version, **total}
        return _json({"model_stats": [stats]})

    async def infer(self, request: web.Request) -> web.Response:
        return self._unknown(request) or await self._service.infer.infer(request)

    async def metrics(self, request: web.Request) -> web.Response:
        headers = {"Content-Type": _METRICS_TYPE}
        return web.Response(body=self._service.metrics.text(), headers=headers)

    async def status(self, request: web.Request) -> web.Response:
        return _json(self._service.status())

    async def openapi(self, request: web.Request) -> web.Response:
        service = self._service
        names = sorted(path.name for path in service.paths.paths)
        return _json(openapi.document(service.protocol, names, service.infer.any_id))

    async def page(self, request: web.Request) -> web.Response:
        headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": page.POLICY}
        return web.Response(body=self._page, headers=headers)
