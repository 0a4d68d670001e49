"""From a checkpoint to a published snapshot: read, calibrate, choose types, write, verify, rename.

checkpoint ──► parts (float32, only rows that held-out rows look up) ──► ranges, plan
    │                                                                        │
    └── table by table ──► packed rows ──► OUT.partial-PID ◄─────────────────┘
                                               │ loaded as it will be served, verified against the parts
                                               ▼
                                              OUT
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tightrec.formats.columns import Columns
from tightrec.formats.schema import load_schema
from tightrec.snapshot import store
from tightrec.snapshot.calibrate import chosen_ranges, input_histograms
from tightrec.snapshot.config import ExportConfig, PrecisionConfig
from tightrec.snapshot.loader import load
from tightrec.snapshot.monitor import score_histogram
from tightrec.snapshot.parts import Parts, logits_of, pack_table, read_parts
from tightrec.snapshot.plans import AUTO, forced_plan
from tightrec.snapshot.precision import Plan
from tightrec.snapshot.publish import require_free
from tightrec.snapshot.ranges import Histogram
from tightrec.snapshot.rows import read_rows
from tightrec.snapshot.search import Found, search, sensitivity_json
from tightrec.snapshot.source import Checkpoint, open_checkpoint
from tightrec.snapshot.verify import Verification, verify

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Material:
    """A checkpoint and held-out rows, read once, from which plans are made and verified."""

    checkpoint: Checkpoint
    """Where whole tables are."""

    parts: Parts
    """The float32 model on what the rows look up."""

    search_rows: Columns | None
    """Rows to choose on, as in the data set; None: there are none."""

    verify_rows: Columns | None
    """Rows to verify on."""

    histograms: dict[str, Histogram]
    """Of every layer's input over ``search_rows``."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What became of an export."""

    path: Path
    """The snapshot's folder; not there where the verification failed."""

    plan: Plan
    """Its types."""

    verification: Verification | None
    """None where none was asked for."""

    found: Found | None
    """The search, where there was one."""


def export(config: ExportConfig, say: Say) -> Exported:
    """Make, verify and publish a snapshot.

    Raises:
        ValueError: a setting that does not fit, a damaged checkpoint, ``out`` is taken.
    """
    store.tidy(config.out)
    require_free(config.out, config.replace)
    material = gather(open_checkpoint(config.checkpoint), config, verified=config.verify)
    plan, found = choose(material, config, say)
    partial = store.partial_of(config.out)
    try:
        verification = build(material, plan, found, partial, config, verified=config.verify)
        if verification is None or verification.passed:
            store.publish(partial, config.out, config.replace)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(path=config.out, plan=plan, verification=verification, found=found)


def gather(checkpoint: Checkpoint, config: PrecisionConfig, *, verified: bool) -> Material:
    """Read what choosing and verifying need, table by table.

    Raises:
        ValueError: rows are needed and there are none; the checkpoint is damaged.
    """
    folder = config.data or (Path(checkpoint.data) if checkpoint.data else None)
    wanted = {
        "search_split": config.precision == AUTO or config.ranges != "dynamic",
        "verify_split": verified,
    }
    rows: dict[str, Columns | None] = dict.fromkeys(wanted)
    for setting, needed in wanted.items():
        if needed and folder is None:
            raise ValueError(
                f"{checkpoint.path} names no held-out rows. Give data=FOLDER, a prepared folder, or "
                "precision=TYPE ranges=dynamic verify=false."
            )
        if needed and folder is not None:
            rows[setting] = _rows(checkpoint, folder, setting, config)
    parts = read_parts(checkpoint, [columns for columns in rows.values() if columns is not None])
    histograms: dict[str, Histogram] = {}
    if (searched := rows["search_split"]) is not None and config.ranges != "dynamic":
        scorer = parts.scorer(parts.exact)
        histograms = input_histograms(scorer, parts.narrowed(searched), config.batch_size)
    return Material(
        checkpoint=checkpoint,
        parts=parts,
        search_rows=searched,
        verify_rows=rows["verify_split"],
        histograms=histograms,
    )


def _rows(checkpoint: Checkpoint, folder: Path, setting: str, config: PrecisionConfig) -> Columns:
    split = getattr(config, setting)
    splits = load_schema(folder).rows
    if split not in splits:
        raise ValueError(f"{folder} has no split {split!r}, only {', '.join(splits)}. Give {setting}=NAME.")
    limit = config.search_rows if setting == "search_split" else config.verify_rows
    return read_rows(folder, split, limit, checkpoint.schema)


def choose(material: Material, config: PrecisionConfig, say: Say) -> tuple[Plan, Found | None]:
    """The plan that ``config.precision`` asks for, searched where it is ``auto``."""
    parts = material.parts
    if config.precision != AUTO:
        return forced_plan(config, list(parts.tables), list(parts.layers)), None
    assert material.search_rows is not None
    found = search(parts, parts.narrowed(material.search_rows), material.histograms, config, say)
    return found.plan, found


def build(
    material: Material,
    plan: Plan,
    found: Found | None,
    partial: Path,
    config: PrecisionConfig,
    *,
    verified: bool,
) -> Verification | None:
    """Write the snapshot of ``plan`` into the folder ``partial``, load it from there and verify it.

    The folder is whole afterwards, and holds its verification whether it passed or not.
    """
    checkpoint, parts = material.checkpoint, material.parts
    ranges = chosen_ranges(
        material.histograms,
        plan.ranges,
        [name for name, kind in plan.layers.items() if kind == "int8"],
    )
    writer = store.SnapshotWriter(partial)
    for name, kind in plan.tables.items():
        packed = pack_table(name, checkpoint.table(name), kind, plan.row_search)
        writer.write_table(name, kind, checkpoint.model.embedding_dim, packed)
        # Before the next table is read.
        del packed
    layers = {name: layer.stored(plan.layers[name], ranges.get(name)) for name, layer in parts.layers.items()}
    writer.write_dense(layers, parts.extras)
    if found is not None:
        writer.write_file("sensitivity.json", json.dumps(sensitivity_json(found), indent=1).encode())
        from tightrec.snapshot.plot import plot_sensitivity

        with writer.new_file("sensitivity.svg") as path:
            plot_sensitivity(found, path)
    facts: dict[str, Any] = {
        "step": checkpoint.step,
        "source": {"checkpoint": str(checkpoint.path), "fingerprint": checkpoint.fingerprint},
        "model": dataclasses.asdict(checkpoint.model),
        "features": {
            "dense": list(checkpoint.schema.dense),
            "sparse": [dataclasses.asdict(column) for column in checkpoint.schema.sparse],
        },
        "plan": dataclasses.asdict(plan),
        "notes": {"versions": {name: version(name) for name in ("torch", "tightrec")}},
    }
    writer.finish(**facts, verification=None, score_histogram=None)
    served = load(partial).scorer
    rows = material.search_rows if material.verify_rows is None else material.verify_rows
    logits = None if rows is None else logits_of(served, rows, config.batch_size)
    verification = None
    if verified:
        assert material.verify_rows is not None
        verification = verify(
            parts.scorer(parts.exact),
            parts.narrowed(material.verify_rows),
            served,
            material.verify_rows,
            split=config.verify_split,
            budget_ne=config.budget_ne,
            batch_size=config.batch_size,
            float32_bytes=parts.plan_bytes(parts.exact),
            snapshot_bytes=parts.plan_bytes(plan),
            logits=logits,
        )
    histogram = None
    if rows is not None and logits is not None:
        probabilities = logits.sigmoid()
        # Scores that are not numbers have no place in it; their verification has failed already.
        if bool(probabilities.isfinite().all()):
            histogram = score_histogram(probabilities.numpy(), rows.labels)
    writer.finish(
        **facts,
        verification=None if verification is None else dataclasses.asdict(verification),
        score_histogram=histogram,
    )
    return verification
