"""The page and the console's text of a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.table import Table
from rich.text import Text

from tightrec.trainer.compare.cautions import cautions
from tightrec.trainer.compare.groups import Group, grouped
from tightrec.trainer.compare.runs import Run, read_runs
from tightrec.trainer.compare.tables import SPLITS, tables
from tightrec.trainer.report.charts import Chart, Series, line_chart
from tightrec.trainer.report.figures import DASH, mean
from tightrec.trainer.report.page import Grid, rendered, write_page

_TEMPLATE = "comparison.html"
_COLOURS = (0, 1, 2, 3, 5, 6, 4, 7)
"""Of the page's series, the two greys last."""

Course = Mapping[int, float]
"""A figure by training step."""


def compare(folders: Sequence[Path], out: Path, console: Console | None = None) -> Path:
    """Compare the runs in ``folders``: tables on the console, tables and curves in the page ``out``.

    Args:
        folders: of finished runs, or of such folders; the first run's group is what the others compare with.
        out: the page's path; its folder must be there.
        console: where the tables go; None: standard output.

    Raises:
        ValueError: fewer than two runs, one that is not there or not finished, or no place for the page.
    """
    runs = read_runs(folders)
    if len(runs) < 2:
        raise ValueError(
            f"There is {len(runs)} run to compare. Give the folders of two runs or more, or a folder that "
            "holds them."
        )
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"out={out} must name a file in a folder that is there.")
    groups = grouped(runs)
    warnings, grids = cautions(groups), tables(groups)
    values = {
        "title": " · ".join(group.label for group in groups),
        "warnings": warnings,
        "tables": grids,
        "charts": curves(groups),
        "commands": _commands(runs),
    }
    write_page(out, rendered(_TEMPLATE, values, package=__package__))
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=120)
    console.print(text(warnings, grids))
    console.print(Text(f"comparison {out}"), soft_wrap=True)
    return out


def _commands(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Names of runs and the command that made them, which an A/B job's have in common."""
    made: dict[str, list[str]] = {}
    for run in runs:
        made.setdefault(run.facts.get("command") or DASH, []).append(run.name)
    return [(", ".join(names), command) for command, names in made.items()]


def text(warnings: Sequence[str], grids: Sequence[Grid]) -> RenderableType:
    """The same for a console."""
    parts: list[RenderableType] = [Text(f"warning: {warning}", style="yellow") for warning in warnings]
    for grid in grids:
        table = Table(title=grid.title, title_justify="left", title_style="bold")
        for number, heading in enumerate(grid.headings):
            left = number == 0 or number in grid.words
            table.add_column(Text(heading), justify="left" if left else "right", overflow="fold")
        for row in grid.rows:
            table.add_row(*map(Text, row))
        parts += [table, *([Text(grid.note, style="dim")] if grid.note else []), Text("")]
    return Stack(*parts)


def curves(groups: Sequence[Group]) -> list[Chart]:
    """Loss and NE over the training steps, evaluations, and what each group's NE adds to the first's."""
    charts = []
    for title, name in (("Training log loss", "loss"), ("Training NE", "ne")):
        charts += _drawn(title, [_course(group, "train", name) for group in groups], groups)
    base, *others = [_course(group, "train", "ne") for group in groups]
    above = [{step: ne - base[step] for step, ne in course.items() if step in base} for course in others]
    title = f"Training NE above that of {groups[0].label}"
    charts += _drawn(title, above, groups[1:], first_colour=1)
    for split in SPLITS:
        for title, name in ((f"{split}: NE", "ne"), (f"{split}: AUC", "auc")):
            courses = [_course(group, "eval", name, split) for group in groups]
            # A single evaluation at the end is in the tables.
            if any(len(course) > 1 for course in courses):
                charts += _drawn(title, courses, groups, dots=True)
    return charts


def _drawn(
    title: str, courses: Sequence[Course], groups: Sequence[Group], first_colour: int = 0, dots: bool = False
) -> list[Chart]:
    series = [
        Series(
            label=group.label,
            steps=list(course),
            values=list(course.values()),
            colour=_COLOURS[number % len(_COLOURS)],
            dots=dots,
        )
        for number, (group, course) in enumerate(zip(groups, courses, strict=True), start=first_colour)
        if course
    ]
    return [line_chart(title, series)] if series else []


def _course(group: Group, kind: str, name: str, split: str | None = None) -> Course:
    """Means over the group's runs at each step that one of them has recorded."""

    def wanted(record: Mapping[str, Any]) -> bool:
        return record["kind"] == kind and record.get("split") == split and record.get(name) is not None

    by_step: dict[int, list[float]] = {}
    for run in group.runs:
        for record in filter(wanted, run.records):
            by_step.setdefault(record["step"], []).append(record[name])
    return {step: mean(values) for step, values in sorted(by_step.items())}
