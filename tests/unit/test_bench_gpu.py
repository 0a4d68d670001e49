"""benchmarks/gpu.py goes through on a machine without a GPU, installed or not, and says what it needs."""

import json
import subprocess
import sys
from pathlib import Path

import guards
import torch

SCRIPT = guards.ROOT / "benchmarks" / "gpu.py"
UNINSTALL = (
    "import runpy, sys\n"
    "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
    "sys.path[:] = [place for place in sys.path if 'editable' not in place]\n"
    "try:\n"
    "    import tightrec.kernels\n"
    "    raise SystemExit('still installed')\n"
    "except ModuleNotFoundError:\n"
    "    sys.modules.pop('tightrec', None)\n"
    "sys.argv = sys.argv[1:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd="/", capture_output=True, text=True, timeout=200)


def test_the_dry_run_writes_both_results_without_an_installation(tmp_path: Path) -> None:
    ran = run("-c", UNINSTALL, str(SCRIPT), "--dry-run", "--out", str(tmp_path / "out"))
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert result["failed"] == {}
    assert result["machine"]["torch"] == torch.__version__
    steps = [(row["shape"]["rows"], row["codec"], row["step"]) for row in result["rows"]]
    expected = [(rows, "device copy", "copy") for rows in (40, 3)]
    expected += [
        (r, c, s) for r in (40, 3) for c in ("packed", "dedup", "entropy") for s in ("encode", "decode")
    ]
    assert set(expected) <= set(steps)
    for row in result["rows"]:
        assert 0 < row["us"]["min"] <= row["us"]["median"] <= row["us"]["max"]
        if row["shape"]["rows"] == 40 and row["codec"] in ("packed", "dedup"):
            assert row["ratio"] > 4
            assert row["block_modes"] == {row["codec"]: 2}
    text = (tmp_path / "out" / "gpu.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == len(result["rows"]) + 2
    assert {line.count("|") for line in table} == {9}
    assert "/gpu.py --dry-run" in text
    assert ran.stdout.strip() == text.strip()


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    hidden = "import runpy, sys, torch\ntorch.cuda.is_available = lambda: False\nsys.argv = sys.argv[1:]\n"
    hidden += "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    ran = run("-c", hidden, str(SCRIPT), "--out", str(tmp_path / "out"))
    assert ran.returncode == 1
    assert ran.stderr.startswith("no NVIDIA GPU was found")
    assert not (tmp_path / "out").exists()


def test_its_parts_name_tests_that_exist() -> None:
    text = SCRIPT.read_text()
    assert "tests/cuda/test_codec_cuda.py" in text
    tests = (guards.ROOT / "tests/cuda/test_codec_cuda.py").read_text()
    for word in ("equal_the_reference", "damaged", "wild"):
        assert word in text
        assert f"{word}" in tests
