"""What it takes to run a run again: command, versions, commit, machine."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

_DISTRIBUTIONS = (
    *("tightrec", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "cupy-cuda13x"),
    *("numpy", "pyarrow", "hydra-core", "torchmetrics"),
)


def provenance() -> dict[str, Any]:
    """Command, versions, commit and machine of this process."""
    return {"command": command(), "versions": versions(), "git": commit(), "host": host()}


def now() -> str:
    """The time, in UTC, to the second, as ISO 8601 writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def command() -> str:
    """The command line that started the job; torchrun's part is told from what it gave its workers."""
    words = sys.orig_argv
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" not in os.environ or ranks is None or "-m" not in words:
        return shlex.join(words)
    nodes = int(os.environ.get("WORLD_SIZE", ranks)) // int(ranks)
    where = ["--standalone"] if nodes == 1 else ["--nnodes", str(nodes)]
    return shlex.join(["torchrun", *where, "--nproc-per-node", ranks, *words[words.index("-m") :]])


def versions() -> dict[str, str]:
    """Versions of Python and of the distributions that numbers may depend on, where installed."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the checkout this code runs from, with ``-dirty`` where files differ; None: no checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        told = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip()


def host() -> dict[str, Any]:
    """Facts about the machine that figures depend on."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads_per_rank": torch.get_num_threads(),
    }


def gpu(device: str) -> str | None:
    """Name of the GPU that ``device`` is; None if it is none."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
