"""Two ways to offer the serving benchmarks' load: over HTTP to servers, or to their parts in this process.

``direct`` runs the server's own dispatcher, scheduler and worker processes, but neither HTTP nor its parsing:
it shows what paths and policies do where client and server share two cores.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from serving_runs import Server

from tightrec.formats.columns import Columns
from tightrec.formats.schema import load_schema
from tightrec.serving.load.arrivals import LoadConfig, arrivals
from tightrec.serving.load.client import metadata, offer, starts_of
from tightrec.serving.load.config import LoadClientConfig
from tightrec.serving.load.open_loop import Driven, Reply, drive
from tightrec.serving.load.requests import InferRequests
from tightrec.serving.load.rows import requests_of
from tightrec.serving.paths import PathSet, ServingPath, write_paths
from tightrec.serving.scheduling.scheduler import Scheduler, SchedulerConfig
from tightrec.serving.server.dispatch import Dispatcher, Refused
from tightrec.serving.server.metrics import Metrics
from tightrec.serving.workers.pool import WorkerFailed, WorkerPool
from tightrec.snapshot.inputs import Batch as Rows
from tightrec.snapshot.rows import feature_major, read_rows

Way = Literal["http", "direct"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How queries are served."""

    name: str
    """In tables."""

    policy: str
    """As the scheduler takes it."""

    paths: tuple[ServingPath, ...]
    """Among which it chooses."""

    batching: bool = True
    """Whether queries are merged."""

    shed: bool = True
    """Whether late ones are refused."""

    @property
    def scheduler(self) -> SchedulerConfig:
        """Settings of the scheduler."""
        return SchedulerConfig(policy=self.policy, batching=self.batching, shed=self.shed)

    def path_set(self, paths: PathSet) -> PathSet:
        """``paths`` with those of this setting alone."""
        devices = tuple(d for d in paths.devices if any(path.device == d.name for path in self.paths))
        return dataclasses.replace(paths, devices=devices, paths=self.paths, dropped=())


class HttpTransport:
    """A server process a setting, all alive at once so that loads can take turns; a context manager.

    Args:
        paths: devices, and notes.
        settings: how each server serves.
        client: what every load sends; url, rate and target are replaced.
    """

    def __init__(self, paths: PathSet, settings: Sequence[Setting], client: LoadClientConfig) -> None:
        self._paths, self._settings, self._client = paths, settings, client
        self._stack = contextlib.ExitStack()
        self.servers: dict[str, Server] = {}
        self._requests: InferRequests | None = None

    async def __aenter__(self) -> Self:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tightrec-bench-")))
        try:
            for number, setting in enumerate(self._settings):
                file = folder / f"paths-{number}.json"
                write_paths(setting.path_set(self._paths), file)
                words = [f"paths={file}", f"policy={setting.policy}", "follow=false"]
                words += [f"batching={setting.batching}".lower(), f"shed={setting.shed}".lower()]
                self.servers[setting.name] = self._stack.enter_context(Server(*words))
        except BaseException:
            self._stack.close()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stack.close()

    async def offer(self, setting: Setting, load: LoadConfig) -> Driven:
        """Offer ``load`` to the server of ``setting``."""
        values = dataclasses.asdict(self._client) | dataclasses.asdict(load)
        config = LoadClientConfig(**values | {"url": self.servers[setting.name].url})
        if self._requests is None:
            self._requests = requests_of(config, await metadata(config))
        return await offer(config, self._requests, arrivals(load))


class DirectTransport:
    """One pool of workers for all settings, a new scheduler for every load; a context manager.

    Args:
        paths: devices, and notes.
        settings: how each load may be served.
        client: where the rows come from (``data`` must be given).
    """

    def __init__(self, paths: PathSet, settings: Sequence[Setting], client: LoadClientConfig) -> None:
        if client.data is None:
            raise ValueError("transport=direct needs rows: give data=FOLDER.")
        self._paths, self._client = paths, client
        known = {path.name: path for setting in settings for path in setting.paths}
        self._all = Setting(name="all", policy="multi", paths=tuple(known.values()))
        self._pool = WorkerPool()
        columns = read_rows(client.data, client.split, client.pool_rows)
        self._requests = InferRequests(
            columns, load_schema(client.data), max_rows=client.max_rows, order=client.order, seed=client.seed
        )
        self._cut = cutter(self._requests)

    async def __aenter__(self) -> Self:
        await self._pool.start(self._all.path_set(self._paths))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._pool.close()

    async def offer(self, setting: Setting, load: LoadConfig) -> Driven:
        """Offer ``load`` under ``setting``."""
        queries = arrivals(load)
        starts = starts_of(load, len(queries), self._requests.rows)
        scheduler = Scheduler(setting.path_set(self._paths), setting.scheduler)
        serving = Dispatcher(scheduler, self._pool, Metrics([path.name for path in setting.paths]))
        target_s = load.target_ms / 1e3

        async def ask(number: int, rows: int, arrived: float) -> Reply:
            try:
                answer = await serving.score(self._cut(starts[number], rows), target_s, None, arrived)
            except Refused as error:
                return Reply(shed=str(error))
            except WorkerFailed as error:
                return Reply(failure=str(error))
            return Reply(path=answer.path)

        # The dispatcher is not closed: that would close the pool, which the next load needs.
        return await drive(queries, target_s, ask)


Transport = HttpTransport | DirectTransport


def transport(way: Way, paths: PathSet, settings: Sequence[Setting], client: LoadClientConfig) -> Transport:
    """The transport of the word ``way``."""
    torch.set_num_threads(1)
    return (HttpTransport if way == "http" else DirectTransport)(paths, settings, client)


def cutter(requests: InferRequests) -> Callable[[int, int], Rows]:
    """Cuts the batch of a query out of the rows: (start, rows).

    Where every feature has one id a row it is a single copy, as cheap as what a server does with a request.
    """
    kept = requests.columns(0, requests.kept)
    if any(bags.offsets is not None for bags in kept.sparse):
        return lambda start, rows: _batch(kept.slice(start, start + rows))
    ids = np.stack([bags.ids for bags in kept.sparse])
    dense = torch.from_numpy(np.array(kept.dense, np.float32))

    def cut(start: int, rows: int) -> Rows:
        own = torch.from_numpy(ids[:, start : start + rows].reshape(-1))
        return Rows(
            dense=dense[start : start + rows],
            ids=own,
            offsets=torch.arange(len(own) + 1),
            of_torch=False,
        )

    return cut


def _batch(columns: Columns) -> Rows:
    taken = feature_major(columns)
    return Rows(dense=taken.dense, ids=taken.ids, offsets=taken.offsets, of_torch=False)
