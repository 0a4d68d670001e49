"""A server follows the link of its snapshot: no request is dropped, what is damaged is refused."""

import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from serving_server import PATIENCE_S, Reply, Server, request_of, rows, scores, serving, wait_until
from snapshot_forged import flip_byte, forge_manifest

from tightrec.serving.paths import write_paths
from tightrec.snapshot import load


def snapshot_of(folder: Path, step: int, **settings: object) -> Path:
    """A snapshot of its own weights, from training step ``step``."""
    from serving_made import made_snapshot

    made_snapshot(folder, seed=step, **settings)
    forge_manifest(folder, lambda values: values.update(step=step))
    return folder


def point(link: Path, folder: Path) -> None:
    """Move ``link`` to ``folder`` in one step, as a watcher does."""
    new = link.with_name("new")
    new.symlink_to(folder.name)
    new.rename(link)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``current`` -> step-1, and paths over it."""
    from serving_made import made_path, made_set

    folder = tmp_path_factory.mktemp("watched")
    point(folder / "current", snapshot_of(folder / "step-1", 1))
    write_paths(made_set([made_path("only", folder / "current")], slots=1), folder / "paths.json")
    return folder


@pytest.fixture(scope="module")
def server(watched: Path) -> Iterator[Server]:
    with serving(watched / "paths.json", "follow_every_s=0.1") as started:
        yield started
        assert started.stop() == 0, started.lines


def version(server: Server) -> str:
    return server.get("/api/status")["version"]


def refusals(server: Server) -> int:
    text = server.ask("GET", "/metrics").body.decode()
    (line,) = [one for one in text.splitlines() if one.startswith("tightrec_snapshot_swaps_refused_total ")]
    return int(float(line.split()[-1]))


def test_a_new_snapshot_takes_over_while_every_request_is_answered(server: Server, watched: Path):
    assert version(server) == "1"
    snapshot_of(watched / "step-2", 2)
    expected = {str(step): load(watched / f"step-{step}").predict(*rows(8)) for step in (1, 2)}
    replies: list[Reply] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            replies.append(server.infer(request_of(8)))

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(ask) for _ in range(2)]
        wait_until(lambda: len(replies) > 10)
        point(watched / "current", watched / "step-2")
        # It is loaded into memory: the folder may go, as a watcher's old ones do.
        wait_until(lambda: version(server) == "2")
        shutil.rmtree(watched / "step-1")
        before = len(replies)
        wait_until(lambda: len(replies) > before + 10)
        ended.set()
        for one in asking:
            one.result(PATIENCE_S)
    assert {reply.status for reply in replies} == {200}
    versions = []
    for reply in replies:
        versions.append(reply.body.split(b'"model_version":"')[1][:1].decode())
        np.testing.assert_array_equal(scores(reply), expected[versions[-1]])
    assert set(versions) == {"1", "2"}
    wait_until(lambda: len(server.workers()) == 1)
    assert server.get("/v2/models/tightrec")["versions"] == ["2"]
    assert server.ask("GET", "/v2/models/tightrec/versions/1").status == 404


def test_a_damaged_or_different_snapshot_is_refused_and_the_old_one_stays(server: Server, watched: Path):
    before, serves = refusals(server), version(server)
    damaged = snapshot_of(watched / "step-3", 3)
    flip_byte(next(damaged.rglob("*f1*.safetensors")))
    point(watched / "current", damaged)
    wait_until(lambda: refusals(server) == before + 1)
    assert "a new snapshot was refused" in server.get("/api/status")["swap"]
    assert any("refused" in line and "f1" in line for line in server.lines)
    point(watched / "current", snapshot_of(watched / "step-4", 4, cardinalities=(50, 70, 111)))
    wait_until(lambda: refusals(server) == before + 2)
    assert any("other features" in line for line in server.lines)
    assert version(server) == serves
    np.testing.assert_array_equal(
        scores(server.infer(request_of(8))), load(watched / f"step-{serves}").predict(*rows(8))
    )
    # A good one after it is taken.
    point(watched / "current", snapshot_of(watched / "step-5", 5))
    wait_until(lambda: version(server) == "5")
    assert server.get("/api/status")["swap"] is None


def test_a_snapshot_that_is_replaced_in_its_place_is_followed_too(server: Server, watched: Path):
    new = snapshot_of(watched / "other", 6)
    serves = (watched / "current").resolve()
    shutil.rmtree(serves)
    os.rename(new, serves)
    wait_until(lambda: version(server) == "6")
    assert server.infer(request_of(8)).status == 200
