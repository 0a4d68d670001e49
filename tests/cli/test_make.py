"""The Makefile, run in small copies of the project with stub interpreters: nothing is downloaded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "compression", "sharding", "models", "trainer", "snapshot", "serving", "conf")

# Stands in for an interpreter: writes down every call, makes a venv of links to itself, and lets the calls
# fail whose words contain $FAIL.
STUB_PYTHON = """#!/usr/bin/env bash
fail() { [[ -n "${FAIL:-}" && "$*" == *"$FAIL"* ]]; }
case "$1 $2" in
  "-c "*) exit "${REFUSE:-0}" ;;
  "-m venv") fail "$@" || { mkdir -p .venv/bin; cp "$0" .venv/bin/python; } ;;
  "-m pip")
    case "$*" in
      *--version*) exit 0 ;;
      *"show -q fbgemm-gpu-cpu"*) exit "${CPU_FBGEMM:-1}" ;;
      *"show -q fbgemm-gpu"*) exit "${CUDA_FBGEMM:-1}" ;;
    esac ;;
esac
echo "$*" >> calls
! fail "$@"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the Makefile, the requirements, pyproject.toml and a stub Python, outside any venv."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    executable(folder / "stub-python", STUB_PYTHON)
    return folder


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def make(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *words], cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=120
    )


def setup(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return make(folder, "setup", "PYTHON=./stub-python", *words, **environment)


def calls(folder: Path) -> list[str]:
    """What the stub interpreter was asked since the last look, shortened to the words that matter."""
    path = folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line.replace("-m pip --disable-pip-version-check ", "pip ") for line in lines]


def ready(folder: Path) -> None:
    """Make ``folder`` look set up, with this interpreter's tools as its .venv."""
    for name in ("python", "ruff", "mypy"):
        tool = Path(sys.executable) if name == "python" else Path(sys.executable).parent / name
        if not tool.exists():
            pytest.skip(f"{name} is not installed beside this Python")
        executable(folder / ".venv" / "bin" / name, f'#!/bin/sh\nexec "{tool}" "$@"\n')
    for stack in ("cpu", "cuda13"):
        (folder / ".venv" / f".ready-{stack}").touch()


def test_help_is_the_default_and_names_every_target(project: Path) -> None:
    listed = make(project).stdout
    assert listed == make(project, "help").stdout
    targets = {line.split()[1] for line in listed.splitlines()}
    assert {"help", "setup", "train", "test", "check", "bench", "doctor", "clean"} <= targets
    (project / "Makefile").open("a").write("\nplanted: ## A planted target\n\ttrue\n")
    assert "make planted    A planted target" in make(project, "help").stdout


def test_setup_installs_torch_first_then_the_list_without_dependencies(project: Path) -> None:
    ran = setup(project, "STACK=cpu")
    assert ran.returncode == 0, ran.stderr
    assert calls(project) == [
        "-m venv --clear .venv",
        "pip install -q -r requirements/torch.txt -c requirements/common.txt",
        "pip install -q --no-deps -r requirements/cpu.txt -r requirements/dev.txt",
        "pip install -q --no-deps --no-build-isolation -e .",
    ]
    assert setup(project, "STACK=cpu").returncode == 0
    assert calls(project) == [], "a finished setup is not repeated"


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements/common.txt"])
def test_setup_follows_changed_requirements(project: Path, name: str) -> None:
    setup(project, "STACK=cpu")
    calls(project)
    later = (project / ".venv" / ".ready-cpu").stat().st_mtime + 10
    os.utime(project / name, (later, later))
    setup(project, "STACK=cpu")
    assert [call.split()[0] for call in calls(project)] == ["pip"] * 3, (
        "the environment stays, pip runs again"
    )


@pytest.mark.parametrize("broken", ["venv", "torch.txt", "cpu.txt", "-e ."])
def test_a_broken_off_setup_says_what_to_do_and_starts_again(project: Path, broken: str) -> None:
    ran = setup(project, "STACK=cpu", FAIL=broken)
    assert ran.returncode != 0
    assert "make setup: " in ran.stderr
    assert not list(project.glob(".venv/.ready-*"))
    calls(project)
    assert make(project, "test", "PYTHON=./stub-python", "STACK=cpu").returncode == 0
    assert calls(project)[0] == "-m venv --clear .venv"


def test_setup_changes_stacks_without_leaving_the_other_fbgemm(project: Path) -> None:
    setup(project, "STACK=cpu")
    calls(project)
    assert setup(project, "STACK=cuda13", CPU_FBGEMM="0").returncode == 0
    asked = calls(project)
    assert asked[0] == "pip uninstall -q -y fbgemm-gpu fbgemm-gpu-cpu"
    assert "pip install -q --no-deps -r requirements/cuda13.txt -r requirements/dev.txt" in asked
    setup(project, "STACK=cpu", CUDA_FBGEMM="0")
    assert calls(project)[0] == "pip uninstall -q -y fbgemm-gpu fbgemm-gpu-cpu"


def test_the_stack_follows_the_driver(project: Path, tmp_path: Path) -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("an NVIDIA driver answers on this machine, stub or not")
    for status, stack in ((9, "cpu"), (0, "cuda13")):
        executable(tmp_path / "bin" / "nvidia-smi", f"#!/bin/sh\nexit {status}\n")
        assert setup(project, PATH=f"{tmp_path}/bin:{os.environ['PATH']}").returncode == 0
        assert f"requirements/{stack}.txt" in " ".join(calls(project))


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["PYTHON=./stub-python", "STACK=rocm"], {}, "STACK is 'rocm'. Choose STACK=cpu or STACK=cuda13."),
        (["PYTHON=./stub-python"], {"REFUSE": "1"}, "no Python 3.11 to 3.13"),
        (["PYTHON=./no-such-python"], {}, "apt install python3.11 python3.11-venv"),
    ],
)
def test_setup_refuses_in_words(
    project: Path, words: list[str], environment: dict[str, str], said: str
) -> None:
    ran = make(project, "setup", *words, **environment)
    assert ran.returncode != 0
    assert said in ran.stderr
    assert not (project / ".venv").exists()


def test_a_python_that_is_too_old_is_passed_over(project: Path, tmp_path: Path) -> None:
    for version in ("3.13", "3.12", "3.11"):
        executable(tmp_path / "bin" / f"python{version}", "#!/bin/sh\nexit 1\n")
    executable(tmp_path / "bin" / "python3", (project / "stub-python").read_text())
    ran = make(project, "setup", "STACK=cpu", PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert ran.returncode == 0, ran.stderr
    assert calls(project)[0] == "-m venv --clear .venv"


def test_train_starts_torchrun_with_its_words(project: Path) -> None:
    ready(project)
    executable(
        project / ".venv" / "bin" / "torchrun", '#!/bin/sh\necho "threads $OMP_NUM_THREADS"\necho "$@"\n'
    )
    cores = os.sysconf("SC_NPROCESSORS_ONLN")
    ran = make(project, "train", "ARGS=data=movielens codec=int8")
    assert ran.stdout.splitlines()[-2:] == [
        f"threads {max(1, cores // 2)}",
        "--standalone --nproc-per-node 2 -m tightrec.trainer data=movielens codec=int8",
    ]
    lines = make(project, "train", f"NPROC={2 * cores}").stdout.splitlines()
    assert lines[-2:] == ["threads 1", f"--standalone --nproc-per-node {2 * cores} -m tightrec.trainer"]


def test_test_passes_words_to_pytest_and_ends_with_its_closing_line(project: Path) -> None:
    ready(project)
    (project / "tests").mkdir()
    (project / "tests" / "test_a.py").write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    ran = make(project, "test", "ARGS=-k good")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 passed, 1 deselected" in ran.stdout.splitlines()[-1]
    ran = make(project, "test")
    assert ran.returncode != 0
    assert "1 failed, 1 passed" in ran.stdout.splitlines()[-1]


def test_check_fails_on_planted_errors(project: Path) -> None:
    ready(project)
    for folder in FOLDERS:
        (project / folder).mkdir()
        if folder != "compression":
            (project / folder / "__init__.py").write_text('"""A package."""\n')
    good = '"""A module."""\n\n\ndef size_bytes(n: int) -> int:\n    """Twice n."""\n    return 2 * n\n'
    user = '"""A module."""\n\nfrom tightrec.compression.a import size_bytes\n\ntotal: int = size_bytes(1)\n'
    (project / "compression" / "a.py").write_text(good)
    (project / "sharding" / "b.py").write_text(user)
    ran = make(project, "check")
    assert ran.returncode == 0, ran.stdout + ran.stderr

    (project / "sharding" / "b.py").write_text(user.replace("size_bytes(1)", 'size_bytes("1")'))
    ran = make(project, "check")
    assert ran.returncode != 0, "a type error across two packages"
    assert "\nsharding/b.py:5: error: Argument 1" in ran.stdout, "told by the path in the project"

    for planted in (user.replace("from", "import compression\nfrom"), user.replace(": int = ", ": int  =  ")):
        (project / "sharding" / "b.py").write_text(planted)
        assert make(project, "check").returncode != 0


def test_bench_lists_scripts_and_runs_one(project: Path) -> None:
    ready(project)
    (project / "benchmarks").mkdir()
    (project / "benchmarks" / "rate.py").write_text(
        '"""Rows per second."""\nimport sys\nif __name__ == "__main__":\n    print(sys.argv[1:])\n'
    )
    assert make(project, "bench").stdout.strip() == "make bench SCRIPT=rate                 Rows per second."
    assert make(project, "bench", "SCRIPT=rate", "ARGS=a b").stdout.splitlines()[-1] == "['a', 'b']"


def test_clean_keeps_the_environment_and_runs(project: Path) -> None:
    ready(project)
    for name in ("build/x", "runs/x", "trainer/__pycache__/x", ".mypy_cache/x", ".venv/lib/__pycache__/x"):
        (project / name).mkdir(parents=True)
    assert make(project, "clean").returncode == 0
    left = {
        name for name in ("build", "runs", "trainer/__pycache__", ".mypy_cache") if (project / name).exists()
    }
    assert left == {"runs"}
    assert (project / ".venv" / "lib" / "__pycache__").exists()
    assert make(project, "distclean").returncode == 0
    assert not (project / ".venv").exists()


def test_continuous_integration_calls_check_and_test_from_anywhere(tmp_path: Path) -> None:
    executable(tmp_path / "make", '#!/bin/sh\npwd\necho "$@"\nexit 3\n')
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ran = subprocess.run(
        [ROOT / ".ci" / "run"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.stdout.splitlines() == [str(ROOT), "check test"]
    assert ran.returncode == 3, "the result of make is that of the run"
