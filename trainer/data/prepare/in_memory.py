"""Data sets that fit in memory: shuffled as a whole, split at random, and written part by part."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from tightrec.formats.schema import SPLITS, Schema, SparseColumn
from tightrec.trainer.data.prepare import inputs
from tightrec.trainer.data.prepare.common import PrepareSettings, check_shares, publish, write_part
from tightrec.trainer.data.prepare.progress import Meter
from tightrec.trainer.data.prepare.rejects import Faults, Reject, Tally
from tightrec.trainer.data.prepare.work import Work

PART_ROWS = 1 << 18


@dataclass(frozen=True, kw_only=True)
class InMemorySettings(PrepareSettings):
    """Settings of a data set that fits in memory."""

    valid_share: float = 0.1
    """Share of the rows drawn into the valid split."""

    test_share: float = 0.1
    """Share of the rows drawn into the test split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.valid_share, self.test_share)


@dataclass(frozen=True, kw_only=True)
class Table:
    """All rows of a data set, in the order of the input."""

    columns: pa.Table
    """The columns in the order of the schema: label, dense, sparse."""

    dense: Sequence[str]
    """Names of the dense columns."""

    sparse: Sequence[SparseColumn]
    """The sparse columns."""

    source: str
    """Where the rows came from, in words."""

    rules: Mapping[str, Any]
    """How the columns were made, in words."""


class BadLine(Exception):
    """A line that cannot be used: its kind, the reason in words, and the offending value."""

    def __init__(self, kind: str, reason: str, value: bytes) -> None:
        super().__init__(kind, reason, value)
        self.kind, self.reason, self.value = kind, reason, value


def read_lines(path: Path, parse: Callable[[bytes], None], tally: Tally, console: Console) -> None:
    """Hand each line of ``path``, without its end, to ``parse``, which may raise :class:`BadLine`.

    Raises:
        ValueError: the file cannot be read, or the bad lines are more than ``tally`` allows.
    """
    with Meter(f"reading {path.name}", path.stat().st_size, 0, console) as meter:
        for piece in inputs.pieces([path], inputs.WINDOW_BYTES, 0, inputs.Position()):
            faults = Faults()
            for number, line in piece.numbered_lines():
                try:
                    if b"\0" in line:
                        raise BadLine("NUL byte", "the line holds a NUL byte", line)
                    parse(line)
                except BadLine as bad:
                    faults.add(Reject.of(str(path), number, bad.kind, bad.reason, bad.value))
            if piece.problem:
                faults.add(piece.fault(path))
            tally.add(piece.lines, faults)
            meter.update(piece.read_bytes, piece.lines)


def split_line(line: bytes, separator: bytes, columns: int) -> list[bytes]:
    """The fields of ``line``.

    Raises:
        BadLine: there are not ``columns`` of them.
    """
    fields = line.split(separator)
    if len(fields) != columns:
        raise BadLine("column count", f"{len(fields)} columns where {columns} belong", line)
    return fields


def number(field: bytes, name: str) -> int:
    """``field``, the value of the column ``name``, as a non-negative integer.

    Raises:
        BadLine: it is none.
    """
    if not field.isdigit():
        raise BadLine("integer", f"{name} is not a non-negative integer", field)
    return int(field)


def codes(values: Sequence[Any]) -> tuple[np.ndarray, int]:
    """Each of ``values`` as its place among the distinct ones in ascending order, and how many these are."""
    distinct, places = np.unique(np.array(values), return_inverse=True)
    return places.astype(np.int64), len(distinct)


def write(
    table: Table,
    settings: InMemorySettings,
    work: Work,
    files: Sequence[Path],
    tally: Tally,
    console: Console,
) -> Schema:
    """Shuffle and split ``table`` and make it the destination, leaving out parts that are already written.

    Raises:
        ValueError: no rows, too many bad lines, or an unfinished run with other settings.
    """
    order = np.random.default_rng([settings.seed, *b"prepare"]).permutation(table.columns.num_rows)
    inside = {"files": inputs.identity(files), "lines": tally.lines, "bad": dict(tally.bad)}
    stage = work.stage("write", {**settings.output(), **inside})
    rows = dict(zip(SPLITS, _sizes(len(order), settings.valid_share, settings.test_share), strict=True))
    for at, (split, index, chosen) in enumerate(_parts(order, rows)):
        if at >= len(stage.entries):
            part = table.columns.take(pa.array(chosen))
            write_part(stage.out, split, index, part, settings.row_group_rows)
            stage.finish({"split": split, "part": index})
    return publish(
        work,
        stage,
        tally,
        settings,
        console,
        dense=table.dense,
        sparse=table.sparse,
        rows=rows,
        source=table.source,
        rules={"split_rule": "all rows shuffled, then cut into train, valid and test", **table.rules},
    )


def _sizes(rows: int, valid_share: float, test_share: float) -> tuple[int, int, int]:
    valid, test = round(rows * valid_share), round(rows * test_share)
    return rows - valid - test, valid, test


def _parts(order: np.ndarray, rows: Mapping[str, int]) -> Iterator[tuple[str, int, np.ndarray]]:
    """Split, number and rows of each part."""
    start = 0
    for split, count in rows.items():
        for index, first in enumerate(range(start, start + count, PART_ROWS)):
            yield split, index, order[first : min(first + PART_ROWS, start + count)]
        start += count
