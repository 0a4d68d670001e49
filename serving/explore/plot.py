"""The plot of an exploration: quality against latency, what is kept among what was measured."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from tightrec.serving.paths import PathSet, Quality, ServingPath

ROWS = 128
"""Batch size whose latency is drawn: about the mean size of a query in MP-Rec's load."""

_COLOURS = {
    "table": "#4477aa",
    "dhe": "#e08e2b",
    "hybrid": "#2a9d8f",
    "select": "#aa4499",
    "mixed": "#777733",
}
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.minor.visible": False,
    # Else the identifiers inside an SVG differ from run to run.
    "svg.hashsalt": "paths",
}
_GREY, _INK = "#b8bec6", "#333333"
_MARKERS = "os^DvP*X"
_AXIS = {"accuracy": "accuracy, %", "auc": "AUC", "ne": "normalised entropy (less is better)"}


def plot_paths(paths: PathSet, by: Quality, file: Path) -> None:
    """Write the plot to ``file``, as SVG or PNG by its suffix; the same ``paths`` give the same bytes.

    Paths that are kept are numbered by their latency and named beside the plot; the others are grey. A marker
    is a device, hollow where its profiles were recorded on another machine.
    """
    kept = sorted(paths.paths, key=lambda path: path.profile.expected_ms(ROWS))
    dropped = [path for path, _ in paths.dropped]
    markers = {d.name: _MARKERS[at % len(_MARKERS)] for at, d in enumerate(paths.devices)}
    recorded = {device.name for device in paths.devices if device.recorded}
    with matplotlib.rc_context(_STYLE):
        # A name takes a fifth of an inch.
        figure = Figure(figsize=(9.6, max(4.2, 1.4 + 0.2 * len(kept))), layout="constrained")
        axes = figure.subplots()
        for path in dropped:
            _draw(axes, path, by, markers, _GREY, recorded, size=5)
        handles = []
        for number, path in enumerate(kept, 1):
            colour = _COLOURS.get(path.representation, _INK)
            handles.append(_draw(axes, path, by, markers, colour, recorded, size=7))
            place = path.profile.expected_ms(ROWS), _height(path, by)
            # Neighbours by latency stand above and below, so that their numbers do not cover each other.
            offset = (4, 4) if number % 2 else (4, -11)
            axes.annotate(str(number), place, xytext=offset, textcoords="offset points", color=_INK)
        labels = [f"{number}  {path.name}{_mark(path, recorded)}" for number, path in enumerate(kept, 1)]
        _finish_axes(axes, by, [*kept, *dropped])
        if dropped:
            handles.append(Line2D([], [], marker="o", linestyle="", color=_GREY, markersize=5))
            labels.append(f"not kept ({len(dropped)})")
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
        axes.set_title(f"Quality against the latency of {ROWS} rows", fontsize=10, loc="left")
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)


def _draw(
    axes: Axes,
    path: ServingPath,
    by: Quality,
    markers: dict[str, str],
    colour: str,
    recorded: set[str],
    *,
    size: float,
) -> Line2D:
    (line,) = axes.plot(
        path.profile.expected_ms(ROWS),
        _height(path, by),
        linestyle="",
        marker=markers.get(path.device, "o"),
        markersize=size,
        color=colour,
        markerfacecolor="none" if path.device in recorded else colour,
        clip_on=False,
    )
    return line


def _finish_axes(axes: Axes, by: Quality, paths: Sequence[ServingPath]) -> None:
    axes.set_xscale("log")
    times = [path.profile.expected_ms(ROWS) for path in paths]
    axes.set_xlim(min(times) / 1.3, max(times) * 1.3)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel(f"median latency of {ROWS} rows, ms")
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes.set_ylabel(_AXIS[by])
    if by == "ne":
        axes.invert_yaxis()
    axes.grid(linewidth=0.5, color="#e6e8eb")


def _height(path: ServingPath, by: Quality) -> float:
    return 100 * path.accuracy if by == "accuracy" else float(getattr(path, by))


def _mark(path: ServingPath, recorded: set[str]) -> str:
    return " (recorded)" if path.device in recorded else ""
