"""Check and measure the codec on one NVIDIA GPU: tests, memory checker, GB/s of encode and decode.

    python3 benchmarks/gpu.py --out runs/gpu        # or: make bench-gpu ARGS="--out runs/gpu"

Takes under 10 minutes. Needs torch, CuPy, numpy and pytest, and no installation: the checkout's own folders
become the package. Writes ``gpu.json`` and ``gpu.md`` under ``--out``, where ``gpu_exchange.py``, which it
runs, writes two more. ``--dry-run`` goes through everything that a machine without a GPU can do, on a few
values, with the reference backend.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
BOUND = 0.25
"""About four bits a value on normal values."""
MODES = ("packed", "dedup", "entropy")
TESTS = "tests/cuda/test_codec_cuda.py"
CHECKED_TESTS = "equal_the_reference and columns or damaged and dtype0 and (packed or entropy) or wild"
TEST_SECONDS, CHECKER_SECONDS, EXCHANGE_SECONDS = 240, 120, 180
DRY_EXCHANGE = (
    *("--device", "cpu", "--backend", "reference", "--modes", "packed"),
    *("--peers", "2", "--tables", "2", "--rows", "8", "--dims", "32", "--samples", "1"),
)


def make_importable(folder: Path) -> None:
    """Let this checkout be found as ``tightrec``, here and in child processes, by a link in ``folder``."""
    (folder / "tightrec").symlink_to(ROOT, target_is_directory=True)
    places = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(places)
    sys.path.insert(0, str(folder))


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of the two results")
    parser.add_argument("--peers", type=int, default=8)
    parser.add_argument("--tables", type=int, default=26)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 128], help="rows of a block")
    parser.add_argument("--samples", type=int, default=50, help="timed calls of each step")
    parser.add_argument("--skip-tests", action="store_true", help="no pytest and no memory checker")
    parser.add_argument(
        "--dry-run", action="store_true", help="no GPU: a few values by the reference backend"
    )
    return parser.parse_args(words)


def run_child(command: list[str], seconds: int, **environment: str) -> dict[str, Any]:
    """Run a command in the checkout; its status (124: too slow), time and last lines."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, timeout=seconds, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        status, output = 124, (late.stdout or b"").decode(errors="replace")
    lines = output.strip().splitlines()
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "last_lines": lines[-12:]}


def run_tests() -> dict[str, Any]:
    """The GPU tests, and some of them again under compute-sanitizer where it is found."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS]
    results: dict[str, Any] = {"tests": run_child(pytest, TEST_SECONDS)}
    checker = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if checker is None:
        results["memory checker"] = {"status": None, "last_lines": ["compute-sanitizer was not found"]}
        return results
    # Without torch's cache every tensor is an allocation of its own, beside which accesses are found.
    results["memory checker"] = run_child(
        [checker, "--tool", "memcheck", "--error-exitcode", "9", *pytest, "-k", CHECKED_TESTS, "-x"],
        CHECKER_SECONDS,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    return results


def run_exchange(out: Path, dry: bool) -> dict[str, Any]:
    """The exchange of a step, which writes results of its own."""
    script = str(Path(__file__).parent / "gpu_exchange.py")
    words = [*DRY_EXCHANGE] if dry else []
    return run_child([sys.executable, script, "--out", str(out.resolve()), *words], EXCHANGE_SECONDS)


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("cupy", "cupy-cuda13x", "cupy-cuda12x", "numpy", "fbgemm-gpu", "nvidia-nvcomp-cu13"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found


def measure(settings: argparse.Namespace, device: torch.device, backend: str) -> dict[str, Any]:
    import gpu_baselines
    import gpu_measure

    clock = gpu_measure.Clock(device, settings.samples)
    rows, missing, failed = [], {}, {}
    for count in settings.rows:
        shape = gpu_measure.Shape(settings.peers, settings.tables, count, settings.dim)
        copies = gpu_measure.copy_times(shape, clock)
        copy_us = sorted(copies)[len(copies) // 2]
        rows.append(gpu_measure.row(shape, "device copy", "copy", copies, copy_us, {"ratio": 1.0}))
        for mode in MODES:
            try:
                rows += gpu_measure.measure_codec(shape, mode, BOUND, clock, copy_us, backend)
            except Exception as error:  # the other figures are worth having
                failed[f"{mode}, {count} rows"] = f"{type(error).__name__}: {error}"
        values = gpu_measure.make_values(shape, "packed", device)
        there, missing = gpu_baselines.find(values, BOUND)
        for baseline in there:
            extra = {"ratio": round(shape.uncompressed_bytes / baseline.compressed_bytes(), 3)}
            for step, run in (("encode", baseline.encode), ("decode", baseline.decode)):
                rows.append(gpu_measure.row(shape, baseline.name, step, clock.device_us(run), copy_us, extra))
    return {"rows": rows, "not measured": missing, "failed": failed}


def as_markdown(result: dict[str, Any]) -> str:
    """The result as one table, with what it was measured on."""
    facts = [f"{key} {value}" for key, value in result["machine"].items()]
    lines = [
        f"Command: `{result['command']}`. {', '.join(facts)}. Bound {BOUND} on normal values, L2 flushed, "
        "CUDA events; GB/s of uncompressed bytes; min / median / max.",
        "",
        "| peers x tables x rows x dim | codec | step | ratio | us | GB/s | of a copy | host us |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in result["rows"]:
        shape = " x ".join(str(number) for number in entry["shape"].values())
        cells = [shape, entry["codec"], entry["step"], f"{entry['ratio']:.2f}"]
        cells += [" / ".join(f"{number:.1f}" for number in entry[key].values()) for key in ("us", "gbps")]
        cells.append(f"{entry['ratio_to_copy']:.2f}")
        cells.append(f"{entry['host_us']['median']:.1f}" if "host_us" in entry else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines += [
        f"- {name}: status {ran['status']}, {ran['last_lines'][-1:]}"
        for name, ran in result["checks"].items()
    ]
    for kind in ("not measured", "failed"):
        lines += [f"- {kind}: {name}: {reason}" for name, reason in result[kind].items()]
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> int:
    settings = parse(words)
    if settings.dry_run:
        settings.peers, settings.tables, settings.dim, settings.rows, settings.samples = 2, 2, 16, [40, 3], 3
    elif not torch.cuda.is_available():
        print(
            "no NVIDIA GPU was found: run this on a machine where torch.cuda.is_available() is true, or give "
            "--dry-run to go through it without one",
            file=sys.stderr,
        )
        return 1
    device = torch.device("cpu" if settings.dry_run else "cuda")
    with tempfile.TemporaryDirectory() as folder:
        make_importable(Path(folder))
        sys.path.insert(0, str(Path(__file__).parent))
        result: dict[str, Any] = {
            "command": " ".join(
                ["python3", "benchmarks/gpu.py", *(sys.argv[1:] if words is None else words)]
            ),
            "machine": machine(device),
            "checks": {} if settings.skip_tests or settings.dry_run else run_tests(),
            **measure(settings, device, "reference" if settings.dry_run else ""),
        }
        result["checks"]["exchange"] = run_exchange(settings.out, settings.dry_run)
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    text = as_markdown(result)
    (settings.out / "gpu.md").write_text(text)
    print(text)
    bad = [name for name, ran in result["checks"].items() if ran["status"] not in (0, None)]
    if bad or result["failed"]:
        print(
            f"failed: {', '.join([*bad, *result['failed']])}; see {settings.out / 'gpu.json'}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
