"""Policies on three mixes of devices, simulated: a CPU alone, with one GPU, with four GPUs.

    python -m tightrec.serving explore snapshots=[...] out=paths.json
    .venv/bin/python benchmarks/serving_simulated.py paths.json [--target-ms 10] [--load 0.5,1,2,4]

The CPU's paths are measured; the GPUs are **assumed**, derived from the CPU's by --speed and --overhead-ms,
and the table says so. MP-Rec (arXiv 2302.10872) compares mixes of this kind; nothing here is a measured GPU.

The load is given in multiples of the rows a second that the mix's fastest paths score together at their best
batch size. Columns: in-target rows times accuracy a second (correct/s), its ratio to the best fixed path,
accuracy, 99th percentile, and shed queries; the median over --seeds.
"""

import argparse
import statistics
import sys
from pathlib import Path

from tightrec.serving.outcomes import Summary
from tightrec.serving.paths import PathSet, read_paths
from tightrec.serving.scheduling.simulate import devices_of, queries_of, run_policy
from tightrec.serving.scheduling.simulate_config import SimulateConfig

POLICIES = ("multi", "greedy", "fastest", "random", "oracle")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", type=Path, help="what explore wrote")
    parser.add_argument("--target-ms", type=float, default=10.0)
    parser.add_argument("--load", default="0.5,1,2", help="multiples of the mix's capacity")
    parser.add_argument("--speed", type=float, default=20.0, help="of an assumed GPU, in CPU cores")
    parser.add_argument("--overhead-ms", type=float, default=0.3, help="of an assumed GPU's batch")
    parser.add_argument("--duration-s", type=float, default=5.0)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    try:
        measured = read_paths(arguments.paths)
        gpu = f"gpu(speed={arguments.speed:g},overhead_ms={arguments.overhead_ms:g})"
        for mix in (("cpu",), ("cpu", gpu), ("cpu", f"4x{gpu}")):
            paths = devices_of(measured, mix, "cpu")
            for load in map(float, arguments.load.split(",")):
                _compare(paths, mix, load, arguments)
    except ValueError as error:
        parser.error(str(error))
    return 0


def capacity_rows_per_s(paths: PathSet) -> float:
    """Rows a second, if each device does nothing but score full batches on its cheapest path."""
    return sum(
        max(
            device.slots / path.threads * path.profile.rows_per_s
            for path in paths.paths
            if path.device == device.name
        )
        for device in paths.devices
    )


def _compare(paths: PathSet, mix: tuple[str, ...], load: float, arguments: argparse.Namespace) -> None:
    rows_per_s = load * capacity_rows_per_s(paths)
    found: dict[str, list[Summary]] = {}
    fixed = [f"fixed:{path.name}" for path in paths.paths]
    for seed in range(arguments.seeds):
        config = SimulateConfig(
            paths=(arguments.paths,),
            rate=rows_per_s / 128,
            duration_s=arguments.duration_s,
            target_ms=arguments.target_ms,
            seed=seed,
        )
        queries = queries_of(config)
        for policy in (*POLICIES, *fixed):
            found.setdefault(policy, []).append(run_policy(paths, config, policy, queries)[0])
    correct = {name: statistics.median(s.correct_rows_per_s for s in all_) for name, all_ in found.items()}
    best = max(fixed, key=correct.__getitem__)
    assumed = " (GPUs assumed, not measured)" if len(mix) > 1 else ""
    print(f"\n{' + '.join(mix)}{assumed}: {load:g} x capacity, {rows_per_s:,.0f} rows/s offered")
    print(f"{'policy':<34}{'correct/s':>13}{'ratio':>7}{'accuracy':>10}{'p99 ms':>8}{'shed':>8}")
    for name in (*POLICIES, best):
        middle = sorted(found[name], key=lambda s: s.correct_rows_per_s)[len(found[name]) // 2]
        ratio = correct[name] / correct[best] if correct[best] else float("nan")
        print(
            f"{name:<34}{correct[name]:>13,.0f}{ratio:>7.2f}{middle.accuracy:>10.4f}"
            f"{middle.p99_ms:>8.2f}{middle.shed / max(1, middle.queries):>8.1%}"
        )


if __name__ == "__main__":
    sys.exit(main())
