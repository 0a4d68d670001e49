"""What low-precision snapshots of trained runs cost in quality, and how small they are.

    make bench SCRIPT=snapshot_quality ARGS="runs=runs/movielens/DATE_TIME,runs/jester/DATE_TIME"

Every line is a snapshot that the exporter builds, loads and verifies, on all rows of the run's test split;
ranges and types are chosen on its validation split, as an export does. Everything is read once a run.

- ``int8``, ``fp16``: tables and layers of that type; ``int8, METHOD``: ranges of the layers' inputs by that
  method, ``dynamic`` finds them in every row anew.
- ``int4 min-max``, ``int4 greedy``, ``int2 greedy``: tables of that type, rows' ranges found so; layers int8.
- ``tables int8`` and so on: layers stay float32, so that the tables' part of a loss can be seen.
- ``auto``: the smallest mixture within ``budget_ne``, searched.

An NE loss is NE divided by float32's on the same rows, minus 1, with the standard error of the difference.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from snapshot_models import machine, shape_line

from tightrec.formats.settings import from_words
from tightrec.formats.usage import describe
from tightrec.snapshot.config import PrecisionConfig
from tightrec.snapshot.export import Material, build, choose, gather
from tightrec.snapshot.plans import AUTO
from tightrec.snapshot.precision import RANGE_METHODS, Plan
from tightrec.snapshot.source import open_checkpoint
from tightrec.snapshot.verify import Verification

ALL = 1 << 62
"""Rows: more than there are."""

DEFAULT_RANGES = PrecisionConfig().ranges

INT8_LOSS, INT8_SIZE, AUTO_SIZE = 0.0002, 0.30, 0.20
"""Goals: NE loss of int8 everywhere, and sizes as shares of float32's."""


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """The words of this script."""

    runs: str
    """Folders of trained runs, by commas."""

    budget_ne: float = 0.0002
    """Of ``auto``."""

    search_rows: int = 100_000
    """Rows of the validation split that ranges and types are chosen on."""

    only: str | None = None
    """Names of lines with + between them; null: all."""

    threads: int = 1
    """Of torch."""

    folder: Path | None = None
    """Where snapshots are written meanwhile; null: the system's temporary folder."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One line of the table."""

    name: str
    precision: str
    """As of an export; ``tables TYPE`` leaves the layers in float32."""
    row_search: str = "greedy"
    ranges: str = DEFAULT_RANGES


WAYS = (
    Way(name="int8", precision="int8"),
    *(
        Way(name=f"int8, {method}", precision="int8", ranges=method)
        for method in RANGE_METHODS
        if method != DEFAULT_RANGES
    ),
    Way(name="fp16", precision="fp16"),
    Way(name="int4 min-max", precision="int4", row_search="min_max"),
    Way(name="int4 greedy", precision="int4"),
    Way(name="int2 greedy", precision="int2"),
    Way(name="tables int8", precision="tables int8"),
    Way(name="tables int4 min-max", precision="tables int4", row_search="min_max"),
    Way(name="tables int4 greedy", precision="tables int4"),
    Way(name="tables int2 greedy", precision="tables int2"),
    Way(name="auto", precision=AUTO),
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A built and verified snapshot."""

    way: Way
    plan: Plan
    verification: Verification

    @property
    def size(self) -> float:
        """As a share of float32's."""
        return self.verification.snapshot_bytes / self.verification.float32_bytes


def build_one(material: Material, way: Way, config: PrecisionConfig, folder: Path) -> Found:
    """Build, load and verify one snapshot below ``folder``."""
    tables_only = way.precision.startswith("tables ")
    precision = way.precision.removeprefix("tables ")
    own = dataclasses.replace(config, precision=precision, row_search=way.row_search, ranges=way.ranges)  # type: ignore[arg-type]
    plan, found = choose(material, own, lambda line: print(f"  {way.name}: {line}", flush=True))
    if tables_only:
        plan = dataclasses.replace(plan, layers=dict.fromkeys(plan.layers, "fp32"))
    with tempfile.TemporaryDirectory(prefix="snapshot-quality-", dir=folder) as partial:
        verification = build(material, plan, found, Path(partial, "snapshot"), own, verified=True)
    assert verification is not None
    return Found(way=way, plan=plan, verification=verification)


def table(found: Sequence[Found]) -> str:
    heads = ["snapshot", "NE loss, %", "AUC change", "size, %", "worst score change", "99.9 %"]
    rows = ["| " + " | ".join([*heads, "types"]) + " |", "|---" * (len(heads) + 1) + "|"]
    for one in found:
        verdict = one.verification
        cells = [
            one.way.name,
            f"{100 * verdict.ne_loss:+.4f} ± {100 * verdict.ne_loss_error:.4f}",
            f"{verdict.snapshot['auc'] - verdict.float32['auc']:+.5f}",
            f"{100 * one.size:.1f}",
            f"{verdict.worst_change:.2g}",
            f"{verdict.p999_change:.2g}",
            one.plan.counts,
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def goal_lines(found: Sequence[Found], budget_ne: float) -> list[str]:
    """How int8 and auto stand to their goals."""
    goals = {"int8": (INT8_LOSS, INT8_SIZE), AUTO: (budget_ne, AUTO_SIZE)}
    said = []
    for one in found:
        if one.way.name in goals:
            loss, size = goals[one.way.name]
            for what, value, most in (("NE loss", one.verification.ne_loss, loss), ("size", one.size, size)):
                verdict = "met" if value <= most else "MISSED"
                said.append(f"goal: {one.way.name}: {what} at most {most:.2%}: {value:.4%}, {verdict}")
    return said


def measure(run: Path, ways: Sequence[Way], config: QualityConfig) -> None:
    checkpoint = open_checkpoint(run)
    precision = PrecisionConfig(
        precision=AUTO, budget_ne=config.budget_ne, search_rows=config.search_rows, verify_rows=ALL
    )
    material = gather(checkpoint, precision, verified=True)
    print(f"\n{run}, step {checkpoint.step}: {shape_line(checkpoint.model, checkpoint.schema)}", flush=True)
    begin, found = time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="snapshot-quality-", dir=config.folder) as folder:
        for way in ways:
            try:
                found.append(build_one(material, way, precision, Path(folder)))
            except ValueError as error:
                print(f"  {way.name}: {error}", flush=True)
    if found:
        verdict = found[0].verification
        print(
            f"{verdict.rows:,} test rows, types and ranges from {config.search_rows:,} validation rows; "
            f"float32: NE {verdict.float32['ne']:.5f}, AUC {verdict.float32['auc']:.5f}, "
            f"{verdict.float32_bytes / 1e6:.2f} MB; {time.perf_counter() - begin:.0f} s\n\n{table(found)}\n"
        )
        print("\n".join(goal_lines(found, config.budget_ne)), flush=True)


def main(words: Sequence[str]) -> int:
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        print(describe("snapshot_quality", QualityConfig))
        return 0 if words else 2
    try:
        config = from_words(QualityConfig, words, "snapshot_quality")
        names = [way.name for way in WAYS]
        wanted = names if config.only is None else [name.strip() for name in config.only.split("+")]
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise ValueError(f"only: {unknown[0]!r} is unknown; there are {', '.join(names)}.")
        torch.set_num_threads(config.threads)
        print(machine(config.threads))
        for run in config.runs.split(","):
            measure(Path(run), [way for way in WAYS if way.name in wanted], config)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
