"""The table of versions that belong together, what is said when they do not, and the pinned lists."""

import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path

import guards
import pytest
from packaging.requirements import Requirement

from tightrec.trainer.versions import (
    NEEDED,
    PYTHON_BELOW,
    PYTHON_FROM,
    STACKS,
    TORCHMETRICS,
    Environment,
    check_versions,
    installed,
    matches,
    normalised,
    require_versions,
    stack_of,
)

REQUIREMENTS = guards.ROOT / "requirements"
CPU = dict.fromkeys(NEEDED, "1.0") | {
    "torch": "2.13.0+cpu",
    "torchrec": "1.8.0",
    "torchmetrics": "1.0.3",
    "fbgemm-gpu-cpu": "1.8.0",
}
CUDA = {k: v for k, v in CPU.items() if k != "fbgemm-gpu-cpu"} | {
    "torch": "2.13.0+cu130",
    "fbgemm-gpu": "1.8.0",
}


def environment(
    packages: Mapping[str, str | None], *, python: tuple[int, int] = (3, 11), driver: bool = False
) -> Environment:
    kept = {name: version for name, version in packages.items() if version is not None}
    return Environment(packages=kept, python=python, driver=driver)


def test_the_table_has_the_rows_known_to_work() -> None:
    rows = {(row.torch, row.torchrec, row.fbgemm) for row in STACKS}
    assert {("2.11.*", "1.6.*", "1.6.0"), ("2.13.*", "1.8.0", "1.8.0")} <= rows
    assert TORCHMETRICS == "1.0.3"
    assert (PYTHON_FROM, PYTHON_BELOW) == ((3, 11), (3, 14))


@pytest.mark.parametrize(
    "found",
    [
        environment(CPU),
        environment(CPU, driver=True),
        environment(CPU | {"torch": "2.13.1"}, python=(3, 13)),
        environment(CPU | {"torch": "2.11.0+cpu", "torchrec": "1.6.1", "fbgemm-gpu-cpu": "1.6.0"}),
        environment(CUDA, driver=True),
    ],
)
def test_what_belongs_together_passes(found: Environment) -> None:
    assert check_versions(found) == []
    require_versions(found)


COMPANIONS = "pip install --no-deps 'torchrec==1.8.0' 'fbgemm-gpu-cpu==1.8.0'"
OLDER = "pip install --no-deps 'torchrec==1.6.*' 'fbgemm-gpu-cpu==1.6.0'"
CASES = {
    "torch missing": (environment(CPU | {"torch": None}), ["torch is not"], "pip install 'torch==2.13.*'"),
    "torchrec missing": (environment(CPU | {"torchrec": None}), ["torchrec is not installed"], COMPANIONS),
    "fbgemm missing": (environment(CPU | {"fbgemm-gpu-cpu": None}), ["fbgemm-gpu-cpu"], COMPANIONS),
    "fbgemm missing on CUDA": (
        environment(CUDA | {"fbgemm-gpu": None}, driver=True),
        ["this machine wants fbgemm-gpu)"],
        "pip install --no-deps 'torchrec==1.8.0' 'fbgemm-gpu==1.8.0'",
    ),
    "rich missing": (environment(CPU | {"rich": None}), ["rich is not"], "pip install --no-deps rich"),
    "torch of another row": (
        environment(CPU | {"torch": "2.11.0+cpu"}),
        ["torchrec 1.8.0 does not belong to torch 2.11.0+cpu", "fbgemm-gpu-cpu 1.8.0 does not belong"],
        OLDER,
    ),
    "torch of no row": (environment(CPU | {"torch": "2.12.0"}), ["torch 2.12.0 belongs to no"], COMPANIONS),
    "torchrec of another row": (
        environment(CPU | {"torchrec": "1.6.1"}),
        ["torchrec 1.6.1 does"],
        COMPANIONS,
    ),
    "fbgemm of another row": (
        environment(CPU | {"fbgemm-gpu-cpu": "1.6.0"}),
        ["fbgemm-gpu-cpu 1.6.0"],
        COMPANIONS,
    ),
    "both fbgemms": (
        environment(CPU | {"fbgemm-gpu": "1.8.0"}),
        ["both installed"],
        "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu",
    ),
    "CUDA fbgemm without a driver": (
        environment(CUDA),
        ["no NVIDIA driver answers"],
        "pip uninstall -y fbgemm-gpu",
    ),
    "CUDA fbgemm with a CPU torch": (
        environment(CUDA | {"torch": "2.13.0+cpu"}, driver=True),
        ["torch is a CPU build"],
        COMPANIONS,
    ),
    "torchmetrics": (
        environment(CPU | {"torchmetrics": "1.4.0"}),
        ["torchmetrics 1.4.0 breaks"],
        "pip install --no-deps torchmetrics==1.0.3",
    ),
    "old Python": (environment(CPU, python=(3, 10)), ["Python 3.10", "3.11 to 3.13"], "make distclean setup"),
    "new Python": (environment(CPU, python=(3, 14)), ["Python 3.14", "3.11 to 3.13"], "make distclean setup"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_off_is_told_with_the_command_that_helps(case: str) -> None:
    found, words, command = CASES[case]
    problems = check_versions(found)
    assert problems
    assert len({problem.message for problem in problems}) == len(problems)
    with pytest.raises(ValueError, match="do not belong together") as error:
        require_versions(found)
    text = str(error.value)
    assert [word for word in words if word not in text] == []
    assert f"\n  {command}" in text
    assert "pip install torchrec" not in text.replace("(`pip install torchrec` without", ""), (
        "never with its deps"
    )


def test_the_commands_lead_to_a_stack_that_passes() -> None:
    """Following the commands of a torch of no row, word by word, ends without a problem."""
    packages = dict(CPU) | {"torch": "2.12.0", "torchrec": "1.7.0", "fbgemm-gpu-cpu": "1.7.0"}
    for problem in check_versions(environment(packages)):
        for command in problem.commands:
            pins = [word.strip("'").split("==") for word in command.split() if "==" in word]
            packages |= {name: version.replace("*", "0") for name, version in pins}
    assert check_versions(environment(packages)) == []


def test_patterns_compare_whole_components() -> None:
    assert matches("1.6.1", "1.6.*")
    assert matches("2.13.0+cpu", "2.13.*")
    assert not matches("2.130.0", "2.13.*")
    assert not matches("1.8.0.dev1", "1.8.0")


def test_this_environment_passes_without_importing_the_packages() -> None:
    found = installed()
    assert found.packages["torch"].startswith("2.")
    assert found.python == sys.version_info[:2]
    assert stack_of(found.packages) in STACKS
    assert check_versions(found) == []


# The pinned lists.


def pins(*names: str) -> dict[str, str]:
    """Version by package of requirements files, following ``-r``; fails on a line that pins nothing."""
    found: dict[str, str] = {}
    for name in names:
        for line in (REQUIREMENTS / name).read_text().splitlines():
            line = line.partition("#")[0].strip()
            if line.startswith("-r "):
                found |= pins(line.removeprefix("-r "))
            elif line:
                package, equals, version = line.partition("==")
                assert equals, f"{name}: {line} is not pinned with =="
                assert "*" not in version, f"{name}: {line} is not pinned exactly"
                assert package not in found, f"{name}: {package} is pinned twice"
                found[package] = version
    return found


def incomplete(listed: Mapping[str, str], requires: Mapping[str, list[str]]) -> list[str]:
    """Requirements of the listed packages that the list lacks or pins at a version they do not accept."""
    lines = []
    for package, words in requires.items():
        for requirement in map(Requirement, words):
            name = normalised(requirement.name)
            needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if not needed or (package, name) == ("torchrec", "fbgemm-gpu"):
                continue
            if name not in listed:
                lines.append(f"{package} requires {name}, which is not listed")
            elif not requirement.specifier.contains(listed[name], prereleases=True):
                lines.append(f"{package} requires {requirement}, but {listed[name]} is pinned")
    return lines


def test_an_incomplete_list_is_caught() -> None:
    listed = {"a": "1", "b": "2"}
    assert incomplete(listed, {"a": ["b>=2", "C[x]>1"]}) == ["a requires c, which is not listed"]
    assert incomplete(listed, {"a": ["b>2"]}) == ["a requires b>2, but 2 is pinned"]
    assert incomplete(listed, {"a": ["c; extra == 'all'", "c; python_version < '3'"]}) == []
    assert incomplete(listed, {"torchrec": ["fbgemm-gpu"]}) == []


def test_the_lists_agree_with_the_table_and_with_each_other() -> None:
    cpu, cuda = pins("torch.txt", "cpu.txt"), pins("torch.txt", "cuda13.txt")
    for stack, fbgemm, driver in ((cpu, "fbgemm-gpu-cpu", False), (cuda, "fbgemm-gpu", True)):
        assert stack_of(stack) == STACKS[-1]
        assert stack[fbgemm] == STACKS[-1].fbgemm
        assert check_versions(environment(stack, driver=driver)) == []
    shared = {name for name in cpu if name in cuda}
    assert {name: cpu[name] for name in shared} == {name: cuda[name] for name in shared}
    assert set(cpu) - shared == {"fbgemm-gpu-cpu"}
    assert set(cuda) - shared == {"fbgemm-gpu", "cupy-cuda13x", "cuda-pathfinder"}
    assert pins("cpu.txt", "dev.txt")


def test_the_list_is_complete_and_is_what_is_installed() -> None:
    here = installed().packages
    stack = "cuda13.txt" if "fbgemm-gpu" in here else "cpu.txt"
    listed = pins("torch.txt", stack, "dev.txt")
    assert {n: v for n, v in listed.items() if here.get(n, "absent").partition("+")[0] != v} == {}
    # A CUDA torch's own libraries come with it, unlisted: torch is installed with its dependencies.
    own = {"torch"} if stack == "cuda13.txt" or not here["torch"].endswith("+cpu") else set()
    requires = {name: importlib.metadata.requires(name) or [] for name in listed if name not in own}
    assert incomplete(listed, requires) == []


def test_everything_that_the_packages_import_is_listed() -> None:
    listed = set(pins("torch.txt", "cpu.txt")) | set(pins("cuda13.txt"))
    provided = importlib.metadata.packages_distributions()
    lines = []
    for path, source in guards.sources(*guards.PACKAGES):
        for line, name in guards.imports(path, source):
            top = name.split(".")[0]
            # cuda.bindings comes with a CUDA build of torch; the kernels also compile without it.
            if top in sys.stdlib_module_names or top in ("tightrec", "cupy", "cuda"):
                continue
            distributions = {normalised(d) for d in provided.get(top, [top])} | {normalised(top)}
            if not distributions & listed:
                lines.append(f"{path}:{line}: {top} stands in no requirements file")
    assert lines == []


def test_the_makefile_accepts_the_same_pythons() -> None:
    makefile = (Path(guards.ROOT) / "Makefile").read_text()
    assert f"{PYTHON_FROM} <= sys.version_info[:2] < {PYTHON_BELOW}" in makefile
