"""The sensitivity plot: what every part costs alone at every type, and what the plan made of it."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from tightrec.snapshot.search import Found, ranked
from tightrec.snapshot.sensitivity import EXACT

MOST_PARTS = 60
"""Parts drawn, the most sensitive ones; sensitivity.json has all."""

DECADES_BELOW = 4
"""The axis starts so many decades below the budget; what costs less stands at its edge."""

_COLOURS = {
    "fp16": "#2a9d8f",
    "bf16": "#8ab17d",
    "int8": "#4477aa",
    "int4": "#e08e2b",
    "int2": "#c1272d",
    EXACT: "#333333",
}
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.minor.visible": False,
    # Else the identifiers inside an SVG differ from run to run.
    "svg.hashsalt": "sensitivity",
}
_LIGHT, _INK = "#b8bec6", "#333333"


def plot_sensitivity(found: Found, path: Path) -> None:
    """Write the plot to ``path``, as SVG or PNG by its suffix; the same ``found`` gives the same bytes.

    One line a part, tables above layers, the most sensitive one of each first. Left: its NE loss alone at
    every type (:attr:`Cost.charge`), the plan's type ringed. Right: its size in float32 and in the plan.
    """
    parts, left_out = _ranked(found)
    # The text around the lines takes 1.4 inches.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 1.4 + 0.24 * max(len(parts), 4)), layout="constrained")
        losses, sizes = figure.subplots(1, 2, sharey=True, width_ratios=(2.1, 1))
        _draw_losses(losses, found, parts)
        _draw_sizes(sizes, found, parts)
        losses.set_yticks(range(len(parts)), [part.split(":", 1)[1] for part in parts])
        losses.set_ylim(len(parts) - 0.4, -0.6)
        tables = sum(part.startswith("table:") for part in parts)
        for axes in (losses, sizes):
            axes.tick_params(axis="y", length=0, pad=8)
            axes.grid(axis="y", linewidth=0.5, color="#e6e8eb")
            if 0 < tables < len(parts):
                axes.axhline(tables - 0.5, color=_LIGHT, linewidth=0.8)
        more = f" ({left_out} less sensitive parts are not drawn)" if left_out else ""
        figure.suptitle(
            f"NE loss of tables and layers alone, and the plan within {100 * found.budget_ne:g} % in all: "
            f"{found.bytes / found.float32_bytes:.1%} of float32's size{more}",
            fontsize=10,
        )
        _draw_legend(figure, found)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _ranked(found: Found) -> tuple[list[str], int]:
    """The parts to draw, and how many are not: the most sensitive first, tables before layers."""
    parts = ranked(found)
    drawn = parts[:MOST_PARTS]
    drawn.sort(key=lambda part: not part.startswith("table:"))
    return drawn, len(parts) - len(drawn)


def _draw_losses(axes: Axes, found: Found, parts: Sequence[str]) -> None:
    floor = _floor(found)
    place = {part: at for at, part in enumerate(parts)}
    for cost in found.costs:
        if cost.part not in place:
            continue
        x, y = max(cost.charge, floor), place[cost.part]
        axes.plot(x, y, "o", color=_COLOURS[cost.kind], markersize=4.5, clip_on=False)
        if _chosen(found, cost.part) == cost.kind:
            axes.plot(x, y, "o", markersize=9, markerfacecolor="none", markeredgecolor=_INK, clip_on=False)
    axes.set_xscale("log")
    # The budget is in sight even where every part costs less.
    axes.set_xlim(
        floor, max(2 * found.budget_ne, 2 * max((c.charge for c in found.costs), default=0), 10 * floor)
    )
    if found.budget_ne:
        axes.axvline(found.budget_ne, color=_INK, linestyle=(0, (4, 3)), linewidth=1)
    axes.xaxis.set_major_locator(LogLocator(numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g}")
    axes.set_xlabel(f"expected NE loss alone, % (at the edge: {100 * floor:.2g} or less)")


def _draw_sizes(axes: Axes, found: Found, parts: Sequence[str]) -> None:
    sizes = {(cost.part, cost.kind): cost.bytes for cost in found.costs}
    before = {cost.part: cost.float32_bytes for cost in found.costs}
    for y, part in enumerate(parts):
        kind = _chosen(found, part)
        after = sizes.get((part, kind), before[part])
        axes.plot([after, before[part]], [y, y], color=_LIGHT, linewidth=2, solid_capstyle="round")
        axes.plot(before[part], y, "o", color=_LIGHT, markersize=4.5)
        axes.plot(after, y, "o", color=_COLOURS[kind], markersize=4.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.tick_params(axis="x", labelrotation=30)
    axes.set_xlabel("size, from float32 to the plan")


def _draw_legend(figure: Figure, found: Found) -> None:
    used = {cost.kind for cost in found.costs} | {_chosen(found, cost.part) for cost in found.costs}
    marks = [
        Line2D([], [], marker="o", linestyle="", color=colour, markersize=4.5, label=kind)
        for kind, colour in _COLOURS.items()
        if kind in used
    ]
    ring = Line2D(
        [], [], marker="o", linestyle="", markersize=9, markerfacecolor="none", markeredgecolor=_INK
    )
    ring.set_label("in the plan")
    level = Line2D([], [], color=_INK, linestyle=(0, (4, 3)), linewidth=1, label="budget")
    figure.legend(handles=[*marks, ring, level], loc="outside lower center", ncols=8, frameon=False)


def _floor(found: Found) -> float:
    """Where the axis of losses starts: above 0, for it is logarithmic."""
    if found.budget_ne:
        return float(found.budget_ne) * 10**-DECADES_BELOW
    return min((cost.charge for cost in found.costs if cost.charge > 0), default=1e-9)


def _chosen(found: Found, part: str) -> str:
    what, name = part.split(":", 1)
    return (found.plan.tables if what == "table" else found.plan.layers)[name]
