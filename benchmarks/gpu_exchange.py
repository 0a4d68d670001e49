"""Measure the exchange of a step on one device, and predict what it gains by the speed of the link.

    python3 benchmarks/gpu_exchange.py --out runs/gpu      # with an NVIDIA GPU; `make bench-gpu` runs it too
    python3 benchmarks/gpu_exchange.py --device cpu --rows 64 --dims 16 --samples 3

The device plays one rank of a job: it holds 26 tables, sends each of 4 peers the rows that its batch names
and receives as many for its own batch; gradients go the other way. Ids follow Zipf's law (1.05) over the
Criteo Kaggle cardinalities, values and gradients are N(0,1). The wire is a copy on the device. Not in it:
lookups, finding equal bags (the loader's work), the optimizer, the dense layers, and what a collective needs
to start.

A way's exchange over a link takes its whole pass on the device, gaps while the host waits included, less the
copy that stands for the wire, plus bytes / link; plain float32 rows take bytes / link alone. The step is
predicted for one in which plain's two exchanges take --share of the time. Writes ``gpu_exchange.json`` and
``gpu_exchange.md`` under --out. Needs torch, numpy and CuPy; on a CPU numba, but for --backend reference.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gpu
import torch

LINKS = (12.5, 25.0, 50.0, 450.0)
"""GB/s of a GPU in one direction: 100, 200 and 400 Gbit/s networks, and NVLink."""
PARTS = ("collect", "encode", "sizes", "pack", "wire", "decode", "expand", "whole")


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=gpu.ROOT / "runs" / "gpu", help="folder of the two results"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", default="", help="of the codec; default the device's own")
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--tables", type=int, default=26)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 2048, 8192], help="batch of each rank")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--modes", nargs="+", default=["packed", "entropy", "auto"], help="of lossy frames")
    parser.add_argument("--forward", default="range:0.03", help="error bound of rows")
    parser.add_argument("--backward", default="range:0.01", help="error bound of gradients")
    parser.add_argument("--share", type=float, default=0.626, help="of plain's step, for its two exchanges")
    parser.add_argument("--samples", type=int, default=30, help="timed passes of each way")
    settings = parser.parse_args(words)
    if not 0 < settings.share < 1:
        parser.error(f"--share {settings.share} must lie between 0 and 1, such as the published 0.626")
    return settings


def predict(rows: list[dict[str, Any]], link: float, share: float) -> dict[str, float] | None:
    """Both directions of one way at ``link`` GB/s; None where one of them was not there.

    Returns:
        ``plain_us`` and ``us`` of the exchanges, and how much faster the ``exchange`` and the ``step`` are.
    """
    if len(rows) < 2 or any("missing" in row for row in rows):
        return None
    per_byte = 1e-3 / link  # microseconds
    plain = sum(row["plain_bytes"] for row in rows) * per_byte
    took = 0.0
    for row in rows:
        device = row["us"]["device"]["median"] if row["way"] != "plain" else 0.0
        took += device + row["sent_bytes"] * per_byte
    gain = plain / took
    step = 1 / (1 - share + share / gain)
    return {
        "plain_us": round(plain, 1), "us": round(took, 1), "exchange": round(gain, 3), "step": round(step, 3)
    }  # fmt: skip


def predictions(rows: list[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """One entry for each shape and way: what is predicted at every link."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((*row["shape"].values(), row["way"]), []).append(row)
    return [
        {
            "shape": group[0]["shape"],
            "way": group[0]["way"],
            "links": {str(link): predict(group, link, share) for link in LINKS},
            "missing": next((row["missing"] for row in group if "missing" in row), None),
        }
        for group in groups.values()
        if group[0]["way"] != "plain"
    ]


def as_markdown(result: dict[str, Any]) -> str:
    """The result as two tables, with what it was measured on."""
    facts = [f"{key} {value}" for key, value in result["machine"].items()]
    lines = [
        f"Command: `{result['command']}`. {', '.join(facts)}. Bounds: {result['bounds']}. Medians in us. "
        "Host waits: copies of the exchange that wait for a GPU; on one, the calls that torch says waited.",
        "",
        f"| peers x tables x rows x dim | way | direction | ratio | {' | '.join(PARTS)} | host waits "
        "| error / bound |",
        "|" + "---|" * (len(PARTS) + 6),
    ]
    for row in result["rows"]:
        cells = [_shape(row), row["way"], row["direction"]]
        if "missing" in row:
            cells += ["not there"] + [""] * (len(PARTS) + 2)
        else:
            cells.append(f"{row['ratio']:.2f}")
            cells += [f"{row['us'][part]['median']:.1f}" if part in row["us"] else "" for part in PARTS]
            warned, worst = row["synchronising_calls"], row["error_over_bound"]
            cells.append(str(sum(row["waits"].values())) + ("" if warned is None else f" / {warned}"))
            cells.append("" if worst is None else f"{worst:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Predicted from these times: both exchanges against plain float32 rows, and in brackets the step if "
        f"plain's exchanges take {result['share']:.1%} of it.",
        "",
        f"| peers x tables x rows x dim | way | {' | '.join(f'{link:g} GB/s' for link in LINKS)} |",
        "|" + "---|" * (len(LINKS) + 2),
    ]
    for entry in result["predictions"]:
        at = [f"{one['exchange']:.2f} ({one['step']:.2f})" if one else "" for one in entry["links"].values()]
        if entry["missing"]:
            at = ["not there"] + [""] * (len(LINKS) - 1)
        lines.append(f"| {_shape(entry)} | {entry['way']} | {' | '.join(at)} |")
    reasons = {f"{row['way']}: {row['missing']}" for row in result["rows"] if "missing" in row}
    lines += ["", *(f"- not there: {reason}" for reason in sorted(reasons))]
    places = {tuple(row["waits"].items()): row["direction"] for row in result["rows"] if row.get("waits")}
    for waits, direction in places.items():
        lines.append(f"- host waits {direction}: {', '.join(f'{place} {count}' for place, count in waits)}")
    lines += [f"- failed: {name}: {reason}" for name, reason in result["failed"].items()]
    return "\n".join(lines) + "\n"


def _shape(entry: dict[str, Any]) -> str:
    return " x ".join(str(number) for number in entry["shape"].values())


def run(settings: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure every shape; the result as it is written.

    Raises:
        ValueError: a bound that is none, or a mode that is unknown.
    """
    # Deferred: the package is found only after main has made it so.
    import gpu_exchange_measure
    from gpu_measure import Clock, Shape

    from tightrec.compression.codec import Modes
    from tightrec.compression.policy.config import parse_bound

    bounds: dict[Any, Any] = {}
    for direction in gpu_exchange_measure.DIRECTIONS:
        bounds[direction] = parse_bound(getattr(settings, direction), f"--{direction}")
        if bounds[direction] is None:
            raise ValueError(
                f"--{direction} lossless has no error to measure; give a bound such as range:0.03"
            )
    Modes.of(settings.modes, [f"--modes {mode}" for mode in settings.modes])
    device = torch.device(settings.device)
    clock = Clock(device, settings.samples)
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for count in settings.rows:
        for dim in settings.dims:
            shape = Shape(settings.peers, settings.tables, count, dim)
            found, broken = gpu_exchange_measure.measure(
                shape, settings.modes, bounds, clock, settings.backend
            )
            rows += found
            failed |= broken
    return {
        "command": command,
        "machine": {"device": device.type, **gpu.machine(device)},
        "bounds": {direction: getattr(settings, direction) for direction in bounds},
        "share": settings.share,
        "rows": rows,
        "predictions": predictions(rows, settings.share),
        "failed": failed,
    }


def main(words: list[str] | None = None) -> int:
    settings = parse(words)
    if settings.device == "cuda" and not torch.cuda.is_available():
        print(
            "no NVIDIA GPU was found: run this on a machine where torch.cuda.is_available() is true, or give "
            "--device cpu and small sizes",
            file=sys.stderr,
        )
        return 1
    given = sys.argv[1:] if words is None else words
    with tempfile.TemporaryDirectory() as folder:
        gpu.make_importable(Path(folder))
        try:
            result = run(settings, " ".join(["python3", "benchmarks/gpu_exchange.py", *given]))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "gpu_exchange.json").write_text(json.dumps(result, indent=1) + "\n")
    text = as_markdown(result)
    (settings.out / "gpu_exchange.md").write_text(text)
    print(text)
    if result["failed"]:
        print(f"failed: {', '.join(result['failed'])}; see {settings.out}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
