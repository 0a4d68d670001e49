"""What all data sets share: settings, the file of one part, and the last steps."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from tightrec.formats.schema import SPLITS, Schema, SparseColumn
from tightrec.trainer.data.prepare.rejects import ErrorMode, Tally
from tightrec.trainer.data.prepare.work import Stage, Work, written

NOT_OUTPUT = ("dst", "overwrite", "restart", "memory_gb", "threads")
"""Settings that leave the output as it is, and so are not recorded in it."""

LENIENT = ("errors", "max_bad_share")
"""Settings that decide whether the work goes on, not what it makes: they may change between two runs."""


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Settings of every data set."""

    src: str
    """What to read."""

    dst: Path
    """Folder to write. It appears when all is done; until then the work lies in DST.partial beside it,
    and the same command continues a run that was broken off."""

    overwrite: bool = False
    """Whether to replace an existing DST, once the new one is complete."""

    restart: bool = False
    """Whether to throw away what an unfinished run left in DST.partial instead of continuing it."""

    errors: ErrorMode = "strict"
    """strict: stop at the first bad line, naming file, line and value. tolerant: count bad lines by kind,
    put a sample of them into DST/rejects.jsonl, and go on without them."""

    max_bad_share: float = 0.01
    """Largest share of bad lines at which errors=tolerant goes on, judged from 1,000 lines on and at the
    end."""

    row_group_rows: int = 8_192
    """Most rows in a parquet row group, the unit of shuffling and of sharing work between ranks."""

    seed: int = 0
    """Seed of the split into train, valid and test, and of any shuffle."""

    def __post_init__(self) -> None:
        if not self.src.strip():
            raise ValueError("src is empty. Name the input.")
        if not self.dst.name:
            raise ValueError(f"dst={self.dst} has no name of its own. Name a folder that does not exist yet.")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share={self.max_bad_share} must lie in [0, 1].")
        if self.row_group_rows < 1:
            raise ValueError(f"row_group_rows={self.row_group_rows} must be at least 1.")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**63).")

    def recorded(self) -> dict[str, Any]:
        """The settings that belong into the output's schema."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in NOT_OUTPUT}
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}

    def output(self) -> dict[str, Any]:
        """The settings that decide the rows of the output: a continued run must have the same."""
        return {key: value for key, value in self.recorded().items() if key not in LENIENT}


def check_shares(valid_share: float, test_share: float) -> None:
    """Refuse shares of the splits that leave nothing to train on.

    Raises:
        ValueError: a share outside [0, 1), or both together at 1 or above.
    """
    if valid_share < 0 or test_share < 0 or valid_share + test_share >= 1:
        raise ValueError(
            f"valid_share={valid_share} and test_share={test_share} must be at least 0 and leave some rows "
            "to train on: together less than 1."
        )


def write_part(folder: Path, split: str, index: int, table: pa.Table, row_group_rows: int) -> None:
    """Write one part of a split, complete or not at all.

    Its row groups are evened out, so that none is left with a handful of rows. Labels and dense values
    take few distinct values and are encoded by dictionary; ids are split into their bytes, which zstd
    packs tighter and several times faster than a dictionary of nearly distinct values.
    """
    path = folder / split / f"part-{index:05d}.parquet"
    path.parent.mkdir(exist_ok=True)
    groups = math.ceil(table.num_rows / row_group_rows)
    ids = {field.name: "BYTE_STREAM_SPLIT" for field in table.schema if field.type == pa.int64()}
    with written(path) as file:
        pq.write_table(
            table,
            file,
            row_group_size=math.ceil(table.num_rows / groups),
            compression="zstd",
            compression_level=1,
            use_dictionary=[name for name in table.column_names if name not in ids],
            column_encoding=ids,
        )


def publish(
    work: Work,
    stage: Stage,
    tally: Tally,
    settings: PrepareSettings,
    console: Console,
    *,
    dense: Sequence[str],
    sparse: Sequence[SparseColumn],
    rows: Mapping[str, int],
    source: str,
    rules: Mapping[str, Any],
) -> Schema:
    """Write schema and rejects beside the finished parts, and make them the destination.

    Raises:
        ValueError: too many bad lines, or no rows to train on.
    """
    tally.close()
    if not rows.get("train"):
        raise ValueError(
            f"src={settings.src} gave no row to train on ({tally.summary()}). Check the input and the split."
        )
    schema = Schema(
        dense=tuple(dense),
        sparse=tuple(sparse),
        label="label",
        rows={split: rows[split] for split in SPLITS if rows.get(split)},
        source=source,
        preparation={
            **settings.recorded(),
            **rules,
            "lines": tally.lines,
            "bad_lines": dict(sorted(tally.bad.items())),
        },
    )
    tally.save(stage.out)
    schema.save(stage.out)
    work.publish(stage)
    told = ", ".join(f"{split} {count:,}" for split, count in schema.rows.items())
    ids = sum(column.cardinality for column in schema.sparse)
    columns = f"{len(dense)} dense columns, {len(sparse)} sparse ones with {ids:,} ids"
    for line in (tally.summary(), f"{settings.dst}: rows {told}; {columns}"):
        console.print(line, highlight=False, soft_wrap=True)
    return schema
