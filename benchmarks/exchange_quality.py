"""What compressing the exchange costs in normalised entropy: real data, real ranks, several seeds.

    .venv/bin/python -m tightrec.trainer.data.prepare movielens src=FOLDER dst=data/movielens
    .venv/bin/python -m tightrec.trainer.data.prepare jester src=FOLDER dst=data/jester
    OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc-per-node 4 \
        benchmarks/exchange_quality.py runs/quality

Each way of sending trains on each data set with each seed: 512 rows a rank, dim 32, the epochs and schedules
of experiment=ab_movielens and ab_jester, one evaluation on the test split at the end. plain is torchrec as it
is; fp16, int8 and mx4 are torchrec's own codecs without deduplication, both ways (their evaluation is
quantised too, that of the project's own exchange is not); lossy is codec=lossy. sc24
is the published scheme, forward only, at three bounds with step decay over a fifth of an epoch, which is what
it was on Criteo Kaggle: its 65,536 steps are more than all of these. Plain and lossy are made first, for all
seeds; --also adds a way by its name, a colon and overrides. Finished runs are left out, so the command can be
stopped and given again. Without torchrun nothing is trained, and the tables of what is finished are printed.

A difference is that of runs of the same seed, which start from the same weights and read the same order. The
goal: its mean is at most a third of the spread, the standard deviation of plain over the seeds. Its own
standard error stands beside it: a difference below its error says that more seeds would be needed to tell it
from none.
"""

import argparse
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from exchange_runs import EXPERIMENTS, PLAIN, PLAIN_WORDS, Planned, made, make, markdown, named_words, sent

from tightrec.trainer.compare.runs import Run

LOSSY = "lossy"
WAYS: dict[str, tuple[str, ...]] = {
    PLAIN: PLAIN_WORDS,
    LOSSY: ("codec=lossy",),
    **{name: (f"codec={name}", "codec.dedup=false") for name in ("fp16", "int8", "mx4")},
    "sc24": ("codec=sc24",),
    **{
        f"sc24_{share}": ("codec=sc24", "codec.bound.level=fixed", f"codec.bound.forward=range:{share}")
        for share in (0.01, 0.03, 0.05)
    },
}
DECAY = {"movielens": 78, "jester": 122}
"""Steps of sc24's decay: a fifth of an epoch of 2,048 rows a step."""
SHARE = 1 / 3
"""Of the spread, that a mean difference may be."""


def plan(sets: Sequence[str], ways: Mapping[str, tuple[str, ...]], seeds: Sequence[int]) -> list[Planned]:
    """All runs: plain and lossy of every seed and data set first, then the others seed by seed."""
    first = [name for name in ways if name in (PLAIN, LOSSY)]
    rest = [name for name in ways if name not in first]
    return [
        Planned(data=data, variant=name, words=(*ways[name], *_decay(name, data)), seed=seed)
        for names in (first, rest)
        for seed in seeds
        for data in sets
        for name in names
    ]


def _decay(way: str, data: str) -> tuple[str, ...]:
    if not way.startswith("sc24"):
        return ()
    return "codec.bound.schedule=step", f"codec.bound.steps={DECAY[data]}"


def table(runs: Mapping[tuple[str, str, int], Run], data: str, ways: Sequence[str], last: int) -> str:
    """Scores of one data set: a row for each way of sending that has runs."""
    plain = {seed: run for (of, way, seed), run in runs.items() if (of, way) == (data, PLAIN)}
    spread = _spread([_score(run, "ne") for run in plain.values()])
    rows = []
    for way in ways:
        ours = {seed: run for (of, name, seed), run in runs.items() if (of, name) == (data, way)}
        if not ours:
            continue
        scores = [[_score(run, name) for run in ours.values()] for name in ("auc", "ne")]
        cells = [way, str(len(ours))]
        cells += [f"{statistics.mean(values):.4f} ± {_spread(values):.4f}" for values in scores]
        cells += _difference(plain, ours, spread) if way != PLAIN else ["-", "-", "-"]
        cells += _ratios(plain, ours, last)
        rows.append(cells)
    headings = ["sent as", "seeds", "test AUC", "test NE", "NE - plain", "in spreads", "at most 1/3"]
    return markdown([*headings, "forward", "backward"], rows)


def _difference(plain: Mapping[int, Run], ours: Mapping[int, Run], spread: float) -> list[str]:
    pairs = [_score(ours[seed], "ne") - _score(plain[seed], "ne") for seed in ours if seed in plain]
    if not pairs:
        return ["-", "-", "-"]
    mean, error = statistics.mean(pairs), _spread(pairs) / math.sqrt(len(pairs))
    verdict = "-" if math.isnan(spread) else "yes" if mean <= SHARE * spread else "no"
    return [f"{mean:+.5f} ± {error:.5f}", f"{mean / spread:+.2f}", verdict]


def _ratios(plain: Mapping[int, Run], ours: Mapping[int, Run], last: int) -> list[str]:
    """Over the last steps of training, mean of the seeds that both have."""
    cells = []
    for direction in ("forward", "backward"):
        found = [
            sent(plain[seed], direction, last) / sent(run, direction, last)
            for seed, run in ours.items()
            if seed in plain
        ]
        cells.append(f"{statistics.mean(found):.1f}x" if found else "-")
    return cells


def _score(run: Run, name: str) -> float:
    score = run.score("test", name)
    if score is None:
        raise ValueError(f"{run.folder} has no {name} of a test split. Give data that has one.")
    return score


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs go")
    parser.add_argument("--data", type=Path, default=Path("data"), help="holds the prepared data sets")
    parser.add_argument("--sets", default=",".join(EXPERIMENTS), help="data sets, with commas between them")
    parser.add_argument("--ways", default=",".join(WAYS), help="ways of sending, with commas between them")
    parser.add_argument("--also", action="append", default=[], help='"NAME: OVERRIDE OVERRIDE ..."')
    parser.add_argument("--seeds", default="0,1,2,3,4", help="with commas between them")
    parser.add_argument("--last", type=int, default=100, help="steps whose bytes are counted")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of all runs")
    given = parser.parse_intermixed_args()
    sets, names = given.sets.split(","), given.ways.split(",")
    unknown = [name for name in names if name not in WAYS] + [
        name for name in sets if name not in EXPERIMENTS
    ]
    if unknown:
        parser.error(f"{unknown[0]} is unknown; ways: {', '.join(WAYS)}; data sets: {', '.join(EXPERIMENTS)}")
    ways = {name: WAYS[name] for name in names} | dict(map(named_words, given.also))
    planned = plan(sets, ways, [int(seed) for seed in given.seeds.split(",")])
    if "WORLD_SIZE" in os.environ:
        make(planned, given.folder, given.data, given.overrides)
    if os.environ.get("RANK", "0") != "0":
        return 0
    runs = made(planned, given.folder)
    for data in sets:
        spread = _spread([_score(run, "ne") for key, run in runs.items() if key[:2] == (data, PLAIN)])
        print(f"{data}; spread of plain's NE {spread:.5f}, a third {spread / 3:.5f}\n")
        print(table(runs, data, list(ways), given.last) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
