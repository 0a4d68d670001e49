"""Settings of the load generator."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from tightrec.serving.load.arrivals import LoadConfig
from tightrec.serving.load.requests import Order


@dataclass(frozen=True, kw_only=True)
class LoadClientConfig(LoadConfig):
    """``load``: what to send to a server, and what to write."""

    url: str = "http://127.0.0.1:8000"
    """Of the server."""

    model: str = "tightrec"
    """Name of the model on the server."""

    path: str | None = None
    """Name of the path that must score every query; null: the server chooses."""

    data: Path | None = None
    """A prepared folder whose rows are sent; null: synthetic rows."""

    split: Literal["train", "valid", "test"] = "test"
    """Of the prepared folder."""

    snapshot: Path | None = None
    """A snapshot whose features and cardinalities synthetic rows have; null: what the server says."""

    order: Order = "consecutive"
    """Rows of a query: consecutive in the data, or random ones."""

    zipf: float = 1.05
    """Exponent of the ids' distribution in synthetic rows: 0 is uniform, larger is more skewed."""

    pool_rows: int = 100_000
    """Different rows that are kept in memory; queries start at random ones of them."""

    connections: int = 512
    """Most connections to the server; queries beyond it wait, and their latency counts the wait."""

    timeout_s: float = 30.0
    """How long to wait for an answer before the query has failed, in seconds."""

    warmup_s: float = 0.0
    """How long to send the same load before counting starts, in seconds."""

    paths: Path | None = None
    """File of the paths that are served: their accuracies, for correct rows a second."""

    out: Path | None = None
    """Where to write the summary as JSON; null: nowhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={self.url} is no address of a server, such as http://127.0.0.1:8000.")
        if self.data is not None and self.snapshot is not None:
            raise ValueError("data and snapshot cannot both say what the rows are. Give one of them.")
        if not (self.zipf >= 0 and math.isfinite(self.zipf)):
            raise ValueError(f"zipf={self.zipf} must be a finite number of at least 0.")
        if min(self.pool_rows, self.connections) < 1:
            raise ValueError("pool_rows and connections must be at least 1.")
        if not (self.timeout_s > 0 and math.isfinite(self.timeout_s)):
            raise ValueError(f"timeout_s={self.timeout_s} must be a finite number above 0.")
        if not (self.warmup_s >= 0 and math.isfinite(self.warmup_s)):
            raise ValueError(f"warmup_s={self.warmup_s} must be a finite number of at least 0.")
