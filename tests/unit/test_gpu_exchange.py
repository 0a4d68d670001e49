"""benchmarks/gpu_exchange.py measures what it says, on a CPU too, with no more than torch and numpy."""

import importlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import guards
import numpy as np
import pytest
import torch

from tightrec.trainer.data import synthetic

BARE = (
    "import sys\n"
    "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
    "sys.path[:] = [place for place in sys.path if 'editable' not in place]\n"
    "class Bare:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.split('.')[0] in ('torchrec', 'fbgemm_gpu', 'hydra', 'omegaconf', 'numba', 'pyarrow'):\n"
    "            raise ModuleNotFoundError(f'{name} is not on this machine')\n"
    "sys.meta_path.insert(0, Bare())\n"
)
SMALL = ["--device", "cpu", "--peers", "2", "--tables", "2", "--rows", "8", "--dims", "32", "--samples", "1"]


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The modules by name; benchmarks/ is no package."""
    sys.path.insert(0, str(guards.ROOT / "benchmarks"))
    yield lambda name: importlib.import_module(name)
    sys.path.remove(str(guards.ROOT / "benchmarks"))


@pytest.fixture
def batch(script: Any) -> Any:
    shape = script("gpu_measure").Shape(3, 2, 50, 4)
    return script("gpu_exchange_ways").Batch(shape, torch.device("cpu"))


def test_the_gpu_check_runs_it_where_there_is_little_more_than_torch(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BARE)
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ran = script("gpu").run_exchange(tmp_path / "out", dry=True)
    assert ran["status"] == 0, ran
    result = json.loads((tmp_path / "out" / "gpu_exchange.json").read_text())
    assert result["machine"]["device"] == "cpu"
    assert result["failed"] == {}
    rows = {(row["way"], row["direction"]): row for row in result["rows"]}
    ways = {"plain", "dedup", "dedup lossy packed", "int8", "mx4", "dedup int8", "dedup mx4"}
    assert set(rows) == {(way, direction) for way in ways for direction in ("forward", "backward")}
    assert {way for way, _ in rows if "missing" in rows[way, "forward"]} == {w for w in ways if w[-1] in "48"}
    assert rows["plain", "forward"]["sent_bytes"] == 4 * 2 * 2 * 8 * 32
    for direction, parts, peers in (("forward", {"expand"}, 1), ("backward", {"collect", "pack"}, 2)):
        lossy = rows["dedup lossy packed", direction]
        assert set(lossy["us"]) == {"encode", "sizes", "wire", "decode", "whole", "device"} | parts
        whole, device = (lossy["us"].pop(name)["median"] for name in ("whole", "device"))
        assert device == pytest.approx(whole - lossy["us"]["wire"]["median"])
        assert sum(part["median"] for part in lossy["us"].values()) == pytest.approx(whole)
        assert sum(lossy["waits"].values()) == 7 + peers
        assert 0.5 < lossy["error_over_bound"] <= 1
        assert lossy["ratio"] > 4
    text = (tmp_path / "out" / "gpu_exchange.md").read_text()
    assert "device cpu" in text
    assert text.count("| not there |") == 4 * 2 + 4
    assert "int8: ModuleNotFoundError: fbgemm_gpu is not on this machine" in text


def test_the_gpu_check_fails_with_the_exchange(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = script("gpu")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(gpu, "make_importable", lambda folder: None)
    monkeypatch.setattr(gpu, "measure", lambda *given: {"rows": [], "not measured": {}, "failed": {}})
    monkeypatch.setattr(gpu, "run_child", lambda *given: {"status": 1, "last_lines": ["no frames"]})
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 1
    assert "failed: exchange" in capsys.readouterr().err
    assert "- exchange: status 1, ['no frames']" in (tmp_path / "gpu.md").read_text()


def test_a_batch_sends_each_distinct_row_once_and_sums_its_gradients(batch: Any) -> None:
    rows = [*batch.distinct.split(batch.counts)]
    assert sum(batch.counts) < 3 * 2 * 50
    expanded = torch.cat([rows[f][batch.inverse[f]] for f in range(6)], 1)
    assert torch.equal(batch.expand(batch.distinct), expanded)
    summed = torch.full_like(batch.distinct, 7.0)
    batch.collect(summed)
    expected = [
        torch.zeros_like(rows[f]).index_add_(0, batch.inverse[f], batch.grads[:, 4 * f : 4 * f + 4])
        for f in range(6)
    ]
    torch.testing.assert_close(summed, torch.cat(expected))
    assert batch.cells[..., 1].tolist() == [batch.counts[:2], batch.counts[2:4], batch.counts[4:]]


def test_ids_are_those_of_the_synthetic_data(script: Any) -> None:
    cardinality, ways = synthetic.KAGGLE[2], script("gpu_exchange_ways")
    ranks = ways._zipf(np.random.default_rng(3), 1000, cardinality)
    uniform = np.random.default_rng(3).random(1000)
    exponent = synthetic.SyntheticConfig().exponent
    expected = synthetic._power_law(uniform, cardinality, exponent)
    assert ((ranks - 1) * synthetic._SCATTER % cardinality).tolist() == expected.tolist()


def test_on_a_gpu_events_are_read_after_all_passes_and_waits_are_torchs_own_warnings(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, told = script("gpu_exchange_measure"), []

    class Event:
        now = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.now += 0.25
            self.at = Event.now

        def elapsed_time(self, end: "Event") -> float:
            assert told == ["synchronized"]
            return end.at - self.at

    def run() -> None:
        for words in ("called a synchronizing CUDA operation", "something else"):
            warnings.warn(words, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("synchronized"))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", told.append)
    gpu = torch.device("cuda")
    timeline = measure.Timeline(SimpleNamespace(device=gpu, flush=torch.ones(4)))
    for _ in range(2):
        timeline.start()
        timeline.mark("encode")
        timeline.mark("wire")
    assert timeline.times() == {
        "encode": [250.0] * 2,
        "wire": [250.0] * 2,
        "whole": [500.0] * 2,
        "device": [250.0] * 2,
    }
    assert measure._synchronising_calls(lambda: (run(), run()), gpu) == 2
    assert told[1:] == ["warn", "default"]


def row(way: str, sent: int, device: float) -> dict[str, Any]:
    times = {"whole": {"median": device + 2.0}, "wire": {"median": 2.0}, "device": {"median": device}}
    shape = {"peers": 4, "tables": 26, "rows": 8, "dim": 4}
    return {"shape": shape, "way": way, "plain_bytes": 1_000_000, "sent_bytes": sent, "us": times}


def test_a_link_is_predicted_from_the_device_without_its_copy(script: Any) -> None:
    predict = script("gpu_exchange").predict
    rows = [row("lossy", 100_000, 10.0), row("lossy", 50_000, 20.0)]
    assert predict(rows, 12.5, 0.626) == {
        "plain_us": 160.0,
        "us": 42.0,
        "exchange": round(160 / 42, 3),
        "step": round(1 / (0.374 + 0.626 * 42 / 160), 3),
    }
    assert predict([row("plain", 1_000_000, 7.0)] * 2, 450.0, 0.5)["exchange"] == 1.0
    assert predict(rows[:1], 12.5, 0.626) is None
    assert predict([rows[0], {"way": "lossy", "missing": "gone"}], 12.5, 0.626) is None


def test_a_value_beyond_its_bound_is_a_failure_that_names_the_way(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = script("gpu_exchange_ways")
    honest = ways.decode

    def off(*given: Any, **more: Any) -> Any:
        return honest(*given, **more).add_(0.5)

    monkeypatch.setattr(ways, "decode", off)
    monkeypatch.setattr(script("gpu"), "make_importable", lambda folder: None)
    words = [*SMALL, "--backend", "reference", "--modes", "packed", "--out", str(tmp_path)]
    assert script("gpu_exchange").main(words) == 1
    assert "dedup lossy packed forward" in capsys.readouterr().err
    result = json.loads((tmp_path / "gpu_exchange.json").read_text())
    assert [reason.split(" is ")[0] for reason in result["failed"].values()] == [
        "RuntimeError: the worst error"
    ] * 2
    assert "dedup" in {found["way"] for found in result["rows"]}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--forward", "range:-1"], "--forward"),
        (["--backward", "lossless"], "--backward lossless has no error to measure"),
        (["--modes", "zip"], "unknown mode 'zip'"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    monkeypatch.setattr(script("gpu"), "make_importable", lambda folder: None)
    assert script("gpu_exchange").main([*SMALL, *words]) == 2
    assert sentence in capsys.readouterr().err


def test_without_a_gpu_it_says_so(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script("gpu_exchange").main([]) == 1
    assert capsys.readouterr().err.startswith("no NVIDIA GPU was found")
