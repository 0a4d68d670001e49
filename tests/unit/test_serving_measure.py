"""How paths are measured: quality and memory in a process of their own, latency through the workers."""

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from child_processes import children
from explored import hashed_snapshot, path, prepare
from snapshot_made import make_snapshot

from tightrec.formats.columns import Bags, Columns
from tightrec.serving.explore.candidates import open_snapshots, read_held_out
from tightrec.serving.explore.config import ExploreConfig
from tightrec.serving.explore.measure import WARM_UP, Effort, RowStream, measure, time_batches
from tightrec.serving.explore.quality import Task, assess, count_ids
from tightrec.serving.paths import CacheConfig
from tightrec.snapshot import load

EFFORT = Effort(rows=(1, 64), repeats=4, least_repeats=2, seconds=0.01)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with snapshots ``table`` and ``dhe`` and the prepared folder ``rows``."""
    folder = tmp_path_factory.mktemp("made")
    make_snapshot(folder / "table")
    hashed_snapshot(folder / "dhe")
    prepare(folder / "rows")
    return folder


def settings(made: Path, *snapshots: str, **more) -> ExploreConfig:
    chosen = {"data": made / "rows", "rows": (1, 64), "cores": 2, "out": made / "paths.json"} | more
    return ExploreConfig(snapshots=tuple(made / name for name in snapshots or ("table",)), **chosen)


def task(folder: Path, **more) -> Task:
    values = {
        "fingerprint": "f",
        "device": "cpu",
        "threads": 1,
        "cache": CacheConfig(),
        "cache_file": None,
        "frequencies": {},
        "batch_rows": 64,
    }
    return Task(snapshot=folder, **(values | more))


@pytest.fixture
def no_child_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


def test_figures_are_those_of_the_loaded_snapshot(made, no_child_left):
    config = settings(made)
    (opened,) = open_snapshots(config.snapshots)
    rows = read_held_out(config, opened).quality
    found = assess(task(made / "table"), rows, 120)
    sparse = {name: bags.ids for name, bags in zip(opened.names, rows.sparse, strict=True)}
    scores = load(made / "table").predict(rows.dense, sparse)
    assert found.accuracy == pytest.approx(np.mean((scores >= 0.5) == (rows.labels > 0)))
    clicks, others = scores[rows.labels > 0], scores[rows.labels == 0]
    above = (clicks[:, None] > others).mean() + 0.5 * (clicks[:, None] == others).mean()
    assert found.auc == pytest.approx(above, abs=1e-6)
    losses = -np.log(np.where(rows.labels > 0, scores, 1 - scores).astype(float))
    rate = rows.labels.mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    assert found.ne == pytest.approx(losses.mean() / entropy, rel=1e-5)
    assert found.rows == 600 and found.hits == {} and found.memory_bytes > 0


def test_a_cache_is_judged_and_its_file_made(made, tmp_path):
    config = settings(made, "dhe")
    (opened,) = open_snapshots(config.snapshots)
    rows = read_held_out(config, opened)
    counted = count_ids(rows.latency, opened.names, opened.hashed)
    assert set(counted) == {"f0", "f1", "f2"} and sum(counted["f2"][1]) == 600
    cache = CacheConfig(levels="both", memory_mb=0.1, centroids=2)
    found = assess(
        task(made / "dhe", cache=cache, cache_file=tmp_path / "cache", frequencies=counted), rows.quality, 120
    )
    plain = assess(task(made / "dhe"), rows.quality, 120)
    assert set(found.hits) == {"encoder", "decoder"}
    assert 0 < found.cache_bytes <= 100_000
    assert (tmp_path / "cache").is_file()
    assert abs(found.ne - plain.ne) < 0.5


def test_a_process_that_takes_too_long_or_dies_or_refuses_is_told_and_gone(made, tmp_path, no_child_left):
    config = settings(made)
    (opened,) = open_snapshots(config.snapshots)
    rows = read_held_out(config, opened).quality
    with pytest.raises(TimeoutError, match=r"took over 0\.01 s"):
        assess(task(made / "table"), rows, 0.01)
    with pytest.raises(ValueError, match="There is no snapshot"):
        assess(task(tmp_path / "none"), rows, 120)
    with pytest.raises(ChildProcessError, match=r"scoring with .* failed: "):
        assess(task(made / "table", threads="two"), rows, 120)


def numbered(count: int) -> Columns:
    ids = np.arange(count)
    return Columns(np.empty((count, 0), np.float32), np.zeros(count, np.float32), (Bags(ids),))


def test_no_row_comes_twice_before_all_have_come():
    stream = RowStream(numbered(10), seed=1)
    taken = [stream.next(4).ids.tolist() for _ in range(5)]
    flat = [number for batch in taken for number in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert [RowStream(numbered(10), seed=1).next(4).ids.tolist()] == taken[:1]
    assert len(RowStream(numbered(3), seed=0).next(8)) == 8


def timed(effort: Effort, seconds):
    """Profile and counts where the n-th timed batch of a size takes ``seconds(size, n)``; and their order."""
    now, order, seen = [0.0], [], dict.fromkeys(effort.rows, -WARM_UP)

    async def score(batch):
        size = len(batch)
        order.append(size)
        now[0] += seconds(size, seen[size])
        seen[size] += 1

    found = asyncio.run(time_batches(score, RowStream(numbered(50), 0), effort, lambda: now[0]))
    return *found, order[WARM_UP * len(effort.rows) :]


def test_the_profile_holds_medians_and_tails_without_the_warm_up():
    effort = Effort(rows=(4, 2), repeats=101, least_repeats=5, seconds=1e9)
    found, counts, _ = timed(effort, lambda size, n: 9.0 if n < 0 else size * (1 + n / 100))
    assert found.rows == (2, 4)
    assert found.latency_ms == pytest.approx((3000, 6000))
    assert found.tail_ms == pytest.approx((3980, 7960))
    assert counts == {2: 101, 4: 101}


def test_sizes_take_turns_until_their_time_or_number_is_reached():
    effort = Effort(rows=(1, 8), repeats=6, least_repeats=2, seconds=5.0)
    _, counts, order = timed(effort, lambda size, n: float(size))
    assert counts == {1: 5, 8: 2}
    assert order == [1, 8, 1, 8, 1, 1, 1]
    _, counts, _ = timed(effort, lambda size, n: 0.1 * size)
    assert counts == {1: 6, 8: 6}


def test_a_path_is_timed_through_a_worker_that_is_gone_afterwards(made, no_child_left):
    rows = RowStream(read_held_out(settings(made), open_snapshots([made / "table"])[0]).latency, 0)
    wanted = path(snapshot=str(made / "table"))
    found, counts = measure(wanted, rows, EFFORT, warm_rows=64, timeout_s=120)
    assert found.rows == (1, 64) and min(counts.values()) >= 2
    with pytest.raises(ValueError, match="cannot load its paths: There is no snapshot"):
        measure(dataclasses.replace(wanted, snapshot="/none"), rows, EFFORT, warm_rows=0, timeout_s=120)
    with pytest.raises(TimeoutError, match=r"measuring path table-int8-cpu-1 took over 0\.01 s"):
        measure(wanted, rows, EFFORT, warm_rows=0, timeout_s=0.01)
