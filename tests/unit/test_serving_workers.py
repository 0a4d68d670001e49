"""Worker processes: scores as ``Snapshot.predict`` has them, merged queries, deaths, hangs and the end."""

import asyncio
import dataclasses
import itertools
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from child_processes import children
from serving_made import CARDINALITIES, float_plan, made_path, made_set, made_snapshot

from tightrec.models.config import RepresentationConfig
from tightrec.serving.paths import CacheConfig, Device, PathSet
from tightrec.serving.workers.pool import NoWorker, WorkerFailed, WorkerPool, groups_of
from tightrec.serving.workers.wire import LENGTH, batch_message, read_batch
from tightrec.snapshot import Snapshot, load
from tightrec.snapshot.inputs import Batch, Inputs

PATIENCE_S = 60


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("workers")
    return {
        "quick": made_snapshot(folder / "quick"),
        "best": made_snapshot(folder / "best", plan=float_plan()),
    }


@pytest.fixture(scope="module")
def paths(snapshots: dict[str, Path]) -> PathSet:
    return made_set([made_path(name, folder) for name, folder in snapshots.items()], slots=1)


@pytest.fixture(scope="module")
def quick(snapshots: dict[str, Path]) -> Snapshot:
    return load(snapshots["quick"])


def columns(rows: int, seed: int, bags: bool = False) -> tuple[np.ndarray, dict[str, Any]]:
    draw = np.random.default_rng(seed)
    sparse: dict[str, Any] = {f"f{i}": draw.integers(0, n, rows) for i, n in enumerate(CARDINALITIES)}
    if bags:
        offsets = np.concatenate([[0], draw.integers(0, 4, rows).cumsum()])
        sparse["f2"] = (draw.integers(0, CARDINALITIES[2], offsets[-1]), offsets)
    return draw.standard_normal((rows, 3), np.float32), sparse


def checked(snapshot: Snapshot, dense: np.ndarray, sparse: dict[str, Any]) -> Batch:
    inputs = Inputs(snapshot.dense_names, snapshot.features, "refuse", torch.device("cpu"))
    return inputs.convert(dense, sparse)


class Pool(NamedTuple):
    """A pool that tests share, since a worker takes seconds to start, and the event loop that it lives in."""

    pool: WorkerPool
    runner: asyncio.Runner

    def do(self, work: Callable[[WorkerPool], Awaitable[None]]) -> None:
        self.runner.run(limited(work(self.pool)))


async def limited(work: Awaitable[None]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await work


@pytest.fixture(scope="module")
def shared(paths: PathSet) -> Iterator[Pool]:
    with asyncio.Runner() as runner:
        pool = WorkerPool(batch_timeout_s=2)
        runner.run(pool.start(paths))
        try:
            yield Pool(pool, runner)
        finally:
            runner.run(pool.close())


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_queries_of_any_form_merge_into_the_batch_that_their_rows_make(quick: Snapshot):
    for bags in ([False], [True], [False, False], [True, True], [False, True, False], [True] * 4):
        given = [columns(rows, rows, bag) for rows, bag in zip([3, 1, 5, 2], bags, strict=False)]
        queries = [checked(quick, *one) for one in given]
        pieces = batch_message(2, queries)
        message = bytearray(b"".join(pieces))
        assert LENGTH.unpack_from(message)[0] == len(message) - LENGTH.size
        path, merged, rows = read_batch(message[LENGTH.size :], 3, 3)
        assert path == 2 and rows == [len(query) for query in queries]
        lists = {
            name: [ids for _, sparse in given for ids in as_lists(sparse[name])]
            for name in ("f0", "f1", "f2")
        }
        whole = checked(quick, np.concatenate([dense for dense, _ in given]), lists)
        assert torch.equal(merged.dense, whole.dense)
        assert torch.equal(merged.ids, whole.ids) and torch.equal(merged.offsets, whole.offsets)


def as_lists(ids: Any) -> list[list[int]]:
    if isinstance(ids, tuple):
        values, offsets = ids
        return [values[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    return [[int(one)] for one in ids]


def test_merged_queries_get_the_scores_that_predict_gives_them_alone(shared: Pool, paths: PathSet, snapshots):
    loaded = {name: load(folder) for name, folder in snapshots.items()}
    given = [columns(rows, rows, rows % 2 == 0) for rows in (1, 4, 129)]

    async def work(pool: WorkerPool) -> None:
        assert pool.steps == {"quick": 1, "best": 1} and len(pool.pids()) == 1
        for name, snapshot in loaded.items():
            queries = [checked(snapshot, *one) for one in given]
            found = await pool.run(paths.path(name), queries)
            for scores, one in zip(found, given, strict=True):
                np.testing.assert_allclose(scores, snapshot.predict(*one), rtol=0, atol=1e-6)

    shared.do(work)


def test_a_score_that_is_not_finite_is_nan_and_its_neighbours_are_scored(
    shared: Pool, paths: PathSet, quick: Snapshot
):
    dense, sparse = columns(3, 0)
    dense[1] = 3e38

    async def work(pool: WorkerPool) -> None:
        (found,) = await pool.run(paths.path("best"), [checked(quick, dense, sparse)])
        assert np.isfinite(found).tolist() == [True, False, True]

    shared.do(work)


def test_a_killed_worker_fails_its_batch_by_name_and_is_replaced(
    shared: Pool, paths: PathSet, quick: Snapshot
):
    query = checked(quick, *columns(4, 0))

    async def work(pool: WorkerPool) -> None:
        restarts, (pid,) = pool.restarts, pool.pids()
        os.kill(pid, signal.SIGSTOP)
        under_way = asyncio.create_task(pool.run(paths.path("quick"), [query]))
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerFailed, match="worker cpu-1-0 died"):
            await under_way
        assert not pool.ready
        # Who asks meanwhile and has no time is told, who has time is served by the next worker.
        with pytest.raises(NoWorker, match="quick"):
            await pool.score(paths.path("quick"), [query], patience_s=0.01)
        (found,) = await pool.run(paths.path("quick"), [query])
        assert len(found) == 4
        assert pool.restarts == restarts + 1 and pool.ready and pool.pids() != [pid]

    shared.do(work)


def test_a_worker_that_hangs_is_killed_and_replaced(shared: Pool, paths: PathSet, quick: Snapshot):
    query = checked(quick, *columns(4, 0))

    async def work(pool: WorkerPool) -> None:
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkerFailed, match="more than 2 s"):
            await pool.run(paths.path("quick"), [query])
        await until(lambda: pool.ready)
        assert not alive(pid)

    shared.do(work)


def test_a_caller_that_goes_leaves_the_worker_usable(shared: Pool, paths: PathSet, quick: Snapshot):
    query = checked(quick, *columns(4000, 0))

    async def work(pool: WorkerPool) -> None:
        restarts = pool.restarts
        expected = await pool.run(paths.path("quick"), [query])
        for _ in range(3):
            going = asyncio.create_task(pool.run(paths.path("quick"), [query]))
            await asyncio.sleep(0)
            going.cancel()
        found = await pool.run(paths.path("quick"), [query])
        np.testing.assert_array_equal(found[0], expected[0])
        assert pool.restarts == restarts

    shared.do(work)


def test_a_batch_that_cannot_be_scored_fails_and_the_worker_goes_on(
    shared: Pool, paths: PathSet, quick: Snapshot
):
    good = checked(quick, *columns(2, 0))
    # What Inputs would have refused: offsets that do not fit.
    bad = Batch(dense=good.dense, ids=good.ids, offsets=good.offsets[:-2], of_torch=False)

    async def work(pool: WorkerPool) -> None:
        pids = pool.pids()
        with pytest.raises(WorkerFailed, match="could not score"):
            await pool.run(paths.path("quick"), [bad])
        await pool.run(paths.path("quick"), [good])
        assert pool.pids() == pids

    shared.do(work)


def test_paths_that_share_a_snapshot_keep_their_own_caches_and_count_them(tmp_path: Path):
    hashed = RepresentationConfig(kind="dhe", hashes=16, buckets=1000, decoder=(8,))
    folder = made_snapshot(tmp_path / "hashed", representation=hashed)
    plain = made_path("plain", folder)
    cached = dataclasses.replace(
        plain, name="cached", cache=CacheConfig(levels="encoder"), cache_file="encoder.safetensors"
    )
    paths = made_set([plain, cached], slots=1)
    snapshot = load(folder)
    given = columns(64, 0)
    query = checked(snapshot, *given)

    async def work() -> None:
        pool = WorkerPool(cache_folder=tmp_path)
        await pool.start(paths)
        try:
            hits = 0
            for _ in range(40):
                found = await pool.score(cached, [query])
                np.testing.assert_allclose(found.scores[0], snapshot.predict(*given), rtol=0, atol=1e-6)
                hits += found.caches["encoder"][0]
                other = await pool.score(plain, [query])
                assert other.caches == {}
            assert hits > 0
            # What was counted once is not counted again.
            assert sum(found.caches["encoder"]) <= 3 * 64
        finally:
            await pool.close()
        assert (tmp_path / "encoder.safetensors").is_file()

    asyncio.run(limited(work()))


def test_workers_end_with_their_pool_and_with_their_parent(paths: PathSet):
    async def work() -> None:
        pool = WorkerPool()
        await pool.start(paths)
        # The parent's death closes its end of the socket, and nothing else.
        (worker,) = [one for group in pool._groups.values() for one in group.workers]
        assert worker is not None
        worker._writer.close()
        assert await worker.process.wait() == 0
        await until(lambda: pool.pids() not in ([], [worker.pid]))
        pids = pool.pids()
        assert len(pids) == 1 and alive(pids[0])
        await pool.close()
        assert not alive(pids[0])
        with pytest.raises(NoWorker):
            await pool.run(paths.path("quick"), [])

    asyncio.run(limited(work()))


def test_what_cannot_be_loaded_is_said_and_no_process_is_left(tmp_path: Path, snapshots: dict[str, Path]):
    broken = made_snapshot(tmp_path / "broken")
    table = next(broken.rglob("*f1*.safetensors"))
    table.write_bytes(table.read_bytes()[:-1])
    paths = made_set([made_path("good", snapshots["quick"]), made_path("bad", broken)])
    before = children()

    async def work() -> None:
        with pytest.raises(ValueError, match=r"cannot load its paths: .*f1"):
            await WorkerPool().start(paths)

    asyncio.run(limited(work()))
    assert children() <= before


def test_workers_are_counted_by_slots_and_threads_and_recorded_devices_are_refused(tmp_path: Path):
    one, two = made_path("one", tmp_path), made_path("two", tmp_path, threads=2)
    other = made_path("other", tmp_path)
    sizes = {key: group.size for key, group in groups_of(made_set([one, two, other], slots=5)).items()}
    assert sizes == {("cpu", 1): 5, ("cpu", 2): 2}
    assert {key: group.size for key, group in groups_of(made_set([one], slots=5), 3).items()} == {
        ("cpu", 1): 3
    }
    recorded = PathSet(devices=(Device(name="cpu", slots=1, recorded=True),), paths=(one,))
    with pytest.raises(ValueError, match="path one is on cpu, whose profiles were recorded elsewhere"):
        groups_of(recorded)
