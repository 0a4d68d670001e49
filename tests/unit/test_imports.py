"""The import rules of the layout, each shown to catch a planted violation and to hold on the real tree."""

import ast
import importlib.util
import tomllib
from collections.abc import Callable
from pathlib import Path

import guards
import pytest

EVERYWHERE = (*guards.PACKAGES, "examples", "benchmarks", "tests")
SHIPPED = (*guards.PACKAGES, "examples", "benchmarks")


def violations(guard: Callable[[str, str], list[str]], folders: tuple[str, ...]) -> list[str]:
    return [line for path, source in guards.sources(*folders) for line in guard(path, source)]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/a.py", "from tightrec.compression import frame"),
        ("compression/a.py", "import tightrec.sharding.plan"),
        ("sharding/a.py", "def f():\n    from tightrec.formats.settings import from_mapping"),
        ("models/a.py", "from tightrec import sharding"),
        ("models/a.py", "from ..trainer import settings"),
        ("trainer/a.py", "import tightrec.snapshot"),
        ("trainer/data/a.py", "import importlib\nimportlib.import_module('tightrec.serving.caching.cache')"),
        ("snapshot/a.py", "from tightrec.trainer.loop import run"),
        ("snapshot/a.py", "from tightrec.serving import server"),
        ("serving/a.py", "from tightrec.trainer import loop"),
        ("examples/a.py", "from tightrec.trainer import loop"),
    ],
)
def test_an_import_against_the_direction_is_caught(path: str, source: str) -> None:
    assert len(guards.wrong_way(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("compression/a.py", "from tightrec.kernels import schema"),
        ("sharding/a.py", "from tightrec.compression.codec import encode"),
        ("trainer/report/a.py", "from ..settings import from_mapping\nfrom tightrec.models import dlrm"),
        ("serving/a.py", "from tightrec.snapshot import load"),
        ("benchmarks/a.py", "from tightrec.serving import server"),
    ],
)
def test_an_import_along_the_direction_is_let_through(path: str, source: str) -> None:
    assert guards.wrong_way(path, source) == []


def test_imports_go_one_way() -> None:
    assert violations(guards.wrong_way, SHIPPED) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/a.py", "import torchrec"),
        ("kernels/a.py", "from torch import distributed"),
        ("compression/a.py", "from torchrec.sparse import jagged_tensor"),
        ("compression/a.py", "import hydra"),
        ("models/a.py", "import torch.distributed as dist"),
        ("models/a.py", "from torchrec.distributed.model_parallel import DistributedModelParallel"),
        ("trainer/loop.py", "from omegaconf import DictConfig"),
        ("snapshot/load.py", "from hydra import compose"),
    ],
)
def test_a_library_that_a_folder_must_not_know_is_caught(path: str, source: str) -> None:
    assert len(guards.foreign(path, source)) == 1


def test_folders_know_only_their_libraries() -> None:
    assert guards.foreign("trainer/config.py", "import hydra") == []
    assert violations(guards.foreign, SHIPPED) == []


@pytest.mark.parametrize("folder", guards.PACKAGES)
def test_a_bare_import_is_caught_and_banned_by_ruff(folder: str) -> None:
    assert len(guards.bare("tests/unit/a.py", f"import {folder}")) == 1
    assert len(guards.bare("trainer/a.py", f"from {folder}.x import y")) == 1
    assert guards.bare("trainer/a.py", f"from tightrec.{folder}.x import {folder}") == []
    config = tomllib.loads((guards.ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert folder in config["flake8-tidy-imports"]["banned-api"]
    assert "TID" in config["select"]


def test_nothing_is_imported_by_its_bare_name() -> None:
    assert violations(guards.bare, EVERYWHERE) == []


@pytest.fixture(scope="module")
def private() -> set[str]:
    """Underscored names that torchrec defines, read from its files without importing it."""
    spec = importlib.util.find_spec("torchrec")
    assert spec is not None
    assert spec.origin is not None
    files = [path for path in Path(spec.origin).parent.rglob("*.py") if "test" not in path.as_posix()]
    return set().union(*(guards.names_defined(path.read_text()) for path in files))


@pytest.mark.parametrize(
    "source",
    [
        "from torchrec.distributed.embeddingbag import _create_mean_pooling_divisor",
        "import torchrec.distributed._private",
        "def f(module):\n    return module._output_dists[0]",
        "def f(module, leaf):\n    module._output_dists = leaf",
        "def f(module):\n    return getattr(module, '_output_dists')",
        "class C(Base):\n    def f(self):\n        return self._output_dists",
    ],
)
def test_a_private_name_of_torchrec_is_caught(source: str, private: set[str]) -> None:
    own = guards.names_defined(source)
    assert len(guards.private_torchrec("sharding/a.py", source, private, own)) == 1
    assert guards.private_torchrec("sharding/compat.py", source, private, own) == []


def test_a_private_name_of_ours_is_let_through(private: set[str]) -> None:
    source = (
        "class C:\n    def __init__(self):\n        self._output_dists = []\n        len(self._output_dists)"
    )
    own = guards.names_defined(source)
    assert own == {"_output_dists"}
    assert guards.private_torchrec("sharding/a.py", source, private, own) == []


def test_private_names_of_torchrec_stand_in_one_file(private: set[str]) -> None:
    found = []
    for path, source in guards.sources(*SHIPPED):
        found += guards.private_torchrec(path, source, private, guards.names_defined(source))
    assert found == []


def test_every_module_has_a_docstring() -> None:
    assert ast.get_docstring(ast.parse("x = 1")) is None
    bare = [path for path, source in guards.sources(*EVERYWHERE) if not ast.get_docstring(ast.parse(source))]
    assert bare == []
