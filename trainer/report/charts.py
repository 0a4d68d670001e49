"""Charts as inline SVG whose colours are CSS variables of the page, so that they follow light and dark.

Legends are left to the page, where they can wrap on a phone.
"""

import io
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, StrMethodFormatter

_SIZE_INCHES = (5.0, 2.7)
_MOST_POINTS = 500
_MOST_BARS = 60

# Matplotlib writes these into the SVG, where they are replaced by CSS variables.
_INK, _LINE = "#010101", "#020202"
_SERIES = tuple(f"#0300{index:02x}" for index in range(8))
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "axes.axisbelow": True,
}

Unit = Literal["", "rows/s", "bytes", "ms"]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, or one layer of the bars."""

    label: str
    steps: Sequence[float]
    values: Sequence[float | None]

    colour: int = 0
    """Number of the CSS variable ``--series-N``, 0 to 7."""

    level: bool = False
    """A dashed level to compare with."""

    dots: bool = False
    """Mark the single values, of which there are few."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawn chart and what its legend shows."""

    title: str
    svg: str
    legend: Sequence[Series]


def line_chart(title: str, series: Sequence[Series], unit: Unit = "", from_zero: bool = False) -> Chart:
    """Lines over the training step; long ones are thinned by means over neighbours."""

    def draw(axes: Axes) -> None:
        for one in series:
            if one.level:
                axes.axhline(_value(one.values[0]), color=_SERIES[one.colour], linestyle=(0, (4, 3)))
                continue
            steps, values = _thinned(one.steps, one.values, _MOST_POINTS)
            marker = "o" if one.dots or len(values) == 1 else None
            axes.plot(steps, values, color=_SERIES[one.colour], marker=marker, markersize=3.5)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if from_zero:
            axes.set_ylim(bottom=0)

    return Chart(title=title, svg=_svg(title, draw, unit), legend=series)


def bar_chart(title: str, layers: Sequence[Series], unit: Unit = "", times_median: float = math.inf) -> Chart:
    """Stacked bars over the training step; all layers have the same steps, of which there is at least one.

    Args:
        title: of the chart.
        layers: from the bottom up.
        unit: of the values.
        times_median: bars higher than so many times the median bar are cut off at that height, so that one
            of them (a first step that compiles) does not hide all others.
    """

    def draw(axes: Axes) -> None:
        thin = [_thinned(layer.steps, layer.values, _MOST_BARS) for layer in layers]
        steps = thin[0][0]
        places = range(len(steps))
        floor = [0.0] * len(steps)
        for layer, (_, values) in zip(layers, thin, strict=True):
            values = [0.0 if math.isnan(value) else value for value in values]
            axes.bar(places, values, bottom=floor, color=_SERIES[layer.colour], width=0.86, linewidth=0)
            floor = [low + value for low, value in zip(floor, values, strict=True)]
        axes.set_xlim(-0.6, max(len(steps), 6) - 0.4)
        limit = times_median * statistics.median(floor)
        if 0 < limit < max(floor):
            axes.set_ylim(top=limit)
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: f"{steps[int(x)]:,.0f}" if x in places else "")
        )

    return Chart(title=title, svg=_svg(title, draw, unit), legend=layers)


def _svg(title: str, draw: object, unit: Unit) -> str:
    assert callable(draw)
    # The salt keeps identifiers of several charts of one page apart.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", linewidth=0.6)
        draw(axes)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if unit == "bytes":
            axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
        elif unit == "rows/s":
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        if unit:
            axes.set_ylabel(unit)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue(), title)


def _themed(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font: \1px system-ui, sans-serif", svg)
    names = {_INK: "ink", _LINE: "line"} | {hex_: f"series-{i}" for i, hex_ in enumerate(_SERIES)}
    for hex_, name in names.items():
        svg = svg.replace(hex_, f"var(--{name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _thinned(
    steps: Sequence[float], values: Sequence[float | None], most: int
) -> tuple[list[float], list[float]]:
    """At most ``most`` points, each the mean of a run of neighbours at the last one's step."""
    run = math.ceil(len(values) / most) or 1
    thin_steps, thin_values = [], []
    for start in range(0, len(values), run):
        known = [v for v in values[start : start + run] if v is not None]
        thin_steps.append(float(steps[min(start + run, len(steps)) - 1]))
        thin_values.append(sum(known) / len(known) if known else math.nan)
    return thin_steps, thin_values


def _value(value: float | None) -> float:
    return math.nan if value is None else value
