"""The serving benchmarks as a user starts them, on tiny snapshots: that they run, not how fast."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from tightrec.formats.schema import Schema, SparseColumn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit"))

import serving_made  # noqa: E402 - its folder is on the path from here on

ROWS = 2_000


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A file of two paths, and rows for them."""
    folder = tmp_path_factory.mktemp("served")
    paths = serving_made.write_two_paths(folder)
    data = folder / "data"
    (data / "test").mkdir(parents=True)
    generator = np.random.default_rng(0)
    columns = {"click": pa.array(np.zeros(ROWS, np.float32))}
    columns |= {f"d{i}": pa.array(generator.random(ROWS).astype(np.float32)) for i in range(3)}
    sparse = []
    for i, cardinality in enumerate(serving_made.CARDINALITIES):
        lists, ids = i == 2, generator.integers(0, cardinality, ROWS)
        columns[f"f{i}"] = pa.array([[one] for one in ids] if lists else ids)
        sparse.append(SparseColumn(name=f"f{i}", cardinality=cardinality, multi_hot=lists))
    pq.write_table(pa.table(columns), data / "test" / "part-00000.parquet")
    names = tuple(f"d{i}" for i in range(3))
    Schema(dense=names, sparse=tuple(sparse), label="click", rows={"test": ROWS}, source="a test").save(data)
    return [f"paths={paths}", f"data={data}"]


def bench(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / f"serving_{name}.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def test_throughput_compares_every_setting(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    quick = ["targets_ms=200", "multiples=1", "seeds=1", "run_s=0.3", "warmup_s=0.1", "rate=60"]
    done = bench("throughput", *words, *quick, "baseline=best", f"out={out}")
    # Whether a goal is met depends on the machine; that it was judged does not.
    assert ": MISSED" in done.stdout if done.returncode == 1 else done.returncode == 0, done.stderr
    runs = json.loads(out.read_text())["runs"]
    settings = ["best", "quick", "best plain", "fastest", "random", "greedy", "multi"]
    assert [run["setting"] for run in runs] == settings
    assert all(run["summary"]["failed"] == 0 for run in runs)
    assert len({run["summary"]["queries"] for run in runs}) == 1
    assert {name for run in runs[:1] for name in run["summary"]["shares"]} <= {"best"}
    assert "at 200 ms and 1x: multi over best: " in done.stdout


def test_overload_judges_a_server_over_http(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    quick = ["minutes=0.1", "quiet_s=2", "rate=40", "target_ms=200", "factor=1.5"]
    done = bench("overload", *words, *quick, f"out={out}")
    report = json.loads(out.read_text())
    verdicts = {verdict["name"]: verdict for verdict in report["verdicts"]}
    assert list(verdicts) == ["answered", "memory", "recovery"]
    assert verdicts["answered"]["met"], done.stdout
    assert done.returncode == (0 if all(verdict["met"] for verdict in verdicts.values()) else 1)
    assert len(report["memory_bytes"]) >= 5
    assert min(sum(sizes.values()) for _, sizes in report["memory_bytes"]) > 1e7
    assert ", the server " in done.stdout and ", a child " in done.stdout


def test_a_benchmark_that_is_killed_leaves_no_server(words: list[str]) -> None:
    code = (
        "import sys, time; from serving_runs import Server\n"
        "with Server(sys.argv[1]) as server: print(server._process.pid, flush=True); time.sleep(240)"
    )
    command = [sys.executable, "-c", code, words[0]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "benchmarks")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        server = psutil.Process(int(process.stdout.readline()))
        process.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        server.wait(60)


def test_agreement_sets_the_simulator_beside_servers(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    quick = ["transport=http", "policies=multi", "multiples=0.3", "seeds=1", "run_s=0.5", "rate=60"]
    done = bench("agreement", *words, *quick, "target_ms=200", f"out={out}")
    assert ": MISSED" in done.stdout if done.returncode == 1 else done.returncode == 0, done.stderr
    runs = json.loads(out.read_text())["runs"]
    assert [run["policy"] for run in runs] == ["fixed:quick", "multi"]
    assert all(run[side]["in_target_rows_per_s"] > 0 for run in runs for side in ("predicted", "measured"))


@pytest.mark.parametrize("name", ["throughput", "overload", "agreement"])
def test_mistakes_end_with_a_sentence(words: list[str], name: str) -> None:
    done = bench(name, "paths=nowhere.json", words[1])
    assert done.returncode == 2
    assert done.stderr.startswith("There is no file nowhere.json.")
