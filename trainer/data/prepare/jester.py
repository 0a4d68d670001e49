"""Jester dataset 1: who liked which joke.

Nearly every user rated the ten jokes of the gauge set (Goldberg, Roeder, Gupta and Perkins, "Eigentaste: a
constant time collaborative filtering algorithm", 2001). Their ratings describe the user: as ten dense
columns, and once more as ten ids by level. Each rating of another joke is a row.
"""

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from rich.console import Console

from tightrec.formats.schema import Schema, SparseColumn
from tightrec.trainer.data.prepare import inputs
from tightrec.trainer.data.prepare.in_memory import (
    BadLine,
    InMemorySettings,
    Table,
    read_lines,
    split_line,
    write,
)
from tightrec.trainer.data.prepare.rejects import Tally
from tightrec.trainer.data.prepare.work import Work

JOKES = 100
GAUGE = (5, 7, 8, 13, 15, 16, 17, 18, 19, 20)
"""Numbers, from 1, of the jokes of the gauge set."""

MOST = 10.0
"""Ratings lie in [-MOST, MOST]."""

UNRATED = 99.0
LEVELS = 20
"""Levels of equal width that a gauge rating is cut into."""

_NUMBER = re.compile(rb"-?\d+(\.\d*)?|-?\.\d+")
_LINE = re.compile(rb"\d+(?:,(?:-?\d+(?:\.\d*)?|-?\.\d+)){%d}" % JOKES)


@dataclass(frozen=True, kw_only=True)
class JesterSettings(InMemorySettings):
    """Settings of ``prepare jester``."""

    src: str
    """The folder that holds jester-data-1.csv (plain, .gz or .xz): for each user the number of ratings and
    the ratings of the 100 jokes, -10 to 10, or 99 for none."""


def prepare(settings: JesterSettings, console: Console) -> Schema:
    """Prepare Jester dataset 1 as ``settings`` say.

    Raises:
        ValueError: whatever is wrong with the settings, the input or what an earlier run left.
    """
    file = inputs.find(settings.src, "jester-data-1.csv")
    with Work(settings.dst, overwrite=settings.overwrite, restart=settings.restart) as work:
        tally = Tally(settings.errors, settings.max_bad_share)
        users: list[np.ndarray] = []
        read_lines(file, lambda line: users.append(ratings_of(line)), tally, console)
        table = _table(np.array(users, np.float32).reshape(-1, JOKES))
        return write(table, settings, work, [file], tally, console)


def ratings_of(line: bytes) -> np.ndarray:
    """The ratings [100] of one user.

    Raises:
        BadLine: a wrong number of columns, what is not a number, a rating out of range, or a count in the
            first column that is not that of the ratings.
    """
    fields = split_line(line, b",", 1 + JOKES)
    if not _LINE.fullmatch(line):
        at = next((i for i, field in enumerate(fields) if i and not _NUMBER.fullmatch(field)), 0)
        what = f"the rating of joke {at}" if at else "the number of ratings"
        raise BadLine("number", f"{what} is not a number", fields[at])
    ratings = np.array(fields[1:], dtype="S").astype(np.float64)
    wrong = np.flatnonzero((np.abs(ratings) > MOST) & (ratings != UNRATED))
    if len(wrong):
        at = int(wrong[0]) + 1
        raise BadLine("rating", f"the rating of joke {at} is neither within -10 and 10 nor 99", fields[at])
    rated = int((ratings != UNRATED).sum())
    if rated != int(fields[0]):
        raise BadLine(
            "rating count", f"the first column does not tell the {rated} ratings of the line", fields[0]
        )
    return ratings.astype(np.float32)


def _table(ratings: np.ndarray) -> Table:
    """One row for each rating [users, jokes] of a joke outside the gauge set."""
    gauge = np.array(GAUGE) - 1
    others = np.setdiff1d(np.arange(JOKES), gauge)
    users, jokes = np.nonzero(ratings[:, others] != UNRATED)
    given = ratings[:, gauge] != UNRATED
    dense = np.where(given, ratings[:, gauge] / np.float32(MOST), np.float32(0))
    levels = np.floor((ratings[:, gauge] + MOST) * (LEVELS / (2 * MOST))).clip(0, LEVELS - 1) + 1
    levels = np.where(given, levels, 0).astype(np.int64)
    liked = ratings[users, others[jokes]] > 0
    columns = {
        "label": liked.astype(np.float32),
        **{f"gauge_{joke}": dense[users, at] for at, joke in enumerate(GAUGE)},
        "user": users.astype(np.int64),
        "joke": jokes.astype(np.int64),
        **{f"gauge_{joke}_level": levels[users, at] for at, joke in enumerate(GAUGE)},
    }
    fields = [pa.field(name, pa.from_numpy_dtype(column.dtype), False) for name, column in columns.items()]
    sizes = {"user": len(ratings), "joke": len(others), **{f"gauge_{j}_level": 1 + LEVELS for j in GAUGE}}
    return Table(
        columns=pa.Table.from_arrays([pa.array(c) for c in columns.values()], schema=pa.schema(fields)),
        dense=[f"gauge_{joke}" for joke in GAUGE],
        sparse=[SparseColumn(name=name, cardinality=max(size, 1)) for name, size in sizes.items()],
        source="Jester dataset 1, part 1 (Goldberg et al., Eigentaste, 2001)",
        rules={
            "label_rule": "rating > 0",
            "dense_rule": f"rating of the gauge joke / {MOST:g}, 0 where it is not rated",
            "ids_rule": f"user: line; joke: place among the {len(others)} others; level: 0 not rated, else 1 "
            f"+ floor of the rating on a scale of {LEVELS} levels",
        },
    )
