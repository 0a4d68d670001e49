"""Speed of a training step by codec, on ranks whose links are limited to a rate.

    .venv/bin/python benchmarks/step_speed.py                  (as root: starts launch/throttled.sh itself)
    OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc-per-node 4 benchmarks/step_speed.py --rates none

Finds the rate at which the exchanges of embeddings and of their gradients take 62.6 % of plain torchrec's
step (the share that SC'24 published: 31.3 % each way). At that rate, at twice and at half of it, and without
a limit it measures every variant; all models live in the same processes and take turns, every round on the
same batches. A speed-up is the median over rounds of plain's time by the variant's; a step's time is that of
the slowest rank. The exchanges' share is what a profiler says of further steps, mean over ranks: the part of
the step in which nothing else is done.

Batches (26 columns of Criteo's cardinalities up to --cardinality, Zipf 1.05) are made before the steps that
are timed, no row comes twice. With ``--dedup loader`` (default) they are deduplicated there too, as a data
loader with workers on spare cores would; with ``--dedup step`` the step pays for it. The second line is for
a machine without root: ranks meet on the loopback, without a limit.
"""

import argparse
import os
import sys
from pathlib import Path

from step_speed_rate import THROTTLED, rate_words

FIXED = ("fp16", "int8", "fp8", "mx4")
VARIANTS = {
    "plain": ["codec=none", "codec.dedup=false"],
    **{name: [f"codec={name}", "codec.dedup=false"] for name in FIXED},
    "sc24": ["codec=sc24"],
    "dedup": ["codec=none", "codec.dedup=true"],
    "lossy": ["codec=lossy"],
    "auto": ["codec=auto"],
}
"""Variants by name, as words of the trainer's command line."""


def main() -> int:
    words = _arguments()
    try:
        rates, variants = rate_words(words.rates), _chosen(words)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if "RANK" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ.setdefault("GRACE_S", "5")
        script = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
        os.execv(THROTTLED, [str(THROTTLED), str(words.ranks), "none", *script])
    if "THROTTLED_NAME" not in os.environ and rates != ["none"]:
        print("Without launch/throttled.sh links have no limit: give --rates none.", file=sys.stderr)
        return 2
    # Deferred: it imports torch, of which only the ranks have need.
    from step_speed_measure import measure

    measure(words, rates, variants)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="ranks to start")
    parser.add_argument(
        "--rates", default="share,share*2,share/2,none", help="by commas; also tc's, as 500mbit"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each variant at each rate")
    parser.add_argument("--steps", type=int, default=12, help="timed steps in a turn")
    parser.add_argument("--settle", type=int, default=2, help="untimed steps before them")
    parser.add_argument("--profiled", type=int, default=4, help="profiled steps after them")
    parser.add_argument("--warm", type=int, default=40, help="steps of each variant before all")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 3 steps: does it run?")
    parser.add_argument("--batch", type=int, default=512, help="rows a rank and step")
    parser.add_argument("--dim", type=int, default=32, help="width of the embeddings")
    parser.add_argument("--cardinality", type=int, default=1_000_000, help="most rows of a table")
    parser.add_argument(
        "--dedup", choices=("loader", "step"), default="loader", help="where batches are deduplicated"
    )
    parser.add_argument("--only", help="names of variants by commas; plain always runs")
    parser.add_argument(
        "--add", action="append", default=[], metavar="NAME:WORD,WORD", help="one more variant"
    )
    parser.add_argument("overrides", nargs="*", help="words of the trainer's command line for all variants")
    if "--quick" in sys.argv:
        parser.set_defaults(rounds=2, steps=3, settle=1, profiled=2, warm=4)
    return parser.parse_args()


def _chosen(words: argparse.Namespace) -> dict[str, list[str]]:
    """Words of the variants that are asked for, plain first."""
    all_ = dict(VARIANTS)
    for text in words.add:
        name, colon, own = text.partition(":")
        if not colon or not name:
            raise ValueError(f"--add: {text!r} is not NAME:WORD,WORD, as wide:codec=lossy,codec.mode=packed.")
        all_[name] = own.split(",")
    names = ["plain", *(words.only.split(",") if words.only else all_)]
    missing = [name for name in names if name not in all_]
    if missing:
        raise ValueError(f"--only: there is no variant {missing[0]!r}; there are {', '.join(all_)}.")
    return {name: all_[name] for name in names}


if __name__ == "__main__":
    sys.exit(main())
