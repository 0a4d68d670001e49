"""``python -m tightrec.serving load`` as a user meets it, against servers that score nothing."""

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from aiohttp import web
from pyarrow import parquet as pq

from tightrec.formats.schema import Schema, SparseColumn
from tightrec.serving.__main__ import main
from tightrec.serving.paths import Device, PathSet, Profile, ServingPath, write_paths

UNIT = Path(__file__).resolve().parents[1] / "unit"
sys.path.insert(0, str(UNIT))

import fake_infer_server as fake  # noqa: E402 - its folder is on the path from here on

QUICK = ("rate=200", "duration_s=0.5", "pool_rows=500", "target_ms=10000")


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def load(*words: object) -> Done:
    """The command inside this process."""
    handler = signal.getsignal(signal.SIGTERM)
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = main(["load", *map(str, words)])
    finally:
        signal.signal(signal.SIGTERM, handler)
    return Done(status, out.getvalue(), err.getvalue())


async def in_turns(query: fake.Query, number: int) -> web.Response:
    """Two paths in turns; every fifth query is shed."""
    return fake.shed("late") if number % 5 == 4 else fake.scored(query, "ab"[number % 2])


def paths_file(folder: Path) -> Path:
    profile = Profile(rows=(1,), latency_ms=(1.0,), tail_ms=(1.0,))
    paths = [
        ServingPath(
            name=name,
            snapshot="s",
            fingerprint="0",
            representation="table",
            precision="int8",
            device="cpu",
            threads=1,
            accuracy=accuracy,
            auc=0.5,
            ne=1.0,
            memory_bytes=1,
            profile=profile,
        )
        for name, accuracy in (("a", 0.5), ("b", 0.75))
    ]
    write_paths(PathSet(devices=(Device(name="cpu", slots=1),), paths=tuple(paths)), folder / "paths.json")
    return folder / "paths.json"


def prepared(folder: Path, rows: int = 300) -> Path:
    """A prepared folder with the columns that the fake server reads; user is the row's number mod 50."""
    (folder / "test").mkdir(parents=True)
    numbers = np.arange(rows)
    columns = {
        "click": pa.array(np.zeros(rows, np.float32)),
        "x": pa.array(numbers.astype(np.float32)),
        "y": pa.array(-numbers.astype(np.float32)),
        "user": pa.array(numbers % 50),
        "tags": pa.array([[n % 9] * (n % 3) for n in range(rows)], pa.list_(pa.int64())),
    }
    pq.write_table(pa.table(columns), folder / "test" / "part-00000.parquet")
    schema = Schema(
        dense=("x", "y"),
        sparse=(
            SparseColumn(name="user", cardinality=50),
            SparseColumn(name="tags", cardinality=9, multi_hot=True),
        ),
        label="click",
        rows={"test": rows},
        source="a test",
    )
    schema.save(folder)
    return folder


def test_a_run_prints_and_writes_what_the_server_did(tmp_path: Path) -> None:
    with fake.serving(in_turns) as server:
        out = tmp_path / "load.json"
        done = load(*QUICK, f"url={server.url}", f"paths={paths_file(tmp_path)}", f"out={out}", "path=b")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(out.read_text())
    found = report["summary"]
    assert found["queries"] == len(server.queries)
    assert found["shed"] == len(server.queries) // 5
    assert found["reasons"] == {"late": found["shed"]}
    assert (found["failed"], found["unanswered"]) == (0, 0)
    assert found["in_target"] == found["served"]
    assert report["rows"] == sum(query.rows for query in server.queries)
    assert {query.parameters["path"] for query in server.queries} == {"b"}
    assert {query.parameters["target_ms"] for query in server.queries} == {10000}
    right = found["in_target_rows_per_s"] * (0.5 * found["shares"]["a"] + 0.75 * found["shares"]["b"])
    assert found["correct_rows_per_s"] == pytest.approx(right)
    assert report["config"]["path"] == "b"
    names = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert {"queries", "served", "correct", "latency, ms", "rows by path", "client, ms"} <= set(names)
    assert list(tmp_path.glob(".*")) == []


def test_the_rows_of_a_prepared_folder_are_sent(tmp_path: Path) -> None:
    data = prepared(tmp_path / "data")
    with fake.serving(in_turns) as server:
        done = load(*QUICK, f"url={server.url}", f"data={data}", "sizes=fixed", "mean_rows=7")
    assert done.returncode == 0, done.stderr
    starts = set()
    for query in server.queries:
        row = query.values["dense"][:, 0].astype(int)
        assert (np.diff(row) % 300 == 1).all()
        assert (query.values["dense"][:, 1] == -row).all()
        assert (query.values["user"] == row % 50).all()
        assert (query.values["tags"] == np.concatenate([[n % 9] * (n % 3) for n in row])).all()
        starts.add(int(row[0]))
    assert len(starts) > len(server.queries) / 3


def test_queries_that_fail_are_named_and_set_the_exit_status() -> None:
    async def broken(query: fake.Query, number: int) -> web.Response:
        if number % 3 == 0:
            return web.json_response({"error": "worker cpu-1-0 died"}, status=500)
        return fake.scored(query)

    with fake.serving(broken) as server:
        done = load(*QUICK, f"url={server.url}")
    failed = (len(server.queries) + 2) // 3
    assert done.returncode == 1
    assert f"{failed} x status 500: worker cpu-1-0 died" in done.stdout


def test_no_answer_and_a_closed_connection_are_failures() -> None:
    async def silent(query: fake.Query, number: int) -> web.Response:
        if number == 0:
            await asyncio.sleep(30)
        raise asyncio.CancelledError  # aiohttp closes the connection

    with fake.serving(silent) as server:
        done = load("rate=50", "duration_s=0.3", f"url={server.url}", "timeout_s=0.5", "pool_rows=100")
    assert done.returncode == 1
    assert "no answer within 0.5 s" in done.stdout
    assert "ServerDisconnectedError" in done.stdout


def test_a_warm_up_is_sent_and_not_counted(tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    with fake.serving(in_turns) as server:
        done = load(*QUICK, "warmup_s=0.5", f"url={server.url}", f"out={out}")
    assert done.returncode == 0, done.stderr
    counted = json.loads(out.read_text())["summary"]["queries"]
    assert 0 < counted < 0.75 * len(server.queries)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["rat=3"], "Did you mean 'rate'?"),
        (["rate=-3"], "rate=-3.0 must be"),
        (["data=nowhere"], "nowhere"),
        (["snapshot=nowhere"], "nowhere"),
        (["paths=nowhere.json"], "There is no file nowhere.json"),
        (["out=nowhere/load.json"], "out=nowhere/load.json: there is no folder nowhere. Make it first."),
        (["out=/proc/load.json"], "out=/proc/load.json: the folder /proc takes no files ("),
        (["model=other"], " answers 404, there is no model 'other', only 'tightrec'.\n"),
        (["path=c"], " has no such path, only a, b.\n"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words: list[str], told: str) -> None:
    with fake.serving(in_turns, paths="ab") as server:
        done = load(*words, f"url={server.url}", "duration_s=0.1", "pool_rows=10")
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert server.queries == []


def test_rows_that_do_not_fit_the_model_are_refused_before_any_is_sent(tmp_path: Path) -> None:
    data = prepared(tmp_path / "data")
    with fake.serving(in_turns, fake.INPUTS[:2]) as server:
        done = load(f"data={data}", f"url={server.url}")
    assert done.returncode == 2
    assert "a column 'tags'" in done.stderr
    assert server.queries == []


def test_a_server_that_is_not_there_or_none_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    done = load(f"url=http://127.0.0.1:{port}")
    assert done.returncode == 2
    assert f"the server at http://127.0.0.1:{port} cannot be reached (connection refused). " in done.stderr
    with fake.serving(in_turns, [{"no": "name"}]) as server:
        done = load(f"url={server.url}")
    assert done.returncode == 2
    assert "does not answer as the Open Inference Protocol says" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_prints_what_it_has(number: int) -> None:
    command = [sys.executable, "-m", "tightrec.serving", "load", "rate=100", "duration_s=300"]
    with fake.serving(in_turns) as server:
        process = subprocess.Popen(
            [*command, f"url={server.url}", "pool_rows=100"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            while len(server.queries) < 20:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err == ""
    assert "latency, ms" in out
    assert "interrupted; " in out.splitlines()[-1]
