"""Proves the error bound on as many adversarial values as asked for, in exact arithmetic.

    make bench SCRIPT=bound ARGS="--values 1e10"

Every value goes through encode and decode of the device's own backend and is compared without rounding.
Exits 1 and names the first broken values if any is beyond its bound. 1e9 values take minutes on a core;
Ctrl-C ends with what has been shown so far.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "unit"))

from bound_proof import Proof, prove_round

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MODES = ("packed", "dedup", "entropy", "auto", "half", "raw")
ROUND_VALUES = 8_500_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", type=float, default=1e8, help="how many at least (default 1e8)")
    parser.add_argument("--seed", type=int, default=0, help="the first round's seed (default 0)")
    parser.add_argument("--backend", default="", help="reference, cpu or cuda (default: the device's own)")
    arguments = parser.parse_args()
    if not arguments.values > 0:
        parser.error(f"--values is {arguments.values}; give a number above 0, as 1e10")
    rounds = [(mode, name) for mode in MODES for name in DTYPES]
    proof, seed, begin = Proof(), arguments.seed, time.monotonic()
    try:
        while proof.values < arguments.values:
            mode, name = rounds[seed % len(rounds)]
            proof.add(prove_round(ROUND_VALUES, DTYPES[name], mode, seed, arguments.backend))
            seed += 1
            print(f"\r{proof.values:.3g} values, {proof.beyond} beyond their bound", end="", flush=True)
    except KeyboardInterrupt:
        print("\nstopped early", end="")
    minutes = (time.monotonic() - begin) / 60
    modes = ", ".join(f"{count:,} {mode.lower()}" for mode, count in sorted(proof.blocks.items()))
    print(f"\n{proof.values:,} values in {minutes:.1f} minutes (seeds {arguments.seed} to {seed - 1})")
    print(f"blocks: {modes}")
    print(f"beyond their bound: {proof.beyond:,}")
    for where in proof.where[:20]:
        print(f"  {where}")
    return 1 if proof.beyond else 0


if __name__ == "__main__":
    sys.exit(main())
