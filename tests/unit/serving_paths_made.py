"""Sets of paths and queries for tests of the scheduler: durations are straight lines over the rows."""

import random
from collections.abc import Iterable

from tightrec.serving.paths import Device, PathSet, Profile, ServingPath
from tightrec.serving.scheduling.queues import Batch, Query
from tightrec.serving.scheduling.scheduler import Scheduler, SchedulerConfig

SIZES = (1, 16, 128, 512, 1024, 4096)


def made_path(
    name: str,
    fixed_ms: float,
    row_us: float,
    accuracy: float,
    *,
    threads: int = 1,
    device: str = "cpu",
    tail: float = 1.0,
) -> ServingPath:
    """A batch takes ``fixed_ms`` plus ``row_us`` a row; its 99th percentile is ``tail`` times as long."""
    latency = tuple(fixed_ms + row_us * rows / 1e3 for rows in SIZES)
    return ServingPath(
        name=name,
        snapshot=f"snapshots/{name}",
        fingerprint="",
        representation="table",
        precision="int8",
        device=device,
        threads=threads,
        accuracy=accuracy,
        auc=accuracy,
        ne=1 - accuracy,
        memory_bytes=1,
        profile=Profile(rows=SIZES, latency_ms=latency, tail_ms=tuple(tail * ms for ms in latency)),
    )


def made_cpu(*paths: ServingPath, slots: int = 2) -> PathSet:
    return PathSet(devices=(Device(name="cpu", slots=slots),), paths=paths)


def usual_cpu(tail: float = 1.0) -> PathSet:
    """Two cores; the better a path, the slower. ``table-2`` takes both for a lower latency."""
    return made_cpu(
        made_path("table", 0.5, 3, 0.784, tail=tail),
        made_path("table-2", 0.6, 1.8, 0.784, threads=2, tail=tail),
        made_path("wide", 0.6, 5, 0.785, tail=tail),
        made_path("dhe", 0.7, 12, 0.787, tail=tail),
        made_path("hybrid", 0.8, 40, 0.790, tail=tail),
        made_path("hybrid-2", 0.9, 22, 0.790, threads=2, tail=tail),
    )


def with_gpu(tail: float = 1.0) -> PathSet:
    """The usual CPU and a device with one slot."""
    cpu = usual_cpu(tail)
    gpu = (
        made_path("gpu-table", 0.3, 0.2, 0.784, device="gpu", tail=tail),
        made_path("gpu-hybrid", 0.5, 2, 0.790, device="gpu", tail=tail),
    )
    return PathSet(devices=(*cpu.devices, Device(name="gpu", slots=1)), paths=(*cpu.paths, *gpu))


def poisson(rate: float, seconds: float, target_ms: float, seed: int = 0) -> list[Query]:
    """Poisson arrivals of lognormal sizes, mean about 128."""
    draw, at, queries = random.Random(seed), 0.0, list[Query]()
    while (at := at + draw.expovariate(rate)) < seconds:
        rows = min(4096, max(1, round(draw.lognormvariate(4.35, 1.0))))
        queries.append(Query(len(queries), rows, at, target_ms / 1e3))
    return queries


class Driven:
    """A scheduler with what it started; ``lasting`` is how long batches take, in expected durations."""

    def __init__(self, paths: PathSet, lasting: float = 1.0, **settings: object) -> None:
        self.scheduler = Scheduler(paths, SchedulerConfig(**settings))  # type: ignore[arg-type]
        self.lasting = lasting
        self.number = 0
        self.batches: list[Batch] = []
        self.shed: dict[int, str] = {}
        self.running: list[Batch] = []

    def submit(
        self, rows: int, now: float = 0.0, target_ms: float = 10.0, path: str | None = None, go: bool = True
    ) -> Query:
        query = Query(self.number, rows, now, target_ms / 1e3, path)
        self.number += 1
        self._note([shed] if (shed := self.scheduler.submit(query, now)) else [])
        if go:
            self.start(now)
        return query

    def start(self, now: float) -> list[Batch]:
        batches, sheds = self.scheduler.start(now)
        self._note(sheds)
        self.batches += batches
        self.running += batches
        return batches

    def finish(self, batch: Batch, now: float | None = None) -> float:
        """End ``batch`` when it should, or at ``now``; returns when."""
        ended = batch.started + self.lasting * batch.expected_s if now is None else now
        self.running.remove(batch)
        self.scheduler.finish(batch, ended)
        return ended

    def run_down(self) -> float:
        """Finish everything; returns when."""
        now = 0.0
        while self.running:
            now = self.finish(min(self.running, key=lambda b: b.started + self.lasting * b.expected_s))
            self.start(now)
        return now

    def _note(self, sheds: Iterable[object]) -> None:
        for shed in sheds:
            assert shed.query.number not in self.shed  # type: ignore[attr-defined]
            self.shed[shed.query.number] = shed.reason  # type: ignore[attr-defined]
