"""Say what is installed, what belongs together and what is off: ``python -m tightrec.trainer.doctor``.

Versions are read from metadata; every operation runs in a process of its own with a time limit
(``doctor_probes.py``), so that an undefined symbol, a crash or a hang becomes a line of the table.
The exit code is 0 when nothing that training needs has failed, else 1. After bitsandbytes' doctor.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from tightrec.trainer.versions import (
    NEEDED,
    STACKS,
    Environment,
    Problem,
    check_versions,
    installed,
    stack_of,
    told,
)

Status = Literal["ok", "warn", "fail"]

LISTED = ("python", "torch", "torchrec", "fbgemm", "torchmetrics")
"""What gets a line of its own; the other needed packages share one."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the doctor's table."""

    name: str
    """What was looked at."""

    status: Status
    """ok, warn (training runs without it) or fail."""

    found: str
    """What was seen, in words."""

    advice: str = ""
    """What to do when it is off."""


def diagnose(environment: Environment | None = None, timeout_s: float = 120.0) -> list[Check]:
    """Every check on this machine, in the order of the table; each probe may take ``timeout_s``."""
    found = environment or installed()
    problems = check_versions(found)
    advice = {
        "operators": "fbgemm must match torch and the machine: see the lines above, or run make setup.",
        "lookup": "the three packages must belong together: see the lines above, or run make setup.",
        "all_to_all": "gloo must find an interface: set GLOO_SOCKET_IFNAME=lo, or fix the hostname.",
    }
    wanted = [*advice, *(["cuda"] if found.driver else []), *(["cupy"] if _has_cupy(found) else [])]
    with ThreadPoolExecutor(2) as pool:
        probed = dict(zip(wanted, pool.map(lambda probe: run_probe(probe, timeout_s), wanted), strict=True))
    needed = [dataclasses.replace(probed[name], advice=advice[name]) for name in advice]
    return [
        *_version_checks(found, problems),
        *(dataclasses.replace(check, advice="") if check.status == "ok" else check for check in needed),
        _gpu_check(found, probed.get("cuda")),
        _cupy_check(found, probed.get("cupy")),
        _compiler_check(found),
    ]


def run_probe(name: str, timeout_s: float) -> Check:
    """Run one probe in a process group of its own, and put whatever comes of it into words."""
    command = [sys.executable, "-m", "tightrec.trainer.doctor_probes", name]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return Check(name=name, status="fail", found=f"no answer within {timeout_s:g} s; it was ended")
    finally:
        # The group, since a probe's own children may outlive it and hold the pipes open.
        _end_group(process)
    try:
        finding = json.loads(output.splitlines()[-1]) if process.returncode == 0 else None
    except (IndexError, json.JSONDecodeError):
        finding = None
    if finding is None:
        return Check(name=name, status="fail", found=failure_in_words(process.returncode, errors))
    return Check(name=name, status="ok" if finding["ok"] else "fail", found=finding["found"])


def failure_in_words(returncode: int, errors: str) -> str:
    """Say why a probe ended without an answer, from its exit code and what it wrote to stderr."""
    symbol = re.search(r"undefined symbol: (\w+)", errors)
    library = re.search(r"([\w./+-]+\.so[\w.]*): cannot open shared object file", errors)
    module = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", errors)
    if symbol:
        return f"undefined symbol {symbol[1][:40]}: a library was built against another torch"
    if library:
        return f"the library {library[1]} is missing: a CUDA build without its CUDA or driver libraries"
    if module:
        return f"the module {module[1]} is not installed"
    if returncode < 0:
        return f"the process crashed with {signal.Signals(-returncode).name}"
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "no message")
    return f"exit code {returncode}: {last.strip()[:200]}"


def exit_code(checks: list[Check]) -> int:
    """0 when no check failed, else 1; warnings do not count."""
    return int(any(check.status == "fail" for check in checks))


def as_json(checks: list[Check], environment: Environment) -> str:
    """The checks, the stacks that belong together and the verdict as one JSON object."""
    stack = stack_of(environment.packages)
    answer = {
        "ok": exit_code(checks) == 0,
        "checks": [dataclasses.asdict(check) for check in checks],
        "stacks": [dataclasses.asdict(row) | {"here": row == stack} for row in STACKS],
    }
    return json.dumps(answer, indent=1)


def print_tables(checks: list[Check], environment: Environment) -> None:
    """Print the checks, and the versions that belong together, by rich or in plain lines without it."""
    stack = stack_of(environment.packages)
    rows = [
        (check.name, check.status, "\n".join(filter(None, (check.found, check.advice)))) for check in checks
    ]
    mark = {True: "this torch", False: ""}
    stacks = [(row.torch, row.torchrec, row.fbgemm, mark[row == stack]) for row in STACKS]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        print("\n".join(" | ".join(row) for row in [*rows, ("belong together", "", ""), *stacks]))
        return
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table("check", "", "found", title="tightrec doctor")
    for name, status, words in rows:
        table.add_row(name, Text(status, style=colours[status]), Text(words))
    together = Table("torch", "torchrec", "fbgemm", "", title="versions that belong together")
    for row in stacks:
        together.add_row(*row)
    console = Console()
    console.print(table)
    console.print(together)


def main(words: list[str] | None = None) -> int:
    """Run the doctor on the command line ``words``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tightrec.trainer.doctor", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="limit of each probe")
    options = parser.parse_args(words)
    environment = installed()
    checks = diagnose(environment, options.timeout)
    if options.json:
        print(as_json(checks, environment))
        return exit_code(checks)
    print_tables(checks, environment)
    problems = check_versions(environment)
    if problems:
        print(told(problems))
    elif exit_code(checks):
        print("The versions belong together, but a check failed: see the lines marked fail.")
    else:
        print("Everything that training needs is in order.")
    return exit_code(checks)


def _version_checks(found: Environment, problems: list[Problem]) -> list[Check]:
    versions = {"python": ".".join(map(str, sys.version_info[:3]))} | {
        name: found.packages.get(name, "not installed") for name in LISTED[1:]
    }
    versions["fbgemm"] = (
        ", ".join(f"{name} {found.packages[name]}" for name in found.fbgemm) or "not installed"
    )
    others = [name for name in NEEDED if name not in LISTED]
    present = [f"{name} {found.packages[name]}" for name in others if name in found.packages]
    checks = []
    for name in (*LISTED, "others"):
        mine = [p for p in problems if _line_of(p.package) == name]
        checks.append(
            Check(
                name="other packages" if name == "others" else name,
                status="fail" if mine else "ok",
                found=", ".join(present) if name == "others" else versions[name],
                advice=" ".join(problem.message for problem in mine),
            )
        )
    return checks


def _line_of(package: str) -> str:
    if package.startswith("fbgemm"):
        return "fbgemm"
    return package if package in LISTED else "others"


def _gpu_check(found: Environment, probed: Check | None) -> Check:
    if probed is None:
        return Check(name="GPU", status="ok", found="no NVIDIA driver answers: the CPU stack is right here")
    if probed.status == "ok" and found.fbgemm == ("fbgemm-gpu",):
        return dataclasses.replace(probed, name="GPU")
    # The CPU stack may be wanted on a machine with a GPU; the CUDA stack without a usable GPU may not.
    status: Status = "fail" if "fbgemm-gpu" in found.fbgemm else "warn"
    advice = "To train on the GPU: make distclean setup STACK=cuda13."
    return Check(name="GPU", status=status, found=f"a driver answers; {probed.found}", advice=advice)


def _has_cupy(found: Environment) -> bool:
    return found.driver and any(name.startswith("cupy") for name in found.packages)


def _cupy_check(found: Environment, probed: Check | None) -> Check:
    if probed is not None:
        advice = "The CUDA codec needs it: make setup STACK=cuda13." if probed.status == "fail" else ""
        return dataclasses.replace(probed, name="CuPy", advice=advice)
    if not found.driver:
        return Check(name="CuPy", status="ok", found="not needed without a GPU")
    advice = "The CUDA codec needs it: pip install --no-deps cupy-cuda13x cuda-pathfinder."
    return Check(name="CuPy", status="warn", found="not installed", advice=advice)


def _compiler_check(found: Environment) -> Check:
    nvcc = shutil.which("nvcc")
    at = f"nvcc at {nvcc}" if nvcc else "no nvcc"
    why = "NVRTC, which comes with torch's CUDA libraries, compiles the kernels" if found.driver else "no GPU"
    return Check(name="nvcc", status="ok", found=f"{at}; not needed: {why}")


def _end_group(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


if __name__ == "__main__":
    sys.exit(main())
