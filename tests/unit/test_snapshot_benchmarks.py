"""The snapshot benchmarks: their arithmetic, that all variants score alike, and that each script runs."""

import importlib
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import guards
import numpy as np
import pytest
import snapshot_run
import torch

from tightrec.formats.columns import Bags, Columns
from tightrec.formats.schema import Schema, SparseColumn
from tightrec.models.config import ModelConfig
from tightrec.snapshot.packed import row_bytes
from tightrec.snapshot.precision import RANGE_METHODS, Plan

BENCHMARKS = guards.ROOT / "benchmarks"
SMALL = {"embedding_dim": 8, "bottom_layers": (6,), "top_layers": (10,)}


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The modules by name; benchmarks/ is no package."""
    sys.path.insert(0, str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield lambda name: importlib.import_module(f"snapshot_{name}")
    torch.set_num_threads(threads)
    sys.path.remove(str(BENCHMARKS))


def schema_of(dense: int, *, multi_hot: bool) -> Schema:
    return Schema(
        dense=tuple(f"d{i}" for i in range(dense)),
        sparse=tuple(
            SparseColumn(name=f"f{i}", cardinality=rows, multi_hot=multi_hot and i == 1)
            for i, rows in enumerate((5, 70, 9))
        ),
        label="label",
        rows={},
        source="a test",
    )


def rows_of(schema: Schema, rows: int) -> Columns:
    generator = np.random.default_rng(0)
    sparse = []
    for column in schema.sparse:
        sizes = generator.integers(0, 4, rows) if column.multi_hot else np.ones(rows, np.int64)
        ids = generator.integers(0, column.cardinality, sizes.sum())
        sparse.append(Bags(ids, np.concatenate([[0], np.cumsum(sizes)]) if column.multi_hot else None))
    dense = generator.standard_normal((rows, len(schema.dense)), np.float32)
    return Columns(dense, (generator.random(rows) < 0.5).astype(np.float32), tuple(sparse))


@pytest.mark.parametrize(
    ("architecture", "dense", "multi_hot", "pooling"),
    [("dlrm", 3, False, "sum"), ("dlrm", 0, True, "mean"), ("dcnv2", 3, True, "sum")],
)
def test_every_variant_scores_rows_as_the_trained_model_does(
    scripts: Any, tmp_path: Path, architecture: str, dense: int, multi_hot: bool, pooling: str
) -> None:
    models, latency = scripts("models"), scripts("latency")
    config = ModelConfig(architecture=architecture, pooling=pooling, **SMALL)  # type: ignore[arg-type]
    schema = schema_of(dense, multi_hot=multi_hot)
    checkpoint = models.MadeCheckpoint(model=config, schema=schema, state=models.random_state(config, schema))
    rows = rows_of(schema, 64)
    material = models.material_of(checkpoint, rows)
    snapshots = {name: models.exported(material, tmp_path / name, name) for name in ("int8", "fp16")}
    trained = models.float32_model(checkpoint)
    variants = latency.variants_of(trained, material, snapshots, compiled=False)
    apart = dict.fromkeys(variants, 0.0)
    with torch.inference_mode():
        for batch in latency.batches_of(rows, schema, 16):
            for name, change in latency.changes(variants, batch).items():
                apart[name] = max(apart[name], change)
    assert ("eager, embedding" in apart) == (not multi_hot)
    for name, change in apart.items():
        most = 0.05 if name.startswith("int8") else 2e-3 if name.startswith("fp16") else 1e-6
        assert change <= most, name
    assert apart["int8"] > 1e-6, "these are no low-precision scores"


def test_a_baseline_shares_the_tables_of_the_trained_model(scripts: Any) -> None:
    models = scripts("models")
    config, schema = ModelConfig(**SMALL), schema_of(3, multi_hot=False)  # type: ignore[arg-type]
    checkpoint = models.MadeCheckpoint(model=config, schema=schema, state=models.random_state(config, schema))
    plain = models.PlainModel(models.float32_model(checkpoint), config, 3)
    assert plain.tables[1].weight.data_ptr() == checkpoint.table("t_f1").data_ptr()


def test_batches_hold_the_same_rows_in_every_form_and_leave_out_a_part_of_one(scripts: Any) -> None:
    schema = schema_of(2, multi_hot=True)
    rows = rows_of(schema, 10)
    batches = scripts("latency").batches_of(rows, schema, 4)
    assert [batch.dense.tolist() for batch in batches] == [rows.dense[:4].tolist(), rows.dense[4:8].tolist()]
    second = batches[1]
    values, offsets = second.sparse["f1"]
    wanted = rows.sparse[1].slice(4, 8)
    assert values.tolist() == wanted.ids.tolist()
    assert offsets.tolist() == wanted.offsets.tolist()
    ids, bounds = second.bags
    assert torch.cat(ids).equal(second.tensors[1])
    assert bounds[1].tolist() == offsets.tolist()
    assert len(second.tensors[2]) == 3 * 4 + 1


def test_a_ratio_is_of_medians_and_its_interval_holds_it(scripts: Any) -> None:
    interval = scripts("latency").interval
    generator = np.random.default_rng(1)
    base, other = 3 + generator.random(400), 1 + generator.random(400)
    ratio, low, high = interval(base, other, seed=0)
    assert ratio == np.median(base) / np.median(other)
    assert low < ratio < high
    assert interval(base, base, seed=0) == (1.0, 1.0, 1.0)
    assert interval(2 * base, base, seed=0) == (2.0, 2.0, 2.0)
    # Spells of equal neighbours tell less than as many calls that have nothing to do with each other.
    spells = np.repeat(1 + generator.random(20), 20)
    mixed = generator.permutation(spells)
    widths = [
        high - low for _, low, high in (interval(some, np.ones(400), seed=0) for some in (spells, mixed))
    ]
    assert widths[0] > 2 * widths[1]


def test_a_line_gives_speed_median_and_tail(scripts: Any) -> None:
    latency = scripts("latency")
    spent = np.full(100, 1e-3)
    spent[:10] = 5e-3
    first, second = latency.lines_of({"eager": 2 * spent, "int8": spent}, 8, seed=0)
    assert second.rows_per_s == pytest.approx(8 * 100 / 0.14)
    assert (second.p50_us, second.p99_us) == (pytest.approx(1000), pytest.approx(5000))
    assert first.ratios["eager"][0] == 1.0
    assert second.ratios["eager"][0] == 2.0


def test_a_goal_is_met_from_its_ratio_on(scripts: Any) -> None:
    latency = scripts("latency")

    def said(ratio: float, size: int) -> list[str]:
        ratios = {"eager": (ratio, 0.0, 9.0), "eager, numpy": (ratio, 0.0, 9.0)}
        lines = [
            latency.Line(name=name, rows_per_s=1, p50_us=1, p99_us=1, ratios=ratios)
            for name in ("int8", "int8, predict")
        ]
        return [line.rpartition(", ")[2] for line in latency.goal_lines(lines, size)]

    assert said(1.5, 1024) == ["met"] * 3
    assert said(1.49, 1024) == ["MISSED"] * 3
    assert said(1.0, 1) == ["met"] * 3
    assert said(9.0, 64) == []


def test_variants_take_turns_on_the_same_batches_and_none_on_what_another_just_read(scripts: Any) -> None:
    seen: list[tuple[str, int]] = []
    variants = {name: lambda batch, name=name: seen.append((name, batch)) for name in ("a", "b", "c")}
    seconds = scripts("latency").timed(variants, list(range(12)), 24)
    assert {name: int((spent > 0).sum()) for name, spent in seconds.items()} == dict.fromkeys(variants, 24)
    turns = [seen[start : start + 3] for start in range(0, len(seen), 3)]
    orders = [[name for name, _ in turn] for turn in turns]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(map(tuple, orders))) == 6
    for name in variants:
        assert sorted(batch for one, batch in seen[-72:] if one == name) == sorted([*range(12)] * 2)
    for turn in turns:
        batches = [batch for _, batch in turn]
        assert min(abs(x - y) for x in batches for y in batches if x is not y) >= 4


def test_what_cannot_be_compiled_is_left_out_and_said(scripts: Any, capsys: Any) -> None:
    latency = scripts("latency")

    def broken(batch: Any) -> None:
        raise RuntimeError("no compiler\nmore")

    kept = latency._compiled({"eager": print, "compiled": broken}, SimpleNamespace(dense=[0]))
    assert list(kept) == ["eager"]
    assert capsys.readouterr().out.strip().endswith("no compiler")


def test_the_latency_script_runs(scripts: Any, tmp_path: Path, capsys: Any) -> None:
    words = ["cardinality=50", "rows=40", "batches=1,16,64", "calls=3", "compile=false", f"folder={tmp_path}"]
    assert scripts("latency").main(words) == 0
    out = capsys.readouterr().out
    assert "26 tables of 3 to 50 rows" in out
    assert out.count("| int8, predict |") == 2
    assert "batch 64: there are only 40 rows" in out
    assert "goal at batch 1: int8 at least 1.0x eager" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("latency", "calls=1,2"),
        ("latency", "threads=0"),
        ("latency", "batches=0,1,2"),
        ("latency", "run=nowhere"),
        ("memory", "kinds=int3"),
        ("memory", "dim=6"),
        ("memory", "count=0"),
        ("quality", "runs=nowhere"),
        ("quality", "run=nowhere"),
    ],
)
def test_a_mistaken_word_ends_with_a_sentence(scripts: Any, capsys: Any, name: str, word: str) -> None:
    assert scripts(name).main([word]) == 2
    assert capsys.readouterr().err.strip()


def test_the_memory_script_writes_serves_and_removes(scripts: Any, tmp_path: Path, capsys: Any) -> None:
    words = ["rows=70000", "dim=8", "count=2", "kinds=int4", "calls=2", "batch=8", f"folder={tmp_path}"]
    memory = scripts("memory")
    assert memory.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split("|") for line in lines[lines.index("") + 3 :]]
    assert [line[4].strip() for line in table] == [
        "from disk, checked",
        "cached, checked",
        "cached, unchecked",
    ]
    assert {line[3].strip() for line in table} == {str(row_bytes("int4", 8))}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8", "int2"])
def test_tables_of_every_type_are_served_from_where_they_were_written(
    scripts: Any, tmp_path: Path, kind: str
) -> None:
    memory = scripts("memory")
    config = memory.MemoryConfig(rows=50_000, dim=16, count=2, batch=4, calls=2)
    size = memory.write(tmp_path / "snapshot", config, kind)
    tables = 2 * 50_000 * row_bytes(kind, 16)
    assert tables < size < tables + 200_000
    served = memory.serve(tmp_path / "snapshot", True, config)
    assert 0 < served.loaded_bytes <= served.peak_bytes + 2**24  # the kernel counts the two in different ways
    assert served.load_s > 0
    assert served.rows_per_s > 0
    manifest = memory.load(tmp_path / "snapshot").manifest
    assert {table.kind for table in manifest.tables} == {kind}


def test_a_large_table_is_packed_in_pieces_of_its_own_values(scripts: Any) -> None:
    memory = scripts("memory")
    rows = memory.CHUNK_ROWS + 3
    data = memory.packed_table(rows, 8, "fp32", seed=1)
    assert data.shape == (rows, 32)
    values = data.view(torch.float32)
    assert values.std() == pytest.approx(1.0, abs=0.01)
    assert not values[:3].equal(values[-3:])
    assert not data.equal(memory.packed_table(rows, 8, "fp32", seed=2))


def test_resident_memory_grows_by_what_is_touched(scripts: Any) -> None:
    resident_bytes = scripts("memory").resident_bytes
    # Mapped anew: an array may get memory that is resident already.
    with mmap.mmap(-1, 64 << 20) as held:
        before = resident_bytes()
        held[: 32 << 20] = bytes(32 << 20)
        grown = resident_bytes() - before
    assert 30 << 20 < grown < 60 << 20


def test_bytes_of_a_row_in_memory_are_what_serving_needs_more(scripts: Any) -> None:
    memory = scripts("memory")
    config = memory.MemoryConfig(rows=100, count=2, dim=64)
    served = memory.Served(
        load_s=1, before_bytes=1000, loaded_bytes=1, served_bytes=15_600, peak_bytes=1, rows_per_s=7
    )
    assert memory.line("int8", 1, "", served, config).split("|")[-3:-1] == [" 73.0 ", " 7 "]


def test_ways_cover_every_method_of_ranges_once(scripts: Any) -> None:
    ways = scripts("quality").WAYS
    assert sorted(way.ranges for way in ways if way.precision == "int8") == sorted(RANGE_METHODS)
    assert len({way.name for way in ways}) == len(ways)


def found_of(quality: Any, name: str, loss: float, size: int) -> Any:
    verdict = SimpleNamespace(
        ne_loss=loss,
        ne_loss_error=0.00002,
        snapshot_bytes=size,
        float32_bytes=1000,
        snapshot={"auc": 0.79},
        float32={"auc": 0.8},
        worst_change=0.25,
        p999_change=0.125,
    )
    plan = Plan(tables={"t_a": "int8", "t_b": "int4", "t_c": "int8"}, layers={"top.0": "int8"})
    way = next(way for way in quality.WAYS if way.name == name)
    return quality.Found(way=way, plan=plan, verification=verdict)


def test_a_quality_line_holds_the_verification(scripts: Any) -> None:
    quality = scripts("quality")
    line = quality.table([found_of(quality, "int8", 0.00012, 284)]).splitlines()[-1]
    assert line == (
        "| int8 | +0.0120 ± 0.0020 | -0.01000 | 28.4 | 0.25 | 0.12 | tables 1 int4, 2 int8; layers 1 int8 |"
    )


def test_quality_goals_are_held_to_their_limits(scripts: Any) -> None:
    quality = scripts("quality")

    def said(*found: Any) -> list[bool]:
        return [line.endswith(", met") for line in quality.goal_lines(found, 0.0002)]

    good = [found_of(quality, "int8", 0.0002, 300), found_of(quality, "auto", 0.0002, 200)]
    assert said(*good) == [True] * 4
    bad = [found_of(quality, "int8", 0.00021, 301), found_of(quality, "auto", 0.00021, 201)]
    assert said(*bad) == [False] * 4
    assert said(found_of(quality, "int8", float("nan"), 300)) == [False, True]
    assert said(found_of(quality, "fp16", 1.0, 999)) == []


def test_the_quality_script_builds_and_verifies_every_line_of_a_run(
    scripts: Any, tmp_path: Path, capsys: Any
) -> None:
    snapshot_run.save(tmp_path / "run", 3)
    below = tmp_path / "below"
    below.mkdir()
    names = "int8+int8, dynamic+int4 min-max+tables int4 greedy+auto"
    words = [f"runs={tmp_path / 'run'}", f"only={names}", "budget_ne=0.5", f"folder={below}"]
    assert scripts("quality").main(words) == 0
    out = capsys.readouterr().out
    lines = [line.split("|") for line in out.splitlines() if line.startswith("| ")][1:]
    assert "+".join(line[1].strip() for line in lines) == names
    types = {line[1].strip(): line[7].strip() for line in lines}
    assert types["tables int4 greedy"].endswith("layers 4 fp32")
    assert [line[7].split(";")[0].strip() for line in lines[:4]] == [
        f"tables 2 {kind}" for kind in ("int8", "int8", "int4", "int4")
    ]
    assert "300 test rows" in out
    assert out.count("goal: ") == 4
    assert not list(below.iterdir())
