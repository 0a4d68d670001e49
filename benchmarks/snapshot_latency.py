"""Speed of low-precision snapshots against float32 torch, eager and compiled, on a CPU.

    make bench SCRIPT=snapshot_latency
    make bench SCRIPT=snapshot_latency ARGS="run=runs/train/DATE_TIME threads=2 batches=1,1024"

Without ``run`` the weights are random: 13 dense columns, 26 tables of Criteo Kaggle's cardinalities up to
``cardinality``, ids by Zipf's law with exponent 1.05, MLPs of the published widths; snapshots are written and
loaded as the exporter does it. With ``run`` they are those of a trained run, and the rows its test split's.

Variants take turns batch by batch, in an order drawn anew each time, so that a busy machine slows all alike.
All score the same batches, each from another one on: none finds rows that another has just read. Variants:

- ``eager``: nn.EmbeddingBag a table, nn.Linear, tensors that are ready; ``eager, embedding``: the same with
  nn.functional.embedding, which reads one id a row only; ``torchrec``: the model that was trained, on a
  KeyedJaggedTensor made of ready tensors; ``compiled``: torch.compile of ``eager, embedding``, or of
  ``eager`` where rows hold lists; ``eager, numpy``: from numpy arrays to numpy probabilities, unchecked.
- ``int8`` and ``fp16``: a snapshot's model on ready tensors; ``..., predict``: ``Snapshot.predict`` on numpy
  arrays, which checks them; ``int8 fixed`` and ``int8 by row``: ``ranges=l2``
  and ``ranges=dynamic`` instead of ``mixed``.

p50 and p99 are of a call; ratios are of medians, with the 95 % interval of a bootstrap over stretches of
consecutive calls. Above 1 the variant is faster than what it is compared with.
"""

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from snapshot_models import (
    PUBLISHED,
    MadeCheckpoint,
    PlainModel,
    exported,
    float32_model,
    machine,
    material_of,
    random_state,
    shape_line,
)
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.formats.columns import Columns
from tightrec.formats.schema import Schema
from tightrec.formats.settings import from_words
from tightrec.formats.usage import describe
from tightrec.models.dlrm import DLRM
from tightrec.snapshot.calibrate import chosen_ranges
from tightrec.snapshot.export import Material
from tightrec.snapshot.loader import Snapshot
from tightrec.snapshot.model import Scorer
from tightrec.snapshot.rows import feature_major, read_rows
from tightrec.snapshot.source import open_checkpoint
from tightrec.trainer.data.synthetic import SyntheticConfig, SyntheticSource

BASE, BASE_NUMPY, COMPILED = "eager", "eager, numpy", "compiled"
GOALS = {1024: 1.5, 1: 1.0}
"""By batch: int8's speed over eager float32's."""

Seconds = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """The words of this script."""

    run: Path | None = None
    """A trained run's folder; null: random weights of the published shape."""

    batches: str = "1,64,1024"
    """Rows of a call, by commas."""

    calls: str = "2000,600,200"
    """Timed calls of every variant, one number for each of ``batches`` or one for all."""

    rows: int = 65_536
    """Distinct rows that the batches are cut from, over and over."""

    cardinality: int = 1_000_000
    """Most rows of a random table; all tables together are in memory in float32, fp16 and int8."""

    threads: int = 1
    """Of torch."""

    compile: bool = True
    """Whether to measure torch.compile too; it needs a C++ compiler and a minute or two."""

    folder: Path | None = None
    """Where snapshots are written meanwhile; null: the system's temporary folder."""

    seed: int = 0
    """Of random weights, rows, turns and the bootstrap."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The same rows in every form that a variant takes."""

    dense: NDArray[np.float32]
    """[B, Dn]"""

    sparse: dict[str, Any]
    """As ``Snapshot.predict`` takes it."""

    tensors: tuple[Tensor, Tensor, Tensor]
    """Dense values, ids and offsets of all features."""

    bags: tuple[list[Tensor], list[Tensor]]
    """Ids, and offsets [B + 1], of each feature."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One variant's row of a table."""

    name: str
    rows_per_s: float
    p50_us: float
    p99_us: float
    ratios: dict[str, tuple[float, float, float]]
    """By what it is compared with: ratio of medians, and its interval."""


Variant = Callable[[Batch], Any]


def batches_of(columns: Columns, schema: Schema, size: int) -> list[Batch]:
    """All whole batches of ``size`` rows."""
    made = []
    names = schema.sparse_names
    for start in range(0, len(columns) - size + 1, size):
        part = columns.slice(start, start + size)
        rows = feature_major(part)
        sparse = {
            name: np.array(bags.ids) if bags.offsets is None else (np.array(bags.ids), np.array(bags.offsets))
            for name, bags in zip(names, part.sparse, strict=True)
        }
        singles = torch.arange(size + 1)
        offsets = [
            singles if b.offsets is None else torch.from_numpy(np.array(b.offsets)) for b in part.sparse
        ]
        ids = [torch.from_numpy(np.array(bags.ids)) for bags in part.sparse]
        made.append(
            Batch(
                dense=np.array(part.dense),
                sparse=sparse,
                tensors=(rows.dense.clone(), rows.ids.clone(), rows.offsets.clone()),
                bags=(ids, offsets),
            )
        )
    return made


def variants_of(
    trained: DLRM, material: Material, snapshots: dict[str, Snapshot], *, compiled: bool
) -> dict[str, Variant]:
    """Everything that is measured, by name; each gives [B] logits or probabilities."""
    config, schema = material.checkpoint.model, material.checkpoint.schema
    dense, names = len(schema.dense), list(schema.sparse_names)
    plain = PlainModel(trained, config, dense)
    single = not any(column.multi_hot for column in schema.sparse)
    fast = PlainModel(trained, config, dense, bags=not single)
    variants: dict[str, Variant] = {
        BASE: lambda batch: plain(batch.tensors[0], *batch.bags),
        BASE_NUMPY: lambda batch: _from_numpy(plain, batch, names),
    }
    if single:
        variants["eager, embedding"] = lambda batch: fast(batch.tensors[0], *batch.bags)
    variants["torchrec"] = lambda batch: trained(
        batch.tensors[0], KeyedJaggedTensor(names, batch.tensors[1], offsets=batch.tensors[2])
    )
    if compiled:
        faster = torch.compile(fast, dynamic=False if single else None)
        variants[COMPILED] = lambda batch: faster(batch.tensors[0], *batch.bags)
    for name, snapshot in snapshots.items():
        variants[name] = lambda batch, model=snapshot.scorer: model(*batch.tensors)
        if name == "int8":
            for label, method in (("fixed", "l2"), ("by row", "dynamic")):
                other = _with_ranges(material, snapshot, method)
                variants[f"int8 {label}"] = lambda batch, model=other: model(*batch.tensors)
        variants[f"{name}, predict"] = lambda batch, one=snapshot: one.predict(batch.dense, batch.sparse)
    return variants


def _from_numpy(model: PlainModel, batch: Batch, names: Sequence[str]) -> NDArray[np.float32]:
    columns = [batch.sparse[name] for name in names]
    singles = torch.arange(len(batch.dense) + 1)
    ids = [torch.from_numpy(c[0] if isinstance(c, tuple) else c) for c in columns]
    offsets = [torch.from_numpy(c[1]) if isinstance(c, tuple) else singles for c in columns]
    return model(torch.from_numpy(batch.dense), ids, offsets).sigmoid().numpy()


def _with_ranges(material: Material, snapshot: Snapshot, method: str) -> Scorer:
    """The snapshot with int8 layers whose ranges are found otherwise, on the same tables."""
    parts, cpu = material.parts, torch.device("cpu")
    ranges = chosen_ranges(material.histograms, method)
    layers = {name: parts.layer(name, "int8", ranges.get(name)) for name in parts.layers}
    return Scorer(parts.config, len(parts.tables), snapshot.scorer.lookup, layers, parts.extras, cpu)


def timed(
    variants: dict[str, Variant], batches: Sequence[Batch], calls: int, seed: int = 0
) -> dict[str, Seconds]:
    """Seconds [calls] of every variant; ``calls`` times all take a turn, in a random order."""
    generator = np.random.default_rng(seed)
    apart = max(1, len(batches) // len(variants))
    places = dict(zip(variants, range(0, apart * len(variants), apart), strict=True))
    seconds = {name: np.full(calls, np.nan) for name in variants}
    warm = max(3, calls // 20)
    gc.collect()
    gc.disable()
    try:
        for call in range(-warm, calls):
            for name in generator.permutation(list(variants)).tolist():
                batch = batches[(call + places[name]) % len(batches)]
                begin = time.perf_counter()
                variants[name](batch)
                if call >= 0:
                    seconds[name][call] = time.perf_counter() - begin
    finally:
        gc.enable()
    return seconds


def interval(base: Seconds, other: Seconds, seed: int, draws: int = 1000) -> tuple[float, float, float]:
    """Ratio of the medians of calls [n] taken in turns, base over other, and its 95 % interval.

    The bootstrap draws stretches of sqrt(n) consecutive calls, as a busy spell slows neighbours alike.
    """
    calls = len(base)
    length = max(1, round(calls**0.5))
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, calls - length + 1, (draws, -(-calls // length)))
    drawn = (starts[:, :, None] + np.arange(length)).reshape(draws, -1)[:, :calls]
    ratios = np.median(base[drawn], axis=1) / np.median(other[drawn], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(np.median(base) / np.median(other)), float(low), float(high)


def lines_of(seconds: dict[str, Seconds], size: int, seed: int) -> list[Line]:
    """The table of one batch size."""
    against = [name for name in (BASE, BASE_NUMPY, COMPILED) if name in seconds]
    return [
        Line(
            name=name,
            rows_per_s=size * len(spent) / float(spent.sum()),
            p50_us=1e6 * float(np.median(spent)),
            p99_us=1e6 * float(np.quantile(spent, 0.99)),
            ratios={base: interval(seconds[base], spent, seed) for base in against},
        )
        for name, spent in seconds.items()
    ]


def table(lines: Sequence[Line]) -> str:
    against = list(lines[0].ratios)
    heads = ["variant", "rows/s", "p50, us", "p99, us", *(f"over {name}" for name in against)]
    rows = ["| " + " | ".join(heads) + " |"]
    rows.append("|---" * len(heads) + "|")
    for line in lines:
        cells = [line.name, f"{line.rows_per_s:,.0f}", f"{line.p50_us:,.0f}", f"{line.p99_us:,.0f}"]
        cells += [f"{mid:.2f} ({low:.2f} - {high:.2f})" for mid, low, high in line.ratios.values()]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def goal_lines(lines: Sequence[Line], size: int) -> list[str]:
    """How int8 stands to its goal at this batch size, like with like."""
    goal = GOALS.get(size)
    found = {line.name: line for line in lines}
    if goal is None:
        return []
    said = []
    for name, base in (("int8", BASE), ("int8, predict", BASE_NUMPY), ("int8, predict", BASE)):
        ratio, low, high = found[name].ratios[base]
        verdict = "met" if ratio >= goal else "MISSED"
        said.append(
            f"goal at batch {size:,}: {name} at least {goal}x {base}: "
            f"{ratio:.2f}x ({low:.2f} - {high:.2f}), {verdict}"
        )
    return said


def changes(variants: dict[str, Variant], batch: Batch) -> dict[str, float]:
    """Largest difference of a row's probability from the eager model's."""
    found = {}
    for name, run in variants.items():
        out = torch.as_tensor(run(batch)).double()
        found[name] = out if name.endswith((", predict", ", numpy")) else out.sigmoid()
    return {name: float((out - found[BASE]).abs().max()) for name, out in found.items()}


def _checkpoint(config: LatencyConfig) -> tuple[Any, Columns]:
    if config.run is not None:
        checkpoint = open_checkpoint(config.run)
        if checkpoint.data is None:
            raise ValueError(f"{config.run} names no held-out rows. Give a run on a prepared data set.")
        return checkpoint, read_rows(checkpoint.data, "test", config.rows, checkpoint.schema)
    synthetic = SyntheticConfig(
        preset="kaggle", max_cardinality=config.cardinality, valid_rows=config.rows, seed=config.seed
    )
    source = SyntheticSource(synthetic, "valid")
    rows = Columns.concat([source.read(group) for group in range(len(source.row_counts))])
    state = random_state(PUBLISHED, source.schema, seed=config.seed)
    return MadeCheckpoint(model=PUBLISHED, schema=source.schema, state=state), rows


def main(words: Sequence[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        print(describe("snapshot_latency", LatencyConfig))
        return 0
    try:
        config = from_words(LatencyConfig, words, "snapshot_latency")
        sizes = [int(size) for size in config.batches.split(",")]
        calls = [int(count) for count in config.calls.split(",")]
        calls = calls * len(sizes) if len(calls) == 1 else calls
        if len(calls) != len(sizes) or min(*sizes, *calls, config.threads, config.rows) < 1:
            raise ValueError("batches, calls, threads and rows must be 1 or more, calls one for each batch.")
        torch.set_num_threads(config.threads)
        checkpoint, rows = _checkpoint(config)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(machine(config.threads), flush=True)
    print(f"{config.run or 'random weights'}: {shape_line(checkpoint.model, checkpoint.schema)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="snapshot-latency-", dir=config.folder) as folder:
        trained = float32_model(checkpoint)
        material = material_of(checkpoint, rows.slice(0, min(len(rows), 20_000)))
        snapshots = {}
        for precision in ("int8", "fp16"):
            snapshots[precision] = exported(material, Path(folder, precision), precision)
            print(f"{precision}: {snapshots[precision].size_bytes / 1e6:,.1f} MB of weights", flush=True)
    variants = variants_of(trained, material, snapshots, compiled=config.compile)
    for size, count in zip(sizes, calls, strict=True):
        batches = batches_of(rows.slice(0, min(len(rows), count * size)), checkpoint.schema, size)
        if not batches:
            print(f"batch {size:,}: there are only {len(rows):,} rows, so it is left out")
            continue
        with torch.inference_mode():
            variants = _compiled(variants, batches[0])
            apart = changes(variants, batches[0])
            seconds = timed(variants, batches, count, config.seed)
        lines = lines_of(seconds, size, config.seed)
        print(f"\nbatch {size:,}, {count:,} calls each over {len(batches):,} batches\n\n{table(lines)}\n")
        print("scores from eager's, at most: " + ", ".join(f"{name} {by:.2g}" for name, by in apart.items()))
        print("\n".join(goal_lines(lines, size)), flush=True)
    return 0


def _compiled(variants: dict[str, Variant], batch: Batch) -> dict[str, Variant]:
    """Compile for this batch's shapes; without what cannot be compiled here."""
    if COMPILED not in variants:
        return variants
    begin = time.perf_counter()
    try:
        variants[COMPILED](batch)
    except Exception as error:  # whatever the compiler's chain raises: the other variants can be measured
        print(f"torch.compile failed, {COMPILED} is left out: {str(error).splitlines()[0]}")
        return {name: run for name, run in variants.items() if name != COMPILED}
    print(f"compiled for batch {len(batch.dense):,} in {time.perf_counter() - begin:.0f} s", flush=True)
    return variants


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
