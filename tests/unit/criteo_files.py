"""Small click logs for the tests of prepare, and what must become of them, worked out line by line."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = [*(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]


def make_line(rng: random.Random) -> str:
    """A good line; small ids are frequent, and every column has blanks."""
    integers = [rng.choice(["", "-1", str(int(rng.paretovariate(0.7)))]) for _ in range(13)]
    ids = [
        "" if rng.random() < 0.1 else f"{int(rng.paretovariate(0.8)) * 0x1234567 % 2**32:08x}"
        for _ in range(26)
    ]
    return "\t".join([rng.choice("0001"), *integers, *ids])


def make_text(rows: int, seed: int = 0) -> bytes:
    rng = random.Random(seed)
    return "".join(make_line(rng) + "\n" for _ in range(rows)).encode()


@dataclass
class Line:
    """One line, taken apart without regard to speed."""

    label: float
    integers: list[int]
    ids: list[int | None]


def take_apart(text: bytes) -> list[Line]:
    lines = [line.split("\t") for line in text.decode().splitlines()]
    return [
        Line(
            label=float(fields[0]),
            integers=[max(int(field or "0"), 0) for field in fields[1:14]],
            ids=[int(field, 16) if field else None for field in fields[14:]],
        )
        for fields in lines
    ]


def numbers_of(train: Sequence[Line], min_count: int) -> list[dict[int | None, int]]:
    """The number of each id of each column that is frequent enough; 0 for a blank."""
    found: list[dict[int | None, int]] = []
    for column in range(26):
        counts = Counter(line.ids[column] for line in train if line.ids[column] is not None)
        chosen = sorted(key for key, count in counts.items() if count >= min_count)
        found.append({None: 0, **{key: 2 + at for at, key in enumerate(chosen)}})
    return found


def read_split(folder: Path, split: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted((folder / split).iterdir())])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def words(**settings: Any) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]
