"""Resident memory, load time and speed of snapshots with large tables.

    make bench SCRIPT=snapshot_memory
    make bench SCRIPT=snapshot_memory ARGS="rows=10000000 kinds=fp32,int8,int4"

Writes a snapshot of random tables for each type (``count`` tables of ``rows`` x ``dim``, packed piece by
piece; small MLPs of the same type, int8 beside int4), then loads it in processes of their own and scores rows
of uniform random ids: once with the files dropped from the page cache, once with them in it, both comparing
every SHA-256, and once without comparing. Memory is what /proc/self/smaps_rollup says is resident, private
and shared together, before the load, after it, and after serving; the peak is VmHWM's, with file pages that
the load has mapped. The files are removed; the largest type needs its size free on the disk, in memory, and
one table more while it is written.

int4 rows are packed by their min-max range: the greedy search gives rows of the same bytes and takes minutes
for ten million.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tightrec.formats.schema import Schema, SparseColumn
from tightrec.formats.settings import from_words
from tightrec.formats.usage import describe
from tightrec.models.config import ModelConfig
from tightrec.snapshot.layers import store_layer
from tightrec.snapshot.loader import load
from tightrec.snapshot.model import layer_specs
from tightrec.snapshot.packed import pack, row_bytes
from tightrec.snapshot.precision import TABLE_TYPES, Plan
from tightrec.snapshot.store import SnapshotWriter

CHUNK_ROWS = 1 << 16
MIB = 1 << 20
DENSE = 4
SERVE = "--serve"
LAYER_TYPES = {"fp32": "fp32", "fp16": "fp16"}
"""By the tables' type; int8 beside the others."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The words of this script."""

    rows: int = 10_000_000
    """Of each table."""

    dim: int = 64
    """Values of a row."""

    count: int = 2
    """Tables."""

    kinds: str = "int8,int4"
    """Types by commas: fp32, fp16, int8, int4, int2."""

    batch: int = 1024
    """Rows of a call while serving."""

    calls: int = 300
    """Calls while serving."""

    threads: int = 1
    """Of torch."""

    folder: Path | None = None
    """Where snapshots are written meanwhile; null: the system's temporary folder."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What one process saw."""

    load_s: float
    before_bytes: int
    loaded_bytes: int
    served_bytes: int
    peak_bytes: int
    rows_per_s: float


def packed_table(rows: int, dim: int, kind: str, seed: int) -> Tensor:
    """uint8 [rows, row_bytes] of normal values; extra memory is that of a piece."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.empty(rows, row_bytes(kind, dim), dtype=torch.uint8)
    for start in range(0, rows, CHUNK_ROWS):
        part = data[start : start + CHUNK_ROWS]
        part.copy_(pack(torch.randn(len(part), dim, generator=generator), kind, "min_max"))
    return data


def write(folder: Path, config: MemoryConfig, kind: str) -> int:
    """Write the snapshot of ``kind``; returns the bytes of its weights."""
    # Deferred here and below: it imports torchrec, which a serving process has no need of.
    from snapshot_models import random_state

    model = ModelConfig(embedding_dim=config.dim, bottom_layers=(64,), top_layers=(128, 64))
    schema = Schema(
        dense=tuple(f"d{i}" for i in range(DENSE)),
        sparse=tuple(SparseColumn(name=f"f{i}", cardinality=config.rows) for i in range(config.count)),
        label="label",
        rows={},
        source="random values",
    )
    writer = SnapshotWriter(folder)
    for place, column in enumerate(schema.sparse):
        data = packed_table(config.rows, config.dim, kind, seed=place)
        writer.write_table(f"t_{column.name}", kind, config.dim, data)
        del data
    state = random_state(model, schema, tables=False)
    layer_kind = LAYER_TYPES.get(kind, "int8")
    layers = {
        spec.name: store_layer(state[spec.weight], state[spec.bias] if spec.bias else None, layer_kind)
        for spec in layer_specs(model, DENSE)
    }
    writer.write_dense(layers, {})
    manifest = writer.finish(
        step=0,
        source={"words": "random values"},
        model=model,
        features={"dense": list(schema.dense), "sparse": [asdict(column) for column in schema.sparse]},
        plan=Plan(
            tables={f"t_{column.name}": kind for column in schema.sparse},
            layers=dict.fromkeys(layers, layer_kind),
        ),
    )
    return manifest.weight_bytes


def serve(folder: Path, check: bool, config: MemoryConfig) -> Served:
    """Load and score in this process."""
    before = resident_bytes()
    begin = time.perf_counter()
    snapshot = load(folder, threads=config.threads, check=check)
    load_s = time.perf_counter() - begin
    loaded = resident_bytes()
    generator = np.random.default_rng(0)
    dense = generator.standard_normal((config.batch, DENSE), np.float32)
    spent = 0.0
    for _ in range(config.calls):
        sparse = {
            feature.name: generator.integers(0, feature.cardinality, config.batch)
            for feature in snapshot.features
        }
        begin = time.perf_counter()
        snapshot.predict(dense, sparse)
        spent += time.perf_counter() - begin
    return Served(
        load_s=load_s,
        before_bytes=before,
        loaded_bytes=loaded,
        served_bytes=resident_bytes(),
        peak_bytes=_kib("status", "VmHWM"),
        rows_per_s=config.batch * config.calls / spent,
    )


def resident_bytes() -> int:
    """Private and shared pages of this process."""
    return sum(
        _kib("smaps_rollup", name)
        for name in ("Private_Clean", "Private_Dirty", "Shared_Clean", "Shared_Dirty")
    )


def _kib(file: str, name: str) -> int:
    """A figure of /proc/self in bytes."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def elsewhere(folder: Path, check: bool, config: MemoryConfig) -> Served:
    """:func:`serve` in a process of its own."""
    settings = json.dumps({name: getattr(config, name) for name in ("batch", "calls", "threads")})
    command = [sys.executable, str(Path(__file__).resolve()), SERVE, str(folder), str(int(check)), settings]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Served(**json.loads(ran.stdout.splitlines()[-1]))


def drop_cached(folder: Path) -> None:
    """Have the system forget the contents of the files below ``folder``."""
    for path in folder.rglob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def measure(folder: Path, kind: str, config: MemoryConfig) -> list[str]:
    """Rows of the table for one type."""
    begin = time.perf_counter()
    size = write(folder, config, kind)
    print(f"{kind}: wrote {size / 1e6:,.0f} MB in {time.perf_counter() - begin:.0f} s", flush=True)
    lines = []
    for files, check in (("from disk", True), ("cached", True), ("cached", False)):
        if files == "from disk":
            drop_cached(folder)
        lines.append(
            line(
                kind,
                size,
                f"{files}, {'checked' if check else 'unchecked'}",
                elsewhere(folder, check, config),
                config,
            )
        )
        print(lines[-1], flush=True)
    return lines


HEADS = (
    *("tables", "weights, MB", "B a row", "load", "load, s", "before, MiB", "loaded, MiB", "served, MiB"),
    *("peak, MiB", "resident B a row", "rows/s"),
)


def line(kind: str, size: int, how: str, served: Served, config: MemoryConfig) -> str:
    grown = (served.served_bytes - served.before_bytes) / (config.rows * config.count)
    cells = [kind, f"{size / 1e6:,.0f}", str(row_bytes(kind, config.dim)), how, f"{served.load_s:.2f}"]
    memory = (served.before_bytes, served.loaded_bytes, served.served_bytes, served.peak_bytes)
    cells += [f"{value / MIB:,.0f}" for value in memory]
    return "| " + " | ".join([*cells, f"{grown:.1f}", f"{served.rows_per_s:,.0f}"]) + " |"


def main(words: Sequence[str]) -> int:
    if words and words[0] == SERVE:
        _, folder, check, settings = words
        found = serve(Path(folder), check == "1", MemoryConfig(**json.loads(settings)))
        print(json.dumps(asdict(found)))
        return 0
    if {"-h", "--help"} & set(words):
        print(__doc__)
        print(describe("snapshot_memory", MemoryConfig))
        return 0
    try:
        config = from_words(MemoryConfig, words, "snapshot_memory")
        kinds = config.kinds.split(",")
        unknown = [kind for kind in kinds if kind not in TABLE_TYPES]
        if unknown:
            raise ValueError(f"kinds: {unknown[0]!r} is unknown; there are {', '.join(TABLE_TYPES)}.")
        if min(config.rows, config.count, config.batch, config.calls, config.threads) < 1:
            raise ValueError("rows, count, batch, calls and threads must be 1 or more.")
        row_bytes(kinds[0], config.dim)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    from snapshot_models import machine

    torch.set_num_threads(config.threads)
    print(machine(config.threads))
    print(
        f"{config.count} tables of {config.rows:,} rows x {config.dim}, "
        f"{config.calls} calls of {config.batch:,} rows"
    )
    lines = []
    for kind in kinds:
        with tempfile.TemporaryDirectory(prefix="snapshot-memory-", dir=config.folder) as folder:
            lines += measure(Path(folder, "snapshot"), kind, config)
    print("\n| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
