"""``debug``: float32 and low precision side by side, and the first part that is off by more than it may be.

checkpoint ──► float32 model on the rows that are looked up ──┐
precision=... ──► the same at other types, or                 ├──► stage by stage: differences.py
snapshot=FOLDER ──► as it is served, from its own files ──────┘
                └─► every stored row against the checkpoint's: stored_weights.py
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tightrec.formats.columns import Columns
from tightrec.snapshot.calibrate import chosen_ranges
from tightrec.snapshot.config import PrecisionConfig
from tightrec.snapshot.differences import TABLE, Difference, ScorerInputs, Stage, measure
from tightrec.snapshot.export import Material, Say, choose, gather
from tightrec.snapshot.loader import load
from tightrec.snapshot.manifest import DamagedSnapshot, SnapshotManifest, plain
from tightrec.snapshot.model import Scorer
from tightrec.snapshot.parts import batches
from tightrec.snapshot.source import Checkpoint, open_checkpoint
from tightrec.snapshot.store import check, read_dense, read_manifest
from tightrec.snapshot.stored_weights import Worst, worst_outputs, worst_rows

HEALTHY, BEYOND = 0, 1

TABLE_LIMITS_DB = {"fp32": 100.0, "fp16": 60.0, "int8": 35.0, "int4": 15.0, "int2": 5.0}
"""A table's SQNR must not be lower. Some 5 to 12 dB below what healthy models had, see docs/snapshots.md."""

LAYER_LIMITS_DB = {"fp32": 100.0, "fp16": 60.0, "bf16": 42.0, "int8": 25.0}
"""The SQNR of a layer fed with float32 values must not be lower. Likewise."""

STORED_LIMIT = 1.5
"""A stored row may be this many times farther from float32 than the same row packed anew."""


@dataclass(frozen=True, kw_only=True)
class DebugConfig(PrecisionConfig):
    """``debug``: where low precision loses what, stage by stage."""

    checkpoint: Path
    """A run folder (its newest complete checkpoint) or one ``step-...`` folder in it."""

    snapshot: Path | None = None
    """Compare this snapshot of the checkpoint as it is stored, types and ranges too: then ``precision``,
    ``row_search`` and ``ranges`` are not looked at. None: the model at ``precision``."""

    verify_rows: int = 4096
    """Rows of ``verify_split`` that are run through both, evenly spread; all if fewer."""

    sqnr_db: float | None = None
    """A table or layer whose own SQNR is lower is beyond; None: a limit by type, see docs/snapshots.md."""

    gathered_db: float | None = None
    """A stage whose SQNR with all errors before it is lower is beyond; None: only what is not finite is."""

    json: Path | None = None
    """File to write the figures to as well."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A stage that is beyond its limits."""

    stage: str
    """Its name."""

    problem: str
    """What is wrong, in words that follow the name."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a comparison found."""

    stages: list[Stage]
    """In the order in which they run."""

    stored: Mapping[str, Worst]
    """Worst stored row by stage's name; empty without a snapshot."""

    findings: list[Finding]
    """In the same order; empty: everything is within its limits."""

    rows: int
    """Rows that were run through both."""

    @property
    def first(self) -> Finding | None:
        """Where to look first."""
        return self.findings[0] if self.findings else None


def debug(config: DebugConfig, say: Say) -> int:
    """Compare, print the table, name the first stage beyond its limits; 0: there is none, 1: there is.

    Raises:
        ValueError: a setting that does not fit, no rows, a snapshot of another checkpoint.
    """
    if config.json and not config.json.parent.is_dir():
        raise ValueError(
            f"json={config.json}: the folder {config.json.parent} does not exist. Make it first."
        )
    checkpoint = open_checkpoint(config.checkpoint)
    try:
        report = _stored(checkpoint, config, say) if config.snapshot else _planned(checkpoint, config, say)
    except DamagedSnapshot as error:
        # Not a mistake of the caller's: what is broken is what was asked for.
        say(str(error))
        return BEYOND
    for line in table_lines(report):
        say(line)
    if config.json:
        _write(config.json, as_json(report))
    for line in verdict(report):
        say(line)
    return BEYOND if report.findings else HEALTHY


def _planned(checkpoint: Checkpoint, config: DebugConfig, say: Say) -> Report:
    """The model at the types that the settings ask for, packed here."""
    material = gather(checkpoint, config, verified=True)
    plan, _ = choose(material, config, say)
    int8 = [name for name, kind in plan.layers.items() if kind == "int8"]
    ranges = chosen_ranges(material.histograms, plan.ranges, int8)
    low = material.parts.scorer(plan, ranges)
    narrowed = material.parts.narrowed(_rows(material))
    kinds = _kinds(plan.tables, plan.layers)
    return _report(material, low, narrowed, kinds, config, ranges, {})


def _stored(checkpoint: Checkpoint, config: DebugConfig, say: Say) -> Report:
    """The snapshot as it would be served."""
    assert config.snapshot is not None
    # Resolved once: a link such as a watcher's `current` may move on while files are read.
    folder = config.snapshot.resolve()
    manifest = read_manifest(folder)
    if manifest.source.get("fingerprint") != checkpoint.fingerprint:
        raise ValueError(
            f"{config.snapshot} was not made from {checkpoint.path} but from "
            f"{manifest.source.get('checkpoint', 'another checkpoint')} (step {manifest.step}). Give "
            "checkpoint=... that one."
        )
    try:
        check(folder, manifest)
    except DamagedSnapshot as error:
        say(f"Files differ from the manifest ({error.problem}); compared all the same:")
    # The types are the snapshot's, so that nothing has to be chosen or calibrated.
    chosen = dataclasses.replace(config, precision="int8", ranges="dynamic")
    material = gather(checkpoint, chosen, verified=True)
    layers, extras = read_dense(folder, manifest)
    stored = {f"{TABLE}{n}": w for n, w in worst_rows(folder, manifest, checkpoint.table)}
    stored |= worst_outputs(layers, material.parts.layers)
    stored |= {name: _same(extras.get(name), wanted) for name, wanted in material.parts.extras.items()}
    low = load(folder, check=False).scorer
    kinds = _kinds(
        {table.name: table.kind for table in manifest.tables},
        {name: layer.kind for name, layer in manifest.layers.items()},
    )
    return _report(material, low, _rows(material), kinds, config, _ranges(manifest), stored)


def _kinds(tables: Mapping[str, str], layers: Mapping[str, str]) -> dict[str, str]:
    return {f"{TABLE}{name}": kind for name, kind in tables.items()} | dict(layers)


def _ranges(manifest: SnapshotManifest) -> dict[str, tuple[float, float]]:
    return {name: layer.activation for name, layer in manifest.layers.items() if layer.activation}


def _same(found: Tensor | None, wanted: Tensor) -> Worst:
    same = found is not None and found.equal(wanted)
    return Worst(row=0, ratio=0.0 if same else math.inf, rows=1)


def _rows(material: Material) -> Columns:
    assert material.verify_rows is not None
    return material.verify_rows


def _report(
    material: Material,
    low: Scorer,
    columns: Columns,
    kinds: Mapping[str, str],
    config: DebugConfig,
    ranges: Mapping[str, tuple[float, float]],
    stored: Mapping[str, Worst],
) -> Report:
    """Measure and judge; ``columns`` are the rows with the ids that ``low`` knows."""
    parts = material.parts
    exact = parts.scorer(parts.exact)
    narrowed = parts.narrowed(_rows(material))
    weights = {name: (layer.weight, layer.bias) for name, layer in parts.layers.items()}
    stages = measure(exact, low, _pairs(narrowed, columns, config.batch_size), weights)
    for stage in stages:
        stage.kind = kinds.get(stage.name, "")
    # A small tensor of the model's is no stage; what is wrong with it comes before all that use it.
    stages = [Stage(name) for name in stored if name not in {stage.name for stage in stages}] + stages
    findings = [
        Finding(stage=stage.name, problem=problem)
        for stage in stages
        if (problem := _problem(stage, stored.get(stage.name), ranges.get(stage.name), config))
    ]
    if not findings:
        findings = [
            Finding(stage=stage.name, problem="puts out values that are not finite")
            for stage in stages
            if stage.gathered.not_finite
        ]
    return Report(stages=stages, stored=stored, findings=findings, rows=len(columns))


def _pairs(exact: Columns, low: Columns, batch_size: int) -> Iterator[tuple[ScorerInputs, ScorerInputs]]:
    return zip(batches(exact, batch_size), batches(low, batch_size), strict=True)


def _problem(
    stage: Stage, stored: Worst | None, range_: tuple[float, float] | None, config: DebugConfig
) -> str | None:
    """What is wrong with a stage; None: nothing."""
    if stored is not None and not stored.ratio <= STORED_LIMIT:
        return _stored_problem(stage, stored)
    limits = TABLE_LIMITS_DB if stage.name.startswith(TABLE) else LAYER_LIMITS_DB
    limit = config.sqnr_db if config.sqnr_db is not None else limits.get(stage.kind)
    own = stage.own
    if own is not None and limit is not None:
        if own.not_finite:
            return f"({stage.kind}) makes {own.not_finite:,} values that are not finite out of finite ones"
        if stage.own_db < limit:
            range_words = _range_words(stage, range_, stored)
            return f"({stage.kind}) alone leaves {stage.own_db:.1f} dB, limit {limit:g} dB{range_words}"
    if config.gathered_db is not None and stage.gathered.sqnr_db < config.gathered_db:
        return (
            f"is down to {stage.gathered.sqnr_db:.1f} dB, limit {config.gathered_db:g} dB, with the errors "
            "of all before it"
        )
    return None


def _stored_problem(stage: Stage, stored: Worst) -> str:
    if not stage.kind:
        return "is not stored as the checkpoint has it"
    what = "row" if stage.name.startswith(TABLE) else "output"
    if math.isnan(stored.ratio):
        return f"({stage.kind}) has values that are not finite stored in {what} {stored.row:,}"
    return (
        f"({stage.kind}) is stored wrongly: {what} {stored.row:,} of {stored.rows:,} is {stored.ratio:,.3g} "
        f"times farther from float32 than its type needs, limit {STORED_LIMIT:g}"
    )


def _range_words(stage: Stage, range_: tuple[float, float] | None, stored: Worst | None) -> str:
    if range_ is None or stage.taken is None:
        return ""
    fine = "its weights are stored as they should be, but " if stored is not None else ""
    return (
        f"; {fine}its inputs are quantised in [{range_[0]:.4g}, {range_[1]:.4g}] and these rows put "
        f"[{stage.taken[0]:.4g}, {stage.taken[1]:.4g}] into it"
    )


def verdict(report: Report) -> list[str]:
    """The sentences below the table."""
    first = report.first
    if first is None:
        return [f"Every stage is within its limits on {report.rows:,} rows."]
    lines = [f"{first.stage} is the first stage beyond its limits: it {first.problem}."]
    others = [finding.stage for finding in report.findings[1:]]
    if others:
        lines.append(f"Beyond as well: {', '.join(others)}.")
    return lines


def table_lines(report: Report) -> list[str]:
    """The stages as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("stage", no_wrap=True)
    table.add_column("type")
    for title in ("stored", "own dB", "gathered dB", "max error", "cosine"):
        table.add_column(title, justify="right", no_wrap=True)
    beyond = {finding.stage for finding in report.findings}
    for stage in report.stages:
        worst = report.stored.get(stage.name)
        table.add_row(
            ("> " if stage.name in beyond else "  ") + stage.name,
            stage.kind,
            "" if worst is None else f"{worst.ratio:.2f}x",
            "" if stage.own is None else f"{stage.own_db:.1f}",
            f"{stage.gathered.sqnr_db:.1f}",
            f"{stage.gathered.max_error:.2e}",
            f"{stage.gathered.cosine:.6f}",
        )
    # A width of its own: lines must not be cut where the output is no terminal.
    console = Console(width=120, color_system=None)
    with console.capture() as printed:
        console.print(table)
    return [line.rstrip() for line in printed.get().splitlines()]


def as_json(report: Report) -> dict[str, Any]:
    """The same figures in JSON's types; null: not finite, such as the SQNR of what is equal."""
    first = report.first
    return plain(
        {
            "rows": report.rows,
            "first": None if first is None else first.stage,
            "findings": report.findings,
            "stages": [
                {
                    "name": stage.name,
                    "kind": stage.kind,
                    "stored": report.stored.get(stage.name),
                    "own": None if stage.own is None else {"own_db": stage.own_db, **_figures(stage.own)},
                    "gathered": _figures(stage.gathered),
                    "taken": stage.taken,
                }
                for stage in report.stages
            ],
        }
    )


def _figures(difference: Difference) -> dict[str, float]:
    names = ("sqnr_db", "max_error", "cosine", "not_finite")
    return {name: getattr(difference, name) for name in names}


def _write(path: Path, values: Mapping[str, Any]) -> None:
    # Beside and renamed: a reader never sees half a file.
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    partial.rename(path)
