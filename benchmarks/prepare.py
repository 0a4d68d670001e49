"""Rows per second and peak memory of preparing Criteo's click logs, against torchrec's own way.

    python benchmarks/prepare.py [sizes_gb=0.5,2] [torchrec_rows=200000] [folder=FOLDER] [key=value ...]

Generates click logs of the given sizes, converts each with ``tightrec.trainer.data.prepare criteo`` (both
passes, from text to parquet), and the first ``torchrec_rows`` lines with
``torchrec.datasets.criteo.BinaryCriteoUtils.tsv_to_npys``, which holds all rows in memory and would not fit
for the sizes themselves; its rate does not depend on the size. Each conversion is a process of its own, timed
from after its imports. All else, such as ids=hash or memory_gb=1, is handed on. The files are removed.
"""

import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from os import sched_getaffinity
from pathlib import Path

import numpy as np
from numba import njit

from tightrec.trainer.data.synthetic import KAGGLE

SKEW = 1.1
"""An id's rank r is drawn with density r ** -SKEW."""

BLANK_SHARE = 0.1
CHUNK_ROWS = 100_000
LONGEST_LINE_BYTES = 512

OURS = (
    "from tightrec.trainer.data.prepare.__main__ import main",
    "assert not main(sys.argv[1:])",
)
TORCHREC = (
    "from torchrec.datasets.criteo import BinaryCriteoUtils",
    "BinaryCriteoUtils.tsv_to_npys(sys.argv[1], *(f'{sys.argv[2]}.{part}.npy' for part in range(3)))",
)
CHILD = """
import sys, time
{imports}
begun = time.perf_counter()
{run}
seconds = time.perf_counter() - begun
peak_kib = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(seconds, peak_kib)
"""
"""A process of its own; imports, seconds of them with torch, are not part of the time."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What one conversion took."""

    name: str
    rows: int
    text_bytes: int
    seconds: float
    peak_bytes: int

    @property
    def speed(self) -> float:
        """Rows per second."""
        return self.rows / self.seconds

    def line(self, ratio: float) -> str:
        """The figures as a row of the table."""
        cells = [self.name, f"{self.text_bytes / 1e9:.2f}", f"{self.rows:,}", f"{self.seconds:.1f}"]
        cells += [f"{self.speed:,.0f}", f"{self.peak_bytes / (1 << 20):,.0f}", f"{ratio:.1f}x"]
        return f"| {' | '.join(cells)} |"


def main(words: list[str]) -> None:
    own = {"sizes_gb": "0.5,2", "torchrec_rows": "200000", "folder": ""}
    given = dict(word.split("=", 1) for word in words)
    own |= {key: given.pop(key) for key in list(given) if key in own}
    sizes_gb = [float(size) for size in own["sizes_gb"].split(",")]
    folder = Path(tempfile.mkdtemp(prefix="prepare-", dir=own["folder"] or None))
    try:
        pairs = [measure(folder, size_gb, int(own["torchrec_rows"]), given) for size_gb in sizes_gb]
    finally:
        shutil.rmtree(folder)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torchrec", "pyarrow", "numba", "numpy"))
    print(f"\n{platform.processor() or platform.machine()}, {len(sched_getaffinity(0))} cores")
    print(f"Python {platform.python_version()}, {libraries}")
    print("settings: " + (" ".join(f"{key}={value}" for key, value in given.items()) or "defaults") + "\n")
    print("| conversion | text, GB | rows | seconds | rows/s | peak memory, MiB | rows/s to torchrec |")
    print("|---|---|---|---|---|---|---|")
    for baseline, ours in pairs:
        print(baseline.line(1.0))
        print(ours.line(ours.speed / baseline.speed))


def measure(
    folder: Path, size_gb: float, torchrec_rows: int, settings: dict[str, str]
) -> tuple[Figure, Figure]:
    """Figures of torchrec and of ours, one right after the other."""
    source, part, target = folder / "day_0", folder / "slice.tsv", folder / "out"
    rows = generate(source, int(size_gb * 1e9))
    with source.open("rb") as lines, part.open("wb") as file:
        file.writelines(islice(lines, torchrec_rows))
    torchrec_rows = min(rows, torchrec_rows)
    words = [f"dst={target}", "overwrite=true", *(f"{key}={value}" for key, value in settings.items())]
    # Compiled code comes from the cache, as in every run but the first after an installation.
    convert("warm-up", OURS, torchrec_rows, part, ["criteo", f"src={part}", *words])
    baseline = convert("torchrec tsv_to_npys", TORCHREC, torchrec_rows, part, [str(part), f"{folder}/slice"])
    name = f"tightrec prepare, {size_gb:g} GB"
    return baseline, convert(name, OURS, rows, source, ["criteo", f"src={source}", *words])


def convert(name: str, code: tuple[str, str], rows: int, source: Path, arguments: list[str]) -> Figure:
    child = CHILD.format(imports=code[0], run=code[1])
    command = [sys.executable, "-c", child, *arguments]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, peak_kib = ran.stdout.split()[-2:]
    return Figure(
        name=name,
        rows=rows,
        text_bytes=source.stat().st_size,
        seconds=float(seconds),
        peak_bytes=int(peak_kib) << 10,
    )


def generate(path: Path, text_bytes: int) -> int:
    """Write click logs of about ``text_bytes`` to ``path``; returns the rows."""
    rng = np.random.default_rng([0, *b"benchmark prepare"])
    buffer = np.empty(CHUNK_ROWS * LONGEST_LINE_BYTES, np.uint8)
    rows = written = 0
    with path.open("wb") as file:
        while written < text_bytes:
            labels = (rng.random(CHUNK_ROWS) < 0.03).astype(np.uint8)
            integers = np.floor(rng.pareto(0.8, (CHUNK_ROWS, 13)) * 3).clip(0, 1e6).astype(np.int64) - 1
            # The inverse of the distribution function of the density r ** -SKEW on [1, cardinality].
            power = 1 - SKEW
            tops = np.array(KAGGLE, np.float64) ** power - 1
            ranks = ((1 + rng.random((CHUNK_ROWS, 26)) * tops) ** (1 / power)).astype(np.uint64)
            blank = rng.random((CHUNK_ROWS, 39)) < BLANK_SHARE
            size = _format(labels, integers, ranks, blank, buffer)
            file.write(buffer[:size].data)
            written += size
            rows += CHUNK_ROWS
    return rows


@njit(cache=True)
def _format(labels, integers, ranks, blank, out):  # type: ignore[no-untyped-def]
    """Write the rows to ``out`` as text; returns its length."""
    at = 0
    for row in range(labels.size):
        out[at] = 48 + labels[row]
        at += 1
        for column in range(13):
            out[at] = 9
            at += 1
            if blank[row, column]:
                continue
            value = integers[row, column]
            if value < 0:
                out[at] = 45
                at += 1
                value = -value
            scale = 1
            while scale * 10 <= value:
                scale *= 10
            while scale:
                out[at] = 48 + value // scale % 10
                at += 1
                scale //= 10
        for column in range(26):
            out[at] = 9
            at += 1
            if blank[row, 13 + column]:
                continue
            # An odd multiplier permutes the 32-bit numbers: as many ids as ranks, spread like hashes.
            value = np.uint64((ranks[row, column] + np.uint64(column * 7919)) * np.uint64(2654435761))
            for shift in range(28, -4, -4):
                digit = np.int64(value >> np.uint64(shift)) & 15
                out[at] = 48 + digit if digit < 10 else 87 + digit
                at += 1
        out[at] = 10
        at += 1
    return at


if __name__ == "__main__":
    main(sys.argv[1:])
