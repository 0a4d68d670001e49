"""The figures of a comparison as tables of texts, for the console and the page alike."""

import math
from collections.abc import Sequence

from tightrec.trainer.compare.groups import Difference, Group, difference, spread
from tightrec.trainer.compare.runs import differing
from tightrec.trainer.report.figures import DASH, count, figure, mean, size, times
from tightrec.trainer.report.page import Grid
from tightrec.trainer.step_split import PARTS

SPLITS = ("valid", "test")
_PURPOSES = ("input", "forward", "backward")
_SCORES = (("AUC", "auc"), ("NE", "ne"), ("log loss", "log_loss"))


def tables(groups: Sequence[Group]) -> list[Grid]:
    """Every table for which there is something to tell; the first group is what the others compare with."""
    grids = [_scores(groups, split) for split in reversed(SPLITS)]
    grids += [_sizes(groups), _bytes(groups), _time(groups), _each_run(groups), _settings(groups)]
    return [grid for grid in grids if grid is not None]


def _scores(groups: Sequence[Group], split: str) -> Grid | None:
    scored = [group for group in groups if any(group.scores(split, name) for _, name in _SCORES)]
    if not scored:
        return None
    base = groups[0]
    rows = []
    for group in scored:
        seeds = len(group.scores(split, "ne"))
        cells = [_with_spread(group.scores(split, name)) for _, name in _SCORES]
        against = [DASH, DASH, DASH]
        if group is not base:
            against = _against(difference(group, base, split, "ne"))
        rows.append([group.label, str(seeds), *cells, *against])
    noise = spread(base.scores(split, "ne"))
    told = "With one seed there is no spread to compare with."
    if not math.isnan(noise):
        told = (
            f"Spread: {figure(noise, 5)}, the standard deviation of {base.label}'s NE over its seeds; a "
            f"third of it is {figure(noise / 3, 5)}. Less is better."
        )
    return Grid(
        title=f"Scores on {split}",
        headings=[
            *("run", "seeds", *(name for name, _ in _SCORES)),
            *(f"NE − {base.label}", "in spreads", "within 1/3"),
        ],
        rows=rows,
        note=f"± is the standard deviation over seeds, of a difference its standard error. {told}",
    )


def _with_spread(values: Sequence[float]) -> str:
    if not values:
        return DASH
    noise = spread(values)
    return figure(mean(values)) + ("" if math.isnan(noise) else f" ± {figure(noise)}")


def _against(found: Difference) -> list[str]:
    if math.isnan(found.mean):
        return [DASH, DASH, DASH]
    error = "" if math.isnan(found.error) else f" ± {figure(found.error, 5)}"
    share = DASH if math.isnan(found.share) else f"{found.share:+.2f}"
    within = DASH if found.within is None else "yes" if found.within else "no"
    return [f"{found.mean:+.5f}{error}", share, within]


def _sizes(groups: Sequence[Group]) -> Grid | None:
    """What each model costs and is worth; nothing where all are of one size."""
    sizes = [group.fact("size", "bytes") for group in groups]
    if all(math.isnan(found) for found in sizes) or len(set(sizes)) == 1:
        return None
    rows = []
    for group, found in zip(groups, sizes, strict=True):
        features = [count(group.fact("size", "features", kind)) for kind in ("table", "dhe", "hybrid")]
        parameters = [group.fact("size", name) for name in ("table_parameters", "dhe_parameters")]
        scores = [_with_spread(group.scores("test", name)) for name in ("auc", "ne")]
        cells = [count(amount) for amount in (*parameters, group.fact("size", "parameters"))]
        speed = _speed(_facts(group, "rows_per_s"))
        rows.append([group.label, " / ".join(features), *scores, *cells, size(found), speed])
    return Grid(
        title="Representations",
        headings=[
            *("run", "table / dhe / hybrid", "test AUC", "test NE"),
            *("table parameters", "dhe parameters", "parameters", "bytes", "rows/s"),
        ],
        rows=rows,
        note="Features by what makes their vectors: a table, a deep hash embedding, both. Parameters and "
        "bytes (float32) are of the whole model, each table counted once, optimizer state not at all.",
    )


def _bytes(groups: Sequence[Group]) -> Grid | None:
    sent = [{purpose: group.fact("bytes_per_step", purpose) for purpose in _PURPOSES} for group in groups]
    if all(math.isnan(amount) for one in sent for amount in one.values()):
        return None
    compressed = any(run.facts.get("compression") for group in groups for run in group.runs)
    rows = []
    for group, one in zip(groups, sent, strict=True):
        less = [times(_ratio(sent[0][purpose], one[purpose])) for purpose in _PURPOSES]
        less.append(times(_ratio(sum(sent[0].values()), sum(one.values()))))
        ratios = [times(group.fact("compression", way, "ratio")) for way in ("forward", "backward")]
        amounts = [size(amount) for amount in (*one.values(), sum(one.values()))]
        rows.append([group.label, *amounts, *less, *(ratios if compressed else [])])
    own = ["float32 / forward", "float32 / backward"] if compressed else []
    purposes = (*_PURPOSES, "all")
    return Grid(
        title="Sent between ranks a step, all ranks",
        headings=["run", *purposes, *(f"ratio {purpose}" for purpose in purposes), *own],
        rows=rows,
        note=f"Ratio: how many times fewer bytes than {groups[0].label}."
        + (
            " float32 / ...: as the exchange itself counts, sizes and headers included." if compressed else ""
        ),
    )


def _time(groups: Sequence[Group]) -> Grid | None:
    speeds = [_facts(group, "rows_per_s") for group in groups]
    if not any(speeds):
        return None
    base = mean(speeds[0])
    rows = [
        ["rows/s", *(_speed(found) for found in speeds)],
        ["times as fast", *(_times_as_fast(mean(found), base) for found in speeds)],
    ]
    split = [[group.fact("time_split_ms", part) for part in PARTS] for group in groups]
    if not all(math.isnan(value) for one in split for value in one):
        rows += [
            [f"{part.replace('_', ' ')}, ms", *(figure(one[number], 2) for one in split)]
            for number, part in enumerate(PARTS)
        ]
        rows.append(["step, ms", *(figure(sum(one), 2) for one in split)])
    return Grid(
        title="Speed, and where a step's time goes on rank 0",
        headings=["", *(group.label for group in groups)],
        rows=rows,
        note="Milliseconds are of profiled steps, which are slower than others; rows/s are of all steps.",
    )


def _speed(found: Sequence[float]) -> str:
    noise = spread(found)
    return count(mean(found)) + ("" if math.isnan(noise) else f" ± {count(noise)}")


def _times_as_fast(speed: float, base: float) -> str:
    ratio = _ratio(speed, base)
    return DASH if math.isnan(ratio) else f"{ratio:.2f}"


def _each_run(groups: Sequence[Group]) -> Grid:
    splits = [s for s in SPLITS if any(run.score(s, "ne") is not None for g in groups for run in g.runs)]
    rows = []
    for group in groups:
        for run in group.runs:
            cells = [
                figure(run.score(split, name), 5 if name == "ne" else 4)
                for split in splits
                for _, name in _SCORES
            ]
            speed = count(run.facts.get("rows_per_s"))
            rows.append([run.name, group.label, str(run.seed), *cells, count(run.facts.get("steps")), speed])
    scores = [f"{split} {name}" for split in splits for name, _ in _SCORES]
    return Grid(
        title="Each run",
        headings=["folder", "run", "seed", *scores, "steps", "rows/s"],
        rows=rows,
        words=(1,),
    )


def _settings(groups: Sequence[Group]) -> Grid | None:
    base = groups[0]
    names = dict.fromkeys(name for group in groups for name in differing(base.settings, group.settings))
    rows = [[name, *(group.settings.get(name, DASH) for group in groups)] for name in names]
    if not rows:
        return None
    return Grid(
        title="Settings that differ", headings=["setting", *(group.label for group in groups)], rows=rows
    )


def _facts(group: Group, name: str) -> list[float]:
    return [value for run in group.runs if isinstance(value := run.facts.get(name), int | float)]


def _ratio(one: float, other: float) -> float:
    return one / other if other else math.nan
