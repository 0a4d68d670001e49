"""``prepare criteo`` from text to the layout: every row where and what the settings say it is."""

import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from criteo_files import COLUMNS, Line, make_text, numbers_of, read_split, take_apart, tree, words
from rich.console import Console

from tightrec.formats.schema import SPLITS, Schema, load_schema
from tightrec.formats.settings import from_words
from tightrec.trainer.data.prepare import criteo
from tightrec.trainer.data.prepare.criteo_settings import CriteoSettings
from tightrec.trainer.data.prepare.numbering import draw_splits

SAMPLE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "criteo_tb10k"


def prepare(**settings: Any) -> tuple[Schema, str]:
    """Schema and what is told on the way."""
    told = io.StringIO()
    parsed = from_words(CriteoSettings, words(**{"part_bytes": 20_000, **settings}), "prepare criteo")
    return criteo.prepare(parsed, Console(file=told, width=200)), told.getvalue()


def check_split(table: pa.Table, expected: list[Line], numbers: list[dict[int | None, int]]) -> None:
    """Every cell of ``table`` is that of the line it came from."""
    assert table.column_names == ["label", *COLUMNS]
    assert table["label"].to_pylist() == [line.label for line in expected]
    for at in range(13):
        logs = np.log1p([float(line.integers[at]) for line in expected]).astype(np.float32)
        np.testing.assert_array_equal(table[COLUMNS[at]].to_numpy(), logs)
    for at in range(26):
        ids = [numbers[at].get(line.ids[at], 1) for line in expected]
        assert table[COLUMNS[13 + at]].to_pylist() == ids


def test_drawn_splits_over_two_days_hold_every_row_as_documented(tmp_path: Path) -> None:
    texts = [make_text(400, seed=1), make_text(250, seed=2)]
    (tmp_path / "day_0.gz").write_bytes(gzip.compress(texts[0]))
    (tmp_path / "day_1.xz").write_bytes(lzma.compress(texts[1]))
    schema, _ = prepare(src=tmp_path, dst=tmp_path / "out", seed=5, valid_share=0.2, min_count=3)
    splits: list[list[Line]] = [[], [], []]
    for file, text in enumerate(texts):
        lines = take_apart(text)
        drawn = draw_splits(np.arange(1, len(lines) + 1), file, 5, 0.2, 0.1)
        for line, split in zip(lines, drawn.tolist(), strict=True):
            splits[split].append(line)
    numbers = numbers_of(splits[0], min_count=3)
    for split, expected in zip(SPLITS, splits, strict=True):
        check_split(read_split(tmp_path / "out", split), expected, numbers)
    assert schema == load_schema(tmp_path / "out")
    assert schema.rows == {split: len(lines) for split, lines in zip(SPLITS, splits, strict=True)}
    assert [column.cardinality for column in schema.sparse] == [len(each) + 1 for each in numbers]
    assert schema.preparation["min_count"] == 3
    assert not (tmp_path / "out.partial").exists()


def test_whole_days_make_up_the_splits_and_only_training_days_the_vocabulary(tmp_path: Path) -> None:
    texts = {f"day_{day}": make_text(120, seed=day) for day in range(4)}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    schema, _ = prepare(
        src=tmp_path, dst=tmp_path / "out", min_count=1, valid_files="day_2", test_files="day_3,day_0"
    )
    lines = {name: take_apart(text) for name, text in texts.items()}
    numbers = numbers_of(lines["day_1"], min_count=1)
    check_split(read_split(tmp_path / "out", "train"), lines["day_1"], numbers)
    check_split(read_split(tmp_path / "out", "valid"), lines["day_2"], numbers)
    check_split(read_split(tmp_path / "out", "test"), lines["day_0"] + lines["day_3"], numbers)
    assert schema.rows == {"train": 120, "valid": 120, "test": 240}
    assert any(1 in read_split(tmp_path / "out", "test")[name].to_pylist() for name in COLUMNS[13:])


def test_hashing_needs_one_pass_and_fills_its_range(tmp_path: Path) -> None:
    (tmp_path / "day_0").write_bytes(make_text(300))
    schema, told = prepare(src=tmp_path, dst=tmp_path / "out", ids="hash", hash_size=50)
    assert "counting" not in told
    assert {column.cardinality for column in schema.sparse} == {50}
    column = np.concatenate([read_split(tmp_path / "out", split)["C1"].to_numpy() for split in SPLITS])
    blanks = sum(line.ids[0] is None for line in take_apart(make_text(300)))
    assert (column == 0).sum() == blanks > 0
    assert column.max() < 50
    assert len(np.unique(column)) > 20


def test_max_ids_keeps_the_most_frequent(tmp_path: Path) -> None:
    (tmp_path / "day_0").write_bytes(make_text(300))
    schema, _ = prepare(src=tmp_path, dst=tmp_path / "out", max_ids=4)
    assert {column.cardinality for column in schema.sparse} == {6}
    column = read_split(tmp_path / "out", "train")["C5"].to_numpy()
    assert set(column.tolist()) == set(range(6))


def test_threads_and_memory_change_nothing_in_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "day_0").write_bytes(make_text(800))
    prepare(src=tmp_path / "day_0", dst=tmp_path / "one", threads=1)
    monkeypatch.setattr(criteo, "SPILL_PIECES", 2)
    prepare(src=tmp_path / "day_0", dst=tmp_path / "four", threads=4, memory_gb=0.7)
    assert tree(tmp_path / "one") == tree(tmp_path / "four")


def test_files_hold_what_the_layout_promises(tmp_path: Path) -> None:
    (tmp_path / "day_0").write_bytes(make_text(500))
    prepare(src=tmp_path / "day_0", dst=tmp_path / "out", part_bytes=40_000, row_group_rows=50)
    files = sorted((tmp_path / "out" / "train").iterdir())
    assert len(files) > 2
    assert all(file.name == f"part-{at:05d}.parquet" for at, file in enumerate(files))
    for file in files:
        data = pq.ParquetFile(file)
        sizes = [data.metadata.row_group(at).num_rows for at in range(data.num_row_groups)]
        assert max(sizes) <= 50
        assert max(sizes) - min(sizes) <= len(sizes)
        assert data.metadata.row_group(0).column(20).compression == "ZSTD"
        types = {field.name: str(field.type) for field in data.schema_arrow}
        assert {types[name] for name in COLUMNS[:13]} | {types["label"]} == {"float"}
        assert {types[name] for name in COLUMNS[13:]} == {"int64"}
        assert not any(field.nullable for field in data.schema_arrow)


def test_strict_names_file_line_and_value(tmp_path: Path) -> None:
    lines = make_text(300).splitlines(keepends=True)
    lines[201] = lines[201].replace(b"\t", b"\tx", 1)
    (tmp_path / "day_0").write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=r"day_0, line 202: I1 is not an integer: 'x"):
        prepare(src=tmp_path, dst=tmp_path / "out", errors="strict")
    assert not (tmp_path / "out").exists()
    _, told = prepare(src=tmp_path, dst=tmp_path / "out", errors="tolerant")
    assert "1 bad (1 integer)" in told


def test_tolerant_counts_samples_and_goes_on(tmp_path: Path) -> None:
    lines = make_text(2_000).splitlines(keepends=True)
    for at in range(0, 200, 20):
        lines[at] = b"x" + lines[at]
    lines[1_500] = b"\n"
    packed = gzip.compress(make_text(1_000, seed=3))
    (tmp_path / "day_0").write_bytes(b"".join(lines))
    (tmp_path / "day_1.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "day_2").touch()
    schema, told = prepare(src=tmp_path, dst=tmp_path / "out")
    counts = {"column count": 1, "damaged file": 1, "empty file": 1, "label": 10}
    assert schema.preparation["bad_lines"] == counts
    assert schema.preparation["lines"] == sum(schema.rows.values()) + 11
    assert schema.preparation["lines"] > 2_300
    assert all(f"{count} {kind}" in told for kind, count in counts.items())
    assert "WARNING: the rest of" in told.replace("\n", " ")
    assert "day_1.gz" in told.split("WARNING")[1].replace("\n", "")
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == 13
    named = {(Path(each["file"]).name, each["line"], each["kind"]) for each in rejects}
    assert {("day_0", 1, "label"), ("day_0", 1_501, "column count"), ("day_2", 0, "empty file")} <= named
    assert rejects[0]["value"].startswith("x")


def test_bad_lines_past_their_share_stop_before_the_end(tmp_path: Path) -> None:
    text = make_text(3_000).splitlines(keepends=True)
    for at in range(0, 1_500, 30):
        text[at] = b"5" + text[at]
    (tmp_path / "day_0").write_bytes(b"".join(text))
    with pytest.raises(
        ValueError, match=r"of (1,\d\d\d) lines are bad, more than max_bad_share=0.01"
    ) as stopped:
        prepare(src=tmp_path, dst=tmp_path / "out")
    assert "label is neither 0 nor 1: '5" in str(stopped.value)
    schema, _ = prepare(src=tmp_path, dst=tmp_path / "out", max_bad_share=0.05)
    assert schema.preparation["bad_lines"] == {"label": 50}


def test_a_few_bad_lines_in_a_small_file_count_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "day_0").write_bytes(make_text(20) + b"bad\n")
    with pytest.raises(ValueError, match="1 of 21 lines are bad"):
        prepare(src=tmp_path, dst=tmp_path / "out")
    (tmp_path / "day_0").write_bytes(b"")
    with pytest.raises(ValueError, match="no row to train on"):
        prepare(src=tmp_path, dst=tmp_path / "empty", max_bad_share=1, ids="hash")


def test_a_vocabulary_too_large_for_memory_is_refused_with_what_fits_and_the_counts_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "day_0").write_bytes(make_text(1_000))
    monkeypatch.setattr(criteo, "BYTES_PER_ID", 2_000_000)
    with pytest.raises(ValueError, match=r"Run again with min_count=(\d+)") as refused:
        prepare(src=tmp_path, dst=tmp_path / "out", memory_gb=1, min_count=1)
    fitting = int(str(refused.value).split("min_count=")[1].split(",")[0])
    assert fitting > 1
    monkeypatch.setattr(criteo._Preparation, "count_piece", None)
    schema, _ = prepare(src=tmp_path, dst=tmp_path / "out", memory_gb=1, min_count=fitting)
    ids = sum(column.cardinality - 2 for column in schema.sparse)
    assert 0 < ids * 2_000_000 <= 1 << 29


def test_an_unfinished_run_is_not_continued_with_other_settings_or_inputs(tmp_path: Path) -> None:
    source = tmp_path / "day_0"
    source.write_bytes(make_text(300) + b"bad\n" + make_text(300))
    with pytest.raises(ValueError, match="line 301"):
        prepare(src=source, dst=tmp_path / "out", errors="strict", ids="hash")
    assert list((tmp_path / "out.partial").rglob("part-00000.parquet"))
    with pytest.raises(ValueError, match=r"other settings or inputs \(hash_size: 1000000 there, 77 here"):
        prepare(src=source, dst=tmp_path / "out", ids="hash", hash_size=77)
    source.write_bytes(make_text(600))
    with pytest.raises(ValueError, match=r"files: .*restart=true"):
        prepare(src=source, dst=tmp_path / "out", ids="hash")
    schema, _ = prepare(src=source, dst=tmp_path / "out", ids="hash", hash_size=77, restart="true")
    assert sum(schema.rows.values()) == 600


def test_an_existing_destination_is_kept_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "day_0").write_bytes(make_text(100))
    prepare(src=tmp_path / "day_0", dst=tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(ValueError, match="overwrite=true"):
        prepare(src=tmp_path / "day_0", dst=tmp_path / "out", seed=1)
    assert tree(tmp_path / "out") == before
    prepare(src=tmp_path / "day_0", dst=tmp_path / "out", seed=1, overwrite="true")
    assert tree(tmp_path / "out") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["day_0", "out"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_count": 0}, "min_count=0"),
        ({"max_ids": 0}, "max_ids=0"),
        ({"hash_size": 1, "ids": "hash"}, "hash_size=1"),
        ({"hash_size": 10}, "no effect with ids=vocabulary"),
        ({"min_count": 3, "ids": "hash"}, "no effect with ids=hash"),
        ({"part_bytes": 10}, "part_bytes=10"),
        ({"memory_gb": 0.1}, "memory_gb=0.1"),
        ({"memory_gb": "nan"}, "memory_gb=nan"),
        ({"memory_gb": 0.5, "part_bytes": 1 << 27}, "too little for parts"),
        ({"valid_share": 0.5, "test_share": 0.5}, "less than 1"),
        ({"valid_share": 0.5, "test_files": "day_0"}, "not both"),
        ({"test_files": "day_9"}, "'day_9' names 0 input files"),
        ({"test_files": "day_0,day_0"}, "named twice"),
        ({"test_files": "day_0"}, "Leave at least one"),
        ({"threads": -1}, "threads=-1"),
        ({"max_bad_share": 2}, "max_bad_share=2"),
        ({"row_group_rows": 0}, "row_group_rows=0"),
        ({"seed": -1}, "seed=-1"),
        ({"errors": "loose"}, "errors"),
        ({"mincount": 3}, "Did you mean 'min_count'"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "day_0").write_bytes(make_text(5))
    with pytest.raises(ValueError, match=message):
        prepare(src=tmp_path, dst=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.data
def test_the_real_sample_is_read_without_a_bad_line(tmp_path: Path) -> None:
    if not SAMPLE.is_dir():
        pytest.skip(f"{SAMPLE} is absent")
    schema, _ = prepare(src=SAMPLE, dst=tmp_path / "out", part_bytes=1 << 20)
    assert sum(schema.rows.values()) == schema.preparation["lines"] == 10_000
    labels = np.concatenate([read_split(tmp_path / "out", split)["label"].to_numpy() for split in SPLITS])
    assert labels.sum() == 265
    lines = take_apart(lzma.decompress((SAMPLE / "day_0.part.tsv.xz").read_bytes()))
    drawn = draw_splits(np.arange(1, 10_001), 0, 0, 0.1, 0.1).tolist()
    parts = [[line for line, split in zip(lines, drawn, strict=True) if split == code] for code in range(3)]
    numbers = numbers_of(parts[0], min_count=2)
    for split, expected in zip(SPLITS, parts, strict=True):
        check_split(read_split(tmp_path / "out", split), expected, numbers)
