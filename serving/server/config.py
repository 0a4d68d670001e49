"""Settings of the server."""

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from tightrec.serving.open_inference import MOST_TARGET_MS
from tightrec.serving.paths import Quality


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """``serve``: what is served, where, and within which limits."""

    paths: Path
    """File of paths, as ``explore`` writes it."""

    host: str = "127.0.0.1"
    """Address to listen on; others than this machine can reach 0.0.0.0."""

    port: int = 8000
    """To listen on; 0: one that is free, which is printed."""

    model: str = "tightrec"
    """Name of the model in requests."""

    policy: str = "multi"
    """How paths are chosen: multi, greedy, fastest, random or fixed:NAME."""

    target_ms: float = 50.0
    """Latency target of requests that name none, in milliseconds."""

    rank: Quality = "accuracy"
    """By what paths are ranked."""

    batch_rows: int = 4096
    """Most rows of queries that are merged."""

    queue_rows: int = 65_536
    """Most rows that wait; what comes then is shed as ``full``."""

    headroom: float = 0.9
    """Share of the compute that policy multi spends."""

    batching: bool = True
    """Merge queries of one path."""

    shed: bool = True
    """Refuse what can no longer meet its target, instead of serving it late."""

    seed: int = 0
    """Of policy random."""

    cores: int | None = None
    """Slots of the device cpu; null: those in the file of paths, at most those of this machine."""

    out_of_range: Literal["refuse", "overflow"] = "refuse"
    """What becomes of a request with an id outside its table: it is refused, or the id gets the table's
    overflow row, whose vector is zero."""

    max_rows: int = 4096
    """Most rows of a request."""

    max_body_bytes: int | None = None
    """Largest body of a request, decompressed; null: what ``max_rows`` rows need as JSON, with 16 ids in a
    bag."""

    max_held_mb: float = 256.0
    """Bodies of all requests that are being received or answered, in 10^6 bytes; what comes then is shed as
    ``full``."""

    max_connections: int = 1024
    """Most open connections; what comes then is answered 503 and closed."""

    head_timeout_s: float = 20.0
    """A connection that sends no complete request head for so long is closed."""

    body_timeout_s: float = 20.0
    """A request whose body is not complete by then is answered 408 and closed."""

    write_timeout_s: float = 20.0
    """A connection whose reader takes nothing for so long is closed."""

    batch_timeout_s: float = 60.0
    """A worker that takes longer over a batch is replaced."""

    start_timeout_s: float = 600.0
    """For a worker to load its snapshots."""

    drain_s: float = 30.0
    """After SIGTERM: for requests in flight to be answered."""

    follow: bool = True
    """Serve new snapshots when links move on, such as a watcher's ``current``."""

    follow_every_s: float = 1.0
    """How often links are looked at."""

    def __post_init__(self) -> None:
        for name in ("batch_rows", "queue_rows", "max_rows", "max_connections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("cores", "max_body_bytes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1, or null.")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type not in (float, "float") or field.name == "headroom":
                continue
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{field.name}={value} must be a finite number above 0.")
        if self.target_ms > MOST_TARGET_MS:
            raise ValueError(f"target_ms={self.target_ms} must be at most {MOST_TARGET_MS:.0f}.")
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"port={self.port} must lie between 0 and 65535.")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.model):
            raise ValueError(f"model={self.model!r} must consist of letters, digits, '.', '_' and '-'.")
        if self.max_rows > self.queue_rows:
            raise ValueError(
                f"max_rows={self.max_rows} must not be above queue_rows={self.queue_rows}: such a request "
                "would never fit into the queue."
            )
