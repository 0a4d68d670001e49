"""Fuzzes the decoders with as many damaged frames as asked for; all backends must agree on every bit.

    make bench SCRIPT=fuzz ARGS="--frames 1e6"

Exits 1 at the first disagreement, write outside a buffer or crash, and says how to repeat it.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "unit"))

from fuzz_rounds import cases, fuzz

from tightrec.kernels import cpu, reference

FRAMES_OF_A_CASE = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=float, default=1e6, help="how many at least (default 1e6)")
    parser.add_argument("--seed", type=int, default=0, help="the first round's seed (default 0)")
    arguments = parser.parse_args()
    if not arguments.frames > 0:
        parser.error(f"--frames is {arguments.frames}; give a number above 0, as 1e6")
    done, seed, begin = 0, arguments.seed, time.monotonic()
    try:
        while done < arguments.frames:
            found = cases(reference, seed)
            for number, case in enumerate(found):
                try:
                    list(fuzz(case, found[number - 1], FRAMES_OF_A_CASE, seed, (reference, cpu)))
                except AssertionError as error:
                    print(f"\nround {seed}, case {number} of fuzz_rounds.cases(reference, {seed}): {error}")
                    return 1
                done += FRAMES_OF_A_CASE
            seed += 1
            print(f"\r{done:,} frames", end="", flush=True)
    except KeyboardInterrupt:
        print("\nstopped early", end="")
    minutes = (time.monotonic() - begin) / 60
    seeds = f"seeds {arguments.seed} to {max(seed - 1, arguments.seed)}"
    print(f"\n{done:,} damaged frames read alike in {minutes:.1f} minutes ({seeds})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
