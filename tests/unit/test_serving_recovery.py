"""What goes on after errors: workers that fail for ever, those that keep them, the follower of snapshots."""

import asyncio
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from child_processes import children
from serving_made import made_path, made_set, made_snapshot

from tightrec.models.config import RepresentationConfig
from tightrec.serving.server import follow
from tightrec.serving.workers import paths as worker_paths
from tightrec.serving.workers import pool as pools
from tightrec.serving.workers import process
from tightrec.serving.workers.pool import WorkerPool
from tightrec.serving.workers.worker import MOST_FAULTS, Worker, WorkerFailed, WorkerNotStarted
from tightrec.snapshot.inputs import Batch

PATIENCE_S = 60


def run(work: Any) -> None:
    async def limited() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await work

    asyncio.run(limited())


class Failing:
    """Paths that raise what is told, batch after batch; None: a score of 0."""

    dense = sparse = 0

    def __init__(self, errors: list[Exception | None]) -> None:
        self.errors = iter(errors)

    def score(self, place: int, batch: Batch) -> tuple[np.ndarray, dict[str, Any]]:
        error = next(self.errors)
        if error is not None:
            raise error
        return np.zeros(len(batch), np.float32), {}


FAULT, MISTAKE = RuntimeError("device-side assert"), ValueError("offsets do not fit.")


@pytest.mark.parametrize(
    ("errors", "survives"),
    [
        ([FAULT] * MOST_FAULTS, False),
        ([FAULT, MISTAKE, FAULT, FAULT], False),
        ([FAULT, FAULT, None, FAULT, FAULT], True),
        ([MISTAKE] * 2 * MOST_FAULTS, True),
    ],
)
def test_a_worker_that_fails_whatever_it_is_given_is_replaced(errors: list[Exception | None], survives: bool):
    ids = torch.zeros(0, dtype=torch.int64)
    batch = Batch(dense=torch.zeros(1, 0), ids=ids, offsets=torch.zeros(1, dtype=torch.int64), of_torch=False)

    def serve(connection: socket.socket) -> None:
        with connection, pytest.raises(EOFError):
            process._score_until_closed(connection, Failing(errors))  # type: ignore[arg-type]

    async def work() -> None:
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=serve, args=(theirs,), daemon=True)
        thread.start()
        reader, writer = await asyncio.open_connection(sock=ours)
        stub: Any = SimpleNamespace(pid=1, returncode=None, kill=lambda: None)
        worker = Worker("w", stub, reader, writer)
        for error in errors:
            assert worker.alive
            if error is None:
                await worker.score(0, [batch], 10)
                continue
            with pytest.raises(WorkerFailed, match=str(error)) as told:
                await worker.score(0, [batch], 10)
        assert worker.alive == survives and ("is replaced" in str(told.value)) != survives
        writer.close()
        await asyncio.to_thread(thread.join, PATIENCE_S)

    run(work())


def test_a_worker_is_replaced_whatever_went_wrong_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(pools, "FIRST_PAUSE_S", 0.001)
    tries = []

    async def work() -> None:
        pool, done = WorkerPool(), asyncio.Event()

        async def launch(group: Any, index: int) -> None:
            tries.append(index)
            if len(tries) < 3:
                raise KeyError("a mistake of ours")
            done.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(pool, "_launch", launch)
        keeper = asyncio.create_task(pool._keep(SimpleNamespace(workers=[None]), 0))  # type: ignore[arg-type]
        await done.wait()
        keeper.cancel()

    run(work())
    assert len(tries) == 3 and "KeyError('a mistake of ours')" in caplog.text


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_start_that_is_broken_off_leaves_no_process(loop: str):
    factory = None if loop == "asyncio" else pytest.importorskip("uvloop").new_event_loop

    async def work() -> None:
        for turns in range(6):
            starting = asyncio.create_task(Worker.start("w", {"threads": 1}, 10))
            for _ in range(turns):
                await asyncio.sleep(0)
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting

    before = children()
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(work())
        assert children() <= before


def test_a_snapshot_that_is_replaced_while_it_is_loaded_is_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hashed = RepresentationConfig(kind="dhe", hashes=16, buckets=1000, decoder=(8,))
    folder = made_snapshot(tmp_path / "served", representation=hashed, seed=1)
    other = made_snapshot(tmp_path / "other", representation=hashed, seed=2)
    load, loaded = worker_paths.load, []

    def replacing(name: str, device: str) -> Any:
        loaded.append(load(name, device))
        if len(loaded) == 1:
            folder.rename(tmp_path / "old")
            other.rename(folder)
        return loaded[-1]

    monkeypatch.setattr(worker_paths, "load", replacing)
    snapshot, fingerprint = worker_paths._load(str(folder), "cpu")
    assert len(loaded) == 2 and snapshot is loaded[1]
    assert fingerprint == worker_paths.fingerprint_of(folder) != worker_paths.fingerprint_of(tmp_path / "old")


class Watched:
    """A follower of one path whose pools do as they are told, and what it did to its service."""

    def __init__(self, outcomes: list[Exception | None], monkeypatch: pytest.MonkeyPatch) -> None:
        self.outcomes, self.seen, self.said = iter(outcomes), 1, list[str]()
        self.swaps = self.refused = 0
        metrics = SimpleNamespace(swaps=counter(self, "swaps"), refused_swaps=counter(self, "refused"))
        self.service: Any = SimpleNamespace(
            metrics=metrics, swap_note=None, restarts_before=0, protocol=SimpleNamespace(version="1")
        )
        current = SimpleNamespace(version="2")
        self.service.dispatcher = SimpleNamespace(current=current, swap=lambda pool: Before())
        monkeypatch.setattr(follow, "FIRST_PAUSE_S", 0.001)
        monkeypatch.setattr(follow, "identities", self._identities)
        monkeypatch.setattr(follow, "features_of", lambda paths: ())
        paths = made_set([made_path("only", "x")])
        made: Any = follow.Follower(
            paths,
            {"only": ("step-0", 0, 0)},
            (),
            self.service,
            lambda: self,
            0.001,
            self.said.append,  # type: ignore
        )
        self.follower = made

    def _identities(self, paths: Any) -> Any:
        if isinstance(self.seen, Exception):
            raise self.seen
        return None if self.seen is None else {"only": (f"step-{self.seen}", self.seen, 0)}

    async def start(self, paths: Any) -> None:
        error = next(self.outcomes)
        if error is not None:
            raise error

    async def until(self, true: Any) -> None:
        while not true():
            await asyncio.sleep(0.001)


class Before:
    """What was in service."""

    def __init__(self) -> None:
        async def nothing() -> None:
            pass

        self.idle, self.pool = nothing, SimpleNamespace(restarts=0, close=nothing)


def counter(of: Any, name: str) -> Any:
    return SimpleNamespace(inc=lambda: setattr(of, name, getattr(of, name) + 1))


def following(watched: Watched, work: Any) -> None:
    async def both() -> None:
        task = asyncio.create_task(watched.follower.run())
        try:
            await work
            assert not task.done()
        finally:
            task.cancel()

    run(both())


def test_what_fails_for_want_of_files_time_or_memory_is_tried_again(monkeypatch: pytest.MonkeyPatch):
    errors = [OSError(24, "Too many open files"), WorkerNotStarted("did not load within 1 s."), MemoryError()]
    watched = Watched([*errors, None], monkeypatch)
    following(watched, watched.until(lambda: watched.swaps == 1))
    assert watched.refused == 0 and watched.service.swap_note is None
    words = ["Too many open files", "did not load within", "MemoryError", "is in service"]
    assert [word in line for word, line in zip(words, watched.said, strict=True)] == [True] * 4
    assert "in 0.001 s" in watched.said[0] and "in 0.004 s" in watched.said[2]


@pytest.mark.parametrize("error", [ValueError("damaged."), WorkerNotStarted("damaged.", lasting=True)])
def test_what_is_wrong_with_a_snapshot_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, error: ValueError):
    watched = Watched([error, None], monkeypatch)

    async def work() -> None:
        await watched.until(lambda: watched.refused)
        await asyncio.sleep(0.05)
        assert watched.swaps == 0 and watched.service.swap_note == "a new snapshot was refused: damaged."
        watched.seen = 2
        await watched.until(lambda: watched.swaps)
        assert watched.refused == 1 and watched.service.swap_note is None

    following(watched, work())


def test_the_follower_outlives_links_that_cannot_be_followed(monkeypatch: pytest.MonkeyPatch):
    watched = Watched([None], monkeypatch)
    watched.seen = RuntimeError("Symlink loop")  # type: ignore[assignment]

    async def work() -> None:
        await watched.until(lambda: watched.said)
        await asyncio.sleep(0.02)
        assert len(watched.said) == 1 and "Symlink loop" in watched.service.swap_note
        watched.seen = 0  # what is in service
        await watched.until(lambda: watched.service.swap_note is None)
        watched.seen = 1
        await watched.until(lambda: watched.swaps)

    following(watched, work())


def test_a_link_that_leads_nowhere_is_said_once(monkeypatch: pytest.MonkeyPatch):
    watched = Watched([None], monkeypatch)
    watched.seen = None  # type: ignore[assignment]

    async def work() -> None:
        await watched.until(lambda: watched.said)
        await asyncio.sleep(0.02)
        assert watched.said == [watched.service.swap_note]
        assert "x is not there, or its link leads nowhere" in watched.said[0]
        watched.seen = 0
        await watched.until(lambda: watched.service.swap_note is None)

    following(watched, work())


def test_a_path_that_becomes_another_kind_of_model_is_named(monkeypatch: pytest.MonkeyPatch):
    watched = Watched([None, None], monkeypatch)
    measured = made_path("only", "x")
    kinds = [(measured.representation, measured.precision), ("hybrid", "int8")]
    monkeypatch.setattr(follow, "read_manifest", lambda folder: folder)
    for number, (representation, precision) in enumerate(kinds, start=1):
        monkeypatch.setattr(follow, "representation_of", lambda _, found=representation: found)
        monkeypatch.setattr(follow, "precision_of", lambda _, found=precision: found)
        watched.seen = number

        async def work(wanted: int = number) -> None:
            await watched.until(lambda: watched.swaps == wanted)
            await asyncio.sleep(0.02)

        following(watched, work())
    assert [line.partition(":")[0] for line in watched.said[:2]] == ["a new snapshot is in service"] * 2
    assert "version 2, step-1" in watched.said[0] and "version 2, step-2" in watched.said[1]
    assert len(watched.said) == 3 and "path only was measured as" in watched.said[2]
    assert "and is hybrid int8 now" in watched.said[2]


def test_a_worker_says_whether_its_paths_are_to_blame(tmp_path: Path):
    absent = pools._start_values(made_path("only", tmp_path / "absent"), None)
    for path, said, lasting in ((absent, "There is no snapshot", True), ({}, "KeyError", False)):
        values = {"paths": [path], "device": "cpu", "threads": 1, "background": False, "keep_caches": True}
        with pytest.raises(WorkerNotStarted, match=said) as told:
            run(Worker.start("w", values, PATIENCE_S))
        assert told.value.lasting == lasting
