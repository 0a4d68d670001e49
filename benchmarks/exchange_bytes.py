"""Bytes of the compressed exchange on real data, beside what plain float32 torchrec sends in the same job.

    .venv/bin/python -m tightrec.trainer.data.prepare movielens src=FOLDER dst=data/movielens
    .venv/bin/python -m tightrec.trainer.data.prepare jester src=FOLDER dst=data/jester
    OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc-per-node 4 benchmarks/exchange_bytes.py \
        runs/bytes [--also "packed: codec.mode=packed"] [--also "tight: codec.bound.backward=range:0.005"]

Every rank trains on batches of 512 rows, dim 32, as experiment=ab_movielens and ab_jester say. Bytes are
those that the ranks handed to the collectives in the last --last steps of training, all ranks together and
whole: sizes, headers, codebooks and padding counted. What a rank keeps for itself is counted on neither side.
--also adds a way of sending: its name, a colon, and overrides beside codec=lossy. Finished runs are left out,
and those of benchmarks/exchange_quality.py in the same folder are taken. Without torchrun nothing is trained,
and the tables of what is finished are printed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from exchange_runs import (
    EXPERIMENTS,
    PLAIN,
    PLAIN_WORDS,
    Planned,
    made,
    make,
    markdown,
    named_words,
    sent,
    tables_of,
)

from tightrec.trainer.compare.runs import Run

DIRECTIONS = ("forward", "backward")
GOALS = {"forward": 20.0, "backward": 21.0}
LOSSY = "lossy"


def totals(runs: dict[tuple[str, str, int], Run], variants: Sequence[str], seed: int, last: int) -> str:
    """A row for each data set and way of sending: ratio to the plain run of the same data set."""
    rows = []
    for data in EXPERIMENTS:
        base = runs.get((data, PLAIN, seed))
        for variant in variants:
            run = runs.get((data, variant, seed))
            if base is None or run is None:
                continue
            cells = [data, variant]
            for direction in DIRECTIONS:
                plain, ours = sent(base, direction, last), sent(run, direction, last)
                reached = "reached" if plain / ours >= GOALS[direction] else "missed"
                cells += [f"{plain:,.0f}", f"{ours:,.0f}", f"{plain / ours:.1f}x", reached]
            rows.append(cells)
    headings = ["data", "sent as"]
    for direction in DIRECTIONS:
        headings += [f"{direction}: plain B/step", "sent B/step", "ratio", f"goal {GOALS[direction]:g}x"]
    return markdown(headings, rows)


def by_table(run: Run, direction: str, last: int) -> str:
    """A row for each table of one run, those that send most first."""
    tables = tables_of(run, direction, last)
    rows = []
    for name, found in sorted(tables.items(), key=lambda item: -float(item[1]["sent_bytes"])):
        rows.append(
            [
                name,
                f"{found['rows']:,.0f}",
                f"{found['distinct']:,.0f}",
                f"{found['sent_bytes']:,.0f}",
                f"{float(found['plain_bytes']) / float(found['sent_bytes']):.1f}x",
                str(found["bound"]),
                str(found["mode"]),
            ]
        )
    return markdown(["table", "rows", "distinct", "sent B/step", "ratio", "bound", "mode"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs go")
    parser.add_argument("--data", type=Path, default=Path("data"), help="holds the prepared data sets")
    parser.add_argument("--sets", default=",".join(EXPERIMENTS), help="data sets, with commas between them")
    parser.add_argument("--also", action="append", default=[], help='"NAME: OVERRIDE OVERRIDE ..."')
    parser.add_argument("--seed", type=int, default=0, help="of weights and data order")
    parser.add_argument("--last", type=int, default=100, help="steps that are counted")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of all runs")
    given = parser.parse_intermixed_args()
    ways = {PLAIN: PLAIN_WORDS, LOSSY: ("codec=lossy",)}
    for name, words in map(named_words, given.also):
        ways[name] = ("codec=lossy", *words)
    planned = [
        Planned(data=data, variant=variant, words=words, seed=given.seed)
        for data in given.sets.split(",")
        for variant, words in ways.items()
    ]
    if "WORLD_SIZE" in os.environ:
        make(planned, given.folder, given.data, given.overrides)
    if os.environ.get("RANK", "0") != "0":
        return 0
    runs = made(planned, given.folder)
    print(totals(runs, [variant for variant in ways if variant != PLAIN], given.seed, given.last))
    for (data, variant, _), run in runs.items():
        for direction in DIRECTIONS:
            if variant != PLAIN:
                print(f"\n{data}, {variant}, {direction}:\n\n{by_table(run, direction, given.last)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
