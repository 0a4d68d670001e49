"""Which versions of Python, torch, torchrec and fbgemm belong together, and what to do when they do not.

fbgemm's operators are compiled against one torch, and torchrec calls operators of one fbgemm: a mixture
ends in a loader traceback about an undefined symbol, or in a crash. This module reads the versions from
the packages' metadata, so that it runs, and speaks, where importing them would crash.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Versions that belong together, each a pattern that pip understands after ``==``."""

    torch: str
    """Versions of torch, without the build's label (``+cpu``)."""

    torchrec: str
    """Versions of torchrec."""

    fbgemm: str
    """Versions of fbgemm-gpu (CUDA) and fbgemm-gpu-cpu."""


STACKS = (
    Stack(torch="2.11.*", torchrec="1.6.*", fbgemm="1.6.0"),
    Stack(torch="2.13.*", torchrec="1.8.0", fbgemm="1.8.0"),
)
"""The rows known to work, after fbgemm's release table; the last one is that of ``requirements/``."""

TORCHMETRICS = "1.0.3"
"""The one version that every torchrec above pins; 1.1.2 and later fail in its metrics."""

PYTHON_FROM, PYTHON_BELOW = (3, 11), (3, 14)
"""Python versions on which the trainer runs."""

NEEDED = (
    *("torch", "numpy", "torchrec", "tensordict", "torchmetrics", "hydra-core", "omegaconf", "pydantic"),
    *("pyarrow", "rich", "tensorboard", "matplotlib"),
)
"""Distributions without which the trainer cannot start, besides one fbgemm."""

CUDA_FBGEMM, CPU_FBGEMM = "fbgemm-gpu", "fbgemm-gpu-cpu"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What the version check looks at."""

    packages: Mapping[str, str]
    """Version of each installed distribution, by normalised name (``fbgemm-gpu-cpu``)."""

    python: tuple[int, int]
    """Major and minor version of Python."""

    driver: bool
    """Whether an NVIDIA driver answers on this machine."""

    @property
    def fbgemm(self) -> tuple[str, ...]:
        """Names of the fbgemm distributions that are installed: none, one, or two that clash."""
        return tuple(name for name in (CUDA_FBGEMM, CPU_FBGEMM) if name in self.packages)

    @property
    def cpu_torch(self) -> bool:
        """Whether the installed torch is labelled as a build without CUDA."""
        return self.packages.get("torch", "").endswith("+cpu")

    @property
    def wanted_fbgemm(self) -> str:
        """The fbgemm that suits this machine and its torch."""
        return CUDA_FBGEMM if self.driver and not self.cpu_torch else CPU_FBGEMM


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is off, in words, with the commands that put it right."""

    package: str
    """Distribution at fault, or ``python``."""

    message: str
    """What is wrong, a sentence."""

    commands: tuple[str, ...]
    """Shell commands to run, in order."""


def installed() -> Environment:
    """Describe this interpreter and machine, importing none of the packages."""
    packages: dict[str, str] = {}
    for found in importlib.metadata.distributions():
        if found.name:
            # The first on the path is the one that an import takes.
            packages.setdefault(normalised(found.name), found.version)
    return Environment(packages=packages, python=sys.version_info[:2], driver=driver_answers())


@cache
def driver_answers() -> bool:
    """Whether an NVIDIA driver is loaded, without initialising CUDA (the rule of ``make setup``)."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def normalised(name: str) -> str:
    """Normal form of a distribution's name: ``fbgemm_gpu-cpu`` becomes ``fbgemm-gpu-cpu`` (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def matches(version: str, pattern: str) -> bool:
    """Whether ``version``, its build's label (``+cpu``) left aside, fits the ``pattern`` of a stack."""
    return fnmatchcase(version.partition("+")[0], pattern)


def stack_of(packages: Mapping[str, str]) -> Stack | None:
    """The row of :data:`STACKS` that the installed torch belongs to; None without a torch of any row."""
    torch = packages.get("torch", "")
    return next((stack for stack in STACKS if matches(torch, stack.torch)), None)


def check_versions(environment: Environment | None = None) -> list[Problem]:
    """All that is off with the installed versions (of this machine by default), worst first."""
    found = environment or installed()
    return [
        *_python_problems(found),
        *_missing(found),
        *_torch_problems(found),
        *_torchrec_problems(found),
        *_fbgemm_problems(found),
        *_torchmetrics_problems(found),
    ]


def require_versions(environment: Environment | None = None) -> None:
    """Stop unless the installed versions belong together.

    Raises:
        ValueError: what is wrong, and the commands that put it right.
    """
    problems = check_versions(environment)
    if problems:
        raise ValueError(told(problems))


def told(problems: list[Problem]) -> str:
    """The problems in words, followed by every command once, in an order in which they can be run."""
    commands = dict.fromkeys(command for problem in problems for command in problem.commands)
    return "\n".join(
        [
            "The installed packages do not belong together:",
            *(f"  - {problem.message}" for problem in problems),
            "In the environment that tightrec runs in, run (or `make setup` in a checkout, for all of it):",
            *(f"  {command}" for command in commands),
            "`python -m tightrec.trainer.doctor` looks closer.",
        ]
    )


def _python_problems(found: Environment) -> list[Problem]:
    if PYTHON_FROM <= found.python < PYTHON_BELOW:
        return []
    first, last = f"{PYTHON_FROM[0]}.{PYTHON_FROM[1]}", f"{PYTHON_BELOW[0]}.{PYTHON_BELOW[1] - 1}"
    message = f"Python {found.python[0]}.{found.python[1]} runs this; the trainer needs {first} to {last}."
    return [
        Problem(package="python", message=message, commands=(f"make distclean setup PYTHON=python{last}",))
    ]


def _missing(found: Environment) -> list[Problem]:
    problems = []
    for name in NEEDED:
        if name not in found.packages:
            commands = {"torch": _torch_commands(), "torchrec": _companions(found)}.get(
                name, (f"pip install --no-deps {_requirement(name)}",)
            )
            problems.append(Problem(package=name, message=f"{name} is not installed.", commands=commands))
    if not found.fbgemm:
        message = f"fbgemm is not installed (this machine wants {found.wanted_fbgemm})."
        problems.append(Problem(package="fbgemm", message=message, commands=_companions(found)))
    return problems


def _torch_problems(found: Environment) -> list[Problem]:
    version = found.packages.get("torch")
    if version is None or stack_of(found.packages) is not None:
        return []
    known = ", ".join(stack.torch for stack in STACKS)
    message = f"torch {version} belongs to no stack known here (known: {known})."
    return [Problem(package="torch", message=message, commands=(*_torch_commands(), *_companions(found)))]


def _torchrec_problems(found: Environment) -> list[Problem]:
    version, stack = found.packages.get("torchrec"), stack_of(found.packages)
    if version is None or stack is None or matches(version, stack.torchrec):
        return []
    torch = found.packages["torch"]
    message = f"torchrec {version} does not belong to torch {torch}, which needs torchrec {stack.torchrec}."
    return [Problem(package="torchrec", message=message, commands=_companions(found))]


def _fbgemm_problems(found: Environment) -> list[Problem]:
    if len(found.fbgemm) == 2:
        message = (
            f"{CUDA_FBGEMM} and {CPU_FBGEMM} are both installed: they share one folder, so the later has "
            "overwritten the earlier (`pip install torchrec` without --no-deps does this)."
        )
        again = f"pip uninstall -y {CUDA_FBGEMM} {CPU_FBGEMM}"
        return [Problem(package="fbgemm", message=message, commands=(again, *_companions(found)))]
    problems = []
    for name in found.fbgemm:
        version, stack = found.packages[name], stack_of(found.packages)
        if stack is not None and not matches(version, stack.fbgemm):
            torch = found.packages["torch"]
            message = f"{name} {version} does not belong to torch {torch}, which needs {stack.fbgemm}."
            problems.append(Problem(package=name, message=message, commands=_companions(found)))
        if name == CUDA_FBGEMM and found.wanted_fbgemm != CUDA_FBGEMM:
            why = "no NVIDIA driver answers on this machine" if not found.driver else "torch is a CPU build"
            message = f"{CUDA_FBGEMM} is the CUDA build, but {why}: its operators cannot load."
            again = f"pip uninstall -y {CUDA_FBGEMM}"
            problems.append(Problem(package=name, message=message, commands=(again, *_companions(found))))
    return problems


def _torchmetrics_problems(found: Environment) -> list[Problem]:
    version = found.packages.get("torchmetrics")
    if version is None or version == TORCHMETRICS:
        return []
    message = f"torchmetrics {version} breaks torchrec's metrics, which need {TORCHMETRICS}."
    command = f"pip install --no-deps {_requirement('torchmetrics')}"
    return [Problem(package="torchmetrics", message=message, commands=(command,))]


def _torch_commands() -> tuple[str, ...]:
    return (f"pip install '{_requirement('torch')}'",)


def _companions(found: Environment) -> tuple[str, ...]:
    """Commands that install torchrec and the fbgemm of this machine beside the torch at hand."""
    stack = stack_of(found.packages) or STACKS[-1]
    words = f"'torchrec=={stack.torchrec}' '{found.wanted_fbgemm}=={stack.fbgemm}'"
    return (f"pip install --no-deps {words}",)


def _requirement(name: str) -> str:
    pinned = {"torch": STACKS[-1].torch, "torchmetrics": TORCHMETRICS}
    return f"{name}=={pinned[name]}" if name in pinned else name
