"""The report's section on compression: its course over the run, and what it did to each table."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tightrec.trainer.report.charts import Chart, Series, Unit, bar_chart, line_chart
from tightrec.trainer.report.figures import DASH, count, figure, mean, size, times
from tightrec.trainer.report.page import Grid

DIRECTIONS = ("forward", "backward")
_PARTS = ("encode", "exchange", "decode")
_MOST_TABLES = 100

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What the section shows; both are empty where the run has no such records."""

    charts: Sequence[Chart]
    tables: Sequence[Grid]


def compression(records: Sequence[Record]) -> Compression:
    """The section of a run, from the records of kind ``codec``, ``probe`` and ``choice``."""
    codec = {way: _of(records, "codec", way) for way in DIRECTIONS}
    choices = {way: _of(records, "choice", way) for way in DIRECTIONS}
    probes = [r for r in records if r["kind"] == "probe"]
    charts = [*_codec_charts(codec), *_probe_charts(probes)]
    tables = [
        grid
        for way in DIRECTIONS
        for grid in (_table_grid(way, codec[way], probes), _choice_grid(way, choices[way]))
        if grid is not None
    ]
    return Compression(charts=charts, tables=tables)


def _of(records: Iterable[Record], kind: str, direction: str) -> list[Record]:
    return [r for r in records if r["kind"] == kind and r.get("direction") == direction]


def _codec_charts(codec: Mapping[str, Sequence[Record]]) -> list[Chart]:
    if not any(codec.values()):
        return []

    def by_direction(name: str) -> list[Series]:
        return [
            Series(
                label=way,
                steps=[r["step"] for r in found],
                values=[r.get(name) for r in found],
                colour=colour,
            )
            for colour, (way, found) in enumerate(codec.items())
            if any(r.get(name) is not None for r in found)
        ]

    drawn: list[tuple[str, str, Unit]] = [
        ("Times fewer bytes than plain float32", "ratio", ""),
        ("Sent in frames a step", "sent_bytes", "bytes"),
        ("Bounds multiplied by", "multiplier", ""),
    ]
    charts = []
    for title, name, unit in drawn:
        series = by_direction(name)
        if series:
            charts.append(line_chart(title, series, unit, from_zero=True))
    for way, found in codec.items():
        timed = [r for r in found if any(r.get(f"{part}_ms") is not None for part in _PARTS)]
        if timed:
            layers = [_part_layer(timed, part, colour) for colour, part in enumerate(_PARTS)]
            charts.append(bar_chart(f"Exchange {way}, rank 0", layers, "ms", times_median=4.0))
    return charts


def _part_layer(timed: Sequence[Record], part: str, colour: int) -> Series:
    values = [r.get(f"{part}_ms") for r in timed]
    return Series(
        label=f"{part} {figure(_median(values), digits=2)} ms",
        steps=[r["step"] for r in timed],
        values=values,
        colour=colour,
    )


def _probe_charts(probes: Sequence[Record]) -> list[Chart]:
    if not any(r.get("total_dne") is not None for r in probes):
        return []
    steps = [r["step"] for r in probes]
    series = [Series(label="probed", steps=steps, values=[r.get("total_dne") for r in probes], dots=True)]
    budget = probes[-1].get("budget")
    if budget is not None:
        series.append(Series(label=f"budget {budget:g}", steps=(), values=[budget], colour=1, level=True))
    return [line_chart("Normalised entropy that the bounds cost", series)]


def _table_grid(way: str, found: Sequence[Record], probes: Sequence[Record]) -> Grid | None:
    """One row a table, those that would send most first; rows and bytes are means over the records."""
    tables = _tables(found)
    if not tables:
        return None
    # A probe quantises the rows of the forward exchange.
    dne = _last(probes, "dne") if way == "forward" else {}
    rows = []
    for name, figures in tables.items():
        plain, sent = _sum(figures, "plain_bytes"), _sum(figures, "sent_bytes")
        # Each record stands for a window of about as many steps: the ratio of sums is that of the run.
        ratio = plain / sent if sent else math.nan
        errors = [f["error_over_bound"] for f in figures if f.get("error_over_bound") is not None]
        cells = [
            name,
            count(mean(f.get("rows") for f in figures)),
            count(mean(f.get("distinct") for f in figures)),
            size(mean(f.get("plain_bytes") for f in figures)),
            size(mean(f.get("sent_bytes") for f in figures)),
            times(ratio),
            figures[-1].get("bound") or DASH,
            figure(max(errors, default=math.nan), digits=3),
            figures[-1].get("mode") or DASH,
            *([f"{dne[name]:+.6f}" if name in dne else DASH] if dne else []),
        ]
        rows.append((plain, cells))
    rows.sort(key=lambda row: -row[0])
    headings = [
        "table",
        "rows",
        "distinct",
        "float32",
        "sent",
        "ratio",
        "bound",
        "worst error / bound",
        "mode",
    ]
    return Grid(
        title=f"Tables {way}: rows and bytes between ranks a step",
        headings=[*headings, *(["NE cost"] if dne else [])],
        rows=[cells for _, cells in rows[:_MOST_TABLES]],
        note=_left_out(len(rows)),
    )


def _choice_grid(way: str, found: Sequence[Record]) -> Grid | None:
    """Why each table is sent the way it is, by the last record."""
    if not found:
        return None
    last = found[-1]
    rows = [
        [
            name,
            choice.get("mode") or DASH,
            figure(choice.get("predicted_ms"), digits=3),
            figure(choice.get("measured_ms"), digits=3),
            choice.get("reason") or DASH,
        ]
        for name, choice in sorted(
            last["tables"].items(), key=lambda item: -(item[1].get("predicted_ms") or 0.0)
        )
    ]
    link = last.get("link_gb_s")
    told = [f"Chosen after step {last['step']:,}."]
    if link is not None:
        told.append(f"The link was measured at {link:.3g} GB/s.")
    if last.get("plain"):
        told.append("It is too fast to gain, so float32 is sent.")
    return Grid(
        title=f"Choice of modes {way}",
        headings=["table", "mode", "predicted ms", "measured ms", "why"],
        rows=rows[:_MOST_TABLES],
        words=(4,),
        note=" ".join([*told, _left_out(len(rows))]).strip(),
    )


def _left_out(tables: int) -> str:
    more = tables - _MOST_TABLES
    return f"{more:,} more tables stand in metrics.jsonl." if more > 0 else ""


def _tables(found: Iterable[Record]) -> dict[str, list[Record]]:
    """Every record's figures by table."""
    tables: dict[str, list[Record]] = {}
    for record in found:
        for name, figures in (record.get("tables") or {}).items():
            tables.setdefault(name, []).append(figures)
    return tables


def _last(found: Iterable[Record], name: str) -> dict[str, float]:
    """The last known value of a figure by table."""
    return {
        table: figures[name]
        for record in found
        for table, figures in (record.get("tables") or {}).items()
        if figures.get(name) is not None
    }


def _sum(figures: Iterable[Record], name: str) -> float:
    return sum(f.get(name) or 0 for f in figures)


def _median(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else math.nan
