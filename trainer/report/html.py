"""``report.html``: one self-contained page about a run, from its ``run.json`` and ``metrics.jsonl`` alone."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tightrec.trainer.report.charts import Chart, Series, bar_chart, line_chart
from tightrec.trainer.report.compression import compression
from tightrec.trainer.report.figures import count, duration, figure, mean, size, times
from tightrec.trainer.report.page import rendered, write_page
from tightrec.trainer.report.records import read_records, read_run
from tightrec.trainer.step_split import PARTS

REPORT_FILE = "report.html"
_TEMPLATE = "template.html"
_PURPOSES = (("input", "ids"), ("forward", "embeddings"), ("backward", "gradients"))

Record = Mapping[str, Any]


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html``, atomically; returns its path.

    Raises:
        ValueError: ``folder`` holds no readable ``run.json``.
    """
    path = folder / REPORT_FILE
    write_page(path, render(read_run(folder), read_records(folder), folder.resolve().name))
    return path


def render(run: Record, records: Sequence[Record], folder_name: str) -> str:
    """The page about ``run``; whatever a run that ended early has not measured is left out."""
    warnings = dict.fromkeys(r["text"] for r in records if r["kind"] == "warning")
    values = {
        "title": f"{run.get('name') or 'run'} · {folder_name}",
        "status": run.get("status") or "unknown",
        "reason": run.get("reason"),
        "tiles": _tiles(run),
        "charts": _charts(run, records),
        "compression": compression(records),
        "scores": _score_rows(run),
        "has_best": bool(run.get("bayes_auc")),
        "plan": _plan_rows(run),
        "plan_total": _plan_total(run),
        "facts": _facts(run),
        "settings": list(flattened(run.get("config") or {})),
        "warnings": list(warnings),
    }
    return rendered(_TEMPLATE, values)


def flattened(config: Mapping[str, Any], prefix: str = "") -> Sequence[tuple[str, str]]:
    """Dotted names and values of nested mappings, in order."""
    rows: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            rows += flattened(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", "null" if value is None else str(value)))
    return rows


def _tiles(run: Record) -> list[tuple[str, str]]:
    """The few figures that stand on top."""
    tiles = []
    scores = run.get("scores") or {}
    split = next((name for name in ("test", "valid") if name in scores), None)
    if split:
        best = (run.get("bayes_auc") or {}).get(split)
        against = f" of {figure(best)} possible" if best is not None else ""
        tiles.append((f"{split} AUC{against}", figure(scores[split].get("auc"))))
        tiles.append((f"{split} NE", figure(scores[split].get("ne"))))
    if run.get("rows_per_s") is not None:
        tiles.append(("rows/s", count(run["rows_per_s"])))
    sent = run.get("bytes_per_step") or {}
    if sent:
        tiles.append(("sent between ranks a step", size(sum(value or 0 for value in sent.values()))))
    for direction, total in (run.get("compression") or {}).items():
        tiles.append((f"fewer bytes {direction}", times(total.get("ratio"))))
    if run.get("steps") is not None:
        tiles.append(("steps", count(run["steps"])))
    if run.get("seconds") is not None:
        tiles.append(("run time", duration(run["seconds"])))
    return tiles


def _charts(run: Record, records: Sequence[Record]) -> list[Chart]:
    """Every chart for which there is something to draw."""
    train = [r for r in records if r["kind"] == "train"]
    evaluations: dict[str, list[Record]] = {}
    for record in records:
        if record["kind"] == "eval":
            evaluations.setdefault(record["split"], []).append(record)
    steps = [r["step"] for r in train]

    def trained(name: str, label: str, colour: int = 0) -> Series:
        return Series(label=label, steps=steps, values=[r.get(name) for r in train], colour=colour)

    def evaluated(name: str) -> list[Series]:
        return [
            Series(
                label=split,
                steps=[r["step"] for r in found],
                values=[r.get(name) for r in found],
                colour=colour,
                dots=True,
            )
            for colour, (split, found) in enumerate(evaluations.items(), start=1)
        ]

    charts = []
    for name, title in (("loss", "Log loss"), ("ne", "Normalised entropy")):
        series = [trained(name, "train"), *evaluated("log_loss" if name == "loss" else name)]
        if any(_known(one) for one in series):
            charts.append(line_chart(title, series))
    ranked = evaluated("auc")
    if any(_known(one) for one in ranked):
        best = run.get("bayes_auc") or {}
        levels = [
            dataclasses.replace(
                one, label=f"{one.label}: best possible", values=[best[one.label]], level=True
            )
            for one in ranked
            if best.get(one.label) is not None
        ]
        charts.append(line_chart("AUC", [*ranked, *levels]))
    if train:
        charts.append(line_chart("Speed", [trained("rows_per_s", "train")], "rows/s", from_zero=True))
        sent = [trained(f"{purpose}_bytes", label, i) for i, (purpose, label) in enumerate(_PURPOSES)]
        charts.append(bar_chart("Sent between ranks a step", sent, "bytes"))
    sampled = [r for r in records if r["kind"] == "split"]
    if sampled:
        layers = [
            Series(
                label=f"{part.replace('_', ' ')} {figure(mean(r.get(part) for r in sampled), digits=1)} ms",
                steps=[r["step"] for r in sampled],
                values=[r.get(part) for r in sampled],
                colour=colour,
            )
            for colour, part in enumerate(PARTS)
        ]
        charts.append(bar_chart("Where a step's time goes", layers, "ms"))
    return charts


def _known(series: Series) -> bool:
    return any(value is not None for value in series.values)


def _score_rows(run: Record) -> list[list[str]]:
    best = run.get("bayes_auc") or {}
    return [
        [
            split,
            count(s.get("rows")),
            figure(s.get("auc")),
            *([figure(best.get(split))] if best else []),
            *(figure(s.get(name)) for name in ("ne", "log_loss", "calibration", "base_rate")),
            s.get("note") or "",
        ]
        for split, s in (run.get("scores") or {}).items()
    ]


def _plan_rows(run: Record) -> list[list[str]]:
    rows = sorted(run.get("plan") or [], key=lambda r: -(r.get("predicted_bytes_per_step") or 0))
    return [
        [
            str(r.get("table")),
            str(r.get("type")),
            ", ".join(map(str, r.get("ranks") or [])),
            f"{count(r.get('rows'))} × {r.get('dim')}",
            size(r.get("memory_bytes")),
            size(r.get("predicted_bytes_per_step")),
        ]
        for r in rows
    ]


def _plan_total(run: Record) -> str:
    """What the plan promised to send in a step, against what was sent."""
    predicted = sum(row.get("predicted_bytes_per_step") or 0 for row in run.get("plan") or [])
    sent = run.get("bytes_per_step") or {}
    told = f"Predicted in all: {size(predicted)} a step of embeddings and gradients"
    if not sent:
        return f"{told}."
    return f"{told}; measured: {size((sent.get('forward') or 0) + (sent.get('backward') or 0))}."


def _model(found: Record) -> str | None:
    """Parameters and what makes the vectors of the features."""
    if not found:
        return None
    features = ", ".join(f"{name} {number}" for name, number in found["features"].items() if number)
    return f"{count(found['parameters'])} parameters, {size(found['bytes'])}; features: {features}"


def _facts(run: Record) -> list[tuple[str, str]]:
    """What it takes to run the run again, and where it ran."""
    host = run.get("host") or {}
    rows = run.get("rows") or {}
    facts = {
        "command": run.get("command"),
        "started": run.get("started"),
        "ended": run.get("ended"),
        "earlier parts": len(run.get("earlier") or []) or None,
        "seed": run.get("seed"),
        "ranks": f"{run['world']} on {run.get('device')}" if run.get("world") else None,
        "rows": ", ".join(f"{split} {count(n)}" for split, n in rows.items()),
        "model": _model(run.get("size") or {}),
        "checkpoint": run.get("checkpoint"),
        "commit": run.get("git"),
        "versions": ", ".join(f"{name} {v}" for name, v in (run.get("versions") or {}).items()),
        "system": host.get("system"),
        "processor": f"{host['processor']}, {host.get('cores')} cores" if host.get("processor") else None,
        "memory": size(host["memory_bytes"]) if host.get("memory_bytes") else None,
        "GPU": run.get("gpu"),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]
