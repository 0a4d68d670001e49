"""What loading needs: no other packages, little more memory than the operator's."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from snapshot_made import layer_shapes, make_snapshot

from tightrec.models.config import RepresentationConfig
from tightrec.snapshot import load
from tightrec.snapshot.precision import Plan
from tightrec.snapshot.store import read_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot with tables and layers of int8."""
    return make_snapshot(tmp_path_factory.mktemp("snapshot") / "a")


ALONE = """
import sys

BLOCKED = ("torchrec", "hydra", "omegaconf", "pydantic", "pyarrow", "matplotlib", "numba", "yaml", "jinja2",
           "rich", "torchmetrics", "tightrec.trainer", "tightrec.sharding", "tightrec.compression",
           "tightrec.kernels", "tightrec.formats.settings")

class Wall:
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in BLOCKED):
            raise ImportError(f"{name} is behind the wall")

sys.meta_path.insert(0, Wall())
try:
    import torchrec
except ImportError as error:
    assert "behind the wall" in str(error)
else:
    raise AssertionError("the wall does not hold")

import tightrec.snapshot
assert "torch" not in sys.modules
import torch
from tightrec.snapshot import load
import tightrec.snapshot.monitor
snapshot = load(sys.argv[1])
assert not torch.cuda.is_initialized()
print(snapshot.predict([[1, 2, 3]], {"f0": [1], "f1": [2], "f2": [3]}).tolist())
assert not any(name.split(".")[0] == "torchrec" for name in sys.modules)
"""


@pytest.mark.parametrize("kind", ["table", "dhe", "hybrid"])
def test_loading_needs_torch_fbgemm_numpy_and_safetensors_only(tmp_path: Path, kind: Any) -> None:
    small = RepresentationConfig(kind=kind, hashes=8, decoder=(4,))
    folder = make_snapshot(tmp_path / "a", representation=small)
    words = [sys.executable, "-c", ALONE, str(folder)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found = load(folder).predict([[1, 2, 3]], {"f0": [1], "f1": [2], "f2": [3]}).tolist()
    assert run.stdout.strip() == str(found)
    assert run.stderr == ""


MEMORY = """
import sys
from tightrec.snapshot import load
import torch, fbgemm_gpu

def rss(which):
    for line in open("/proc/self/status"):
        if line.startswith(which):
            return int(line.split()[1]) * 1024

load(sys.argv[1])
before = rss("VmRSS")
snapshot = load(sys.argv[2], check=sys.argv[3] == "check")
print(rss("VmRSS") - before, rss("VmHWM") - before, snapshot.scorer.lookup.size_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("check", ["check", "no check"])
def test_loading_needs_the_operators_memory_and_one_tables_file(
    check: str, folder: Path, tmp_path: Path
) -> None:
    tables, slack = 6, 12 << 20
    features = [f"f{i}" for i in range(tables)]
    shapes = layer_shapes(read_manifest(folder).config, 3, tables)
    plan = Plan(tables={f"t_{f}": "int8" for f in features}, layers=dict.fromkeys(shapes, "int8"))
    large = make_snapshot(tmp_path / "large", cardinalities=[120_000] * tables, dim=64, plan=plan)
    table_bytes = (large / "tables" / "t_f0.safetensors").stat().st_size
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder), str(large), check],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    kept, most, operator = map(int, run.stdout.split())
    assert operator >= tables * 120_000 * 64
    assert kept < operator + slack
    assert most < operator + table_bytes + slack


def test_reading_the_package_costs_nothing() -> None:
    code = "import sys, tightrec.snapshot.manifest; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "False", run.stderr
    import tightrec.snapshot

    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        tightrec.snapshot.lode  # noqa: B018
