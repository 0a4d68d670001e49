"""Runs side by side: grouped by what differs, differences against the seeds' spread, warnings by name."""

import math
import re
from pathlib import Path

import pytest
from compare_run import finished_run
from report_run import captured, text_of
from test_report_page import Page

from tightrec.trainer.compare import __main__ as command
from tightrec.trainer.compare.cautions import cautions
from tightrec.trainer.compare.comparison import compare, curves
from tightrec.trainer.compare.groups import Difference, Group, difference, grouped
from tightrec.trainer.compare.runs import read_runs
from tightrec.trainer.compare.tables import tables
from tightrec.trainer.report.page import Grid, write_page

INT8 = {"codec.forward": "int8", "codec.backward": "int8"}
BASE = (0.800, 0.803, 0.806)


def ab(folder: Path, *above: float) -> list[Group]:
    """Three seeds of a plain group and of one that is ``above`` it, seed by seed."""
    for seed, (ne, more) in enumerate(zip(BASE, above, strict=True)):
        finished_run(folder / f"plain_{seed}", seed, ne)
        sent = {"input": 100.0, "forward": 500.0, "backward": 400.0}
        finished_run(folder / f"int8_{seed}", seed, ne + more, INT8, bytes_per_step=sent, rows_per_s=2500.0)
    return grouped(read_runs([*sorted(folder.glob("plain*")), *sorted(folder.glob("int8*"))]))


def grid(groups: list[Group], title: str) -> Grid:
    return next(found for found in tables(groups) if found.title.startswith(title))


def test_runs_that_differ_only_in_seed_and_bookkeeping_are_one_group(tmp_path: Path) -> None:
    finished_run(tmp_path / "a", 0)
    bookkeeping = {"name": "other", "logging.every_steps": 1, "train.checkpoint.keep": 1, "resume": None}
    finished_run(tmp_path / "b", 1, settings=bookkeeping)
    for name, settings in (("c", INT8), ("d", {"train.epochs": 3}), ("e", {"model.embedding_dim": 8})):
        finished_run(tmp_path / name, 0, settings=settings)
    finished_run(tmp_path / "f", 0, world=4)
    groups = grouped(read_runs([tmp_path / name for name in "abcdef"]))
    assert [[run.name for run in group.runs] for group in groups] == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]


def test_groups_are_named_by_their_folders_or_else_by_what_differs(tmp_path: Path) -> None:
    assert [group.label for group in ab(tmp_path / "ab", 0, 0, 0)] == ["plain", "int8"]
    one = finished_run(tmp_path / "2026-01-01_10-00-00_2", 2)
    two = finished_run(tmp_path / "2026-01-01_10-00-05_2", 2, settings={**INT8, "model.embedding_dim": 8})
    three = finished_run(tmp_path / "x_2", 2, settings={"codec.forward": "int8"})
    labels = [group.label for group in grouped(read_runs([one, two, three]))]
    assert labels == ["none embedding_dim=16", "int8 embedding_dim=8", "int8/none embedding_dim=16"]


def test_groups_whose_names_would_be_the_same_are_numbered(tmp_path: Path) -> None:
    shown = {"data.path": "x", "model.embedding_dim": 8}
    changes = [{}, shown | {"train.epochs": 3}, shown | {"train.epochs": 4}]
    folders = [finished_run(tmp_path / str(n), settings=settings) for n, settings in enumerate(changes)]
    labels = [group.label for group in grouped(read_runs(folders))]
    assert labels == [
        "path=null embedding_dim=16 ...",
        "2: path=x embedding_dim=8 ...",
        "3: path=x embedding_dim=8 ...",
    ]


def test_a_difference_is_paired_by_seed_and_held_against_the_baselines_spread(tmp_path: Path) -> None:
    plain, int8 = ab(tmp_path, 0.0005, 0.0015, 0.001)
    found = difference(int8, plain, "test", "ne")
    assert found.mean == pytest.approx(0.001)
    assert found.error == pytest.approx(0.0005 / math.sqrt(3))
    assert found.spread == pytest.approx(0.003)
    assert found.share == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("above", "spread", "within"),
    [(0.00099, 0.003, True), (0.00101, 0.003, False), (-0.5, 0.003, True), (0.0, math.nan, None)],
)
def test_the_verdict_is_a_third_of_the_spread_and_better_is_always_within(
    above: float, spread: float, within: bool | None
) -> None:
    assert Difference(mean=above, error=0.0, spread=spread).within is within


def test_the_table_of_scores_tells_mean_spread_and_verdict(tmp_path: Path) -> None:
    scores = grid(ab(tmp_path, 0.004, 0.004, 0.004), "Scores on test")
    plain, int8 = scores.rows
    assert plain == ["plain", "3", "0.6970 ± 0.0030", "0.8030 ± 0.0030", "0.4015 ± 0.0015", "–", "–", "–"]
    assert int8[3:] == ["0.8070 ± 0.0030", "0.4035 ± 0.0015", "+0.00400 ± 0.00000", "+1.33", "no"]
    assert "0.00300, the standard deviation of plain's NE" in scores.note
    assert "a third of it is 0.00100" in scores.note
    assert grid(ab(tmp_path / "2", 0, 0, 0), "Scores on valid").rows[1][-1] == "yes"


def test_one_seed_has_no_spread_and_no_verdict(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / "a"), finished_run(tmp_path / "b", ne=0.9, settings=INT8)]
    scores = grid(grouped(read_runs(runs)), "Scores on test")
    assert scores.rows[1][3:] == ["0.9000", "0.4500", "+0.10000", "–", "–"]
    assert "With one seed there is no spread" in scores.note


def test_other_seeds_are_compared_by_their_means_and_named(tmp_path: Path) -> None:
    folders = [finished_run(tmp_path / f"plain_{seed}", seed, 0.8 + seed / 100) for seed in (0, 1)]
    folders += [finished_run(tmp_path / f"int8_{seed}", seed, 0.9, INT8) for seed in (5, 6)]
    plain, int8 = grouped(read_runs(folders))
    found = difference(int8, plain, "test", "ne")
    assert found.mean == pytest.approx(0.095)
    assert found.error == pytest.approx(0.005)
    assert "int8 has run other seeds than plain" in " ".join(cautions([plain, int8]))


def test_bytes_and_speed_are_told_as_ratios_to_the_baseline(tmp_path: Path) -> None:
    groups = ab(tmp_path, 0, 0, 0)
    sent = grid(groups, "Sent between ranks").rows[1]
    assert sent == ["int8", "100 bytes", "500 bytes", "400 bytes", "1.0 kB", "1.0x", "4.0x", "10.0x", "6.1x"]
    time = {row[0]: row[1:] for row in grid(groups, "Speed").rows}
    assert time["rows/s"] == ["1,000 ± 0", "2,500 ± 0"]
    assert time["times as fast"] == ["1.00", "2.50"]
    assert time["embedding exchange, ms"] == ["2.00", "2.00"]
    assert [row[0] for row in grid(groups, "Each run").rows] == [
        f"{name}_{seed}" for name in ("plain", "int8") for seed in range(3)
    ]
    assert [row[0] for row in grid(groups, "Settings").rows] == ["codec.forward", "codec.backward"]


def test_what_the_exchange_counted_itself_stands_beside_the_bytes(tmp_path: Path) -> None:
    own = {"forward": {"ratio": 21.5}, "backward": {"ratio": 22.5}}
    folders = [finished_run(tmp_path / "a"), finished_run(tmp_path / "b", settings=INT8, compression=own)]
    rows = grid(grouped(read_runs(folders)), "Sent between ranks").rows
    assert [row[-2:] for row in rows] == [["–", "–"], ["21.5x", "22.5x"]]


@pytest.mark.parametrize(
    ("settings", "facts", "told"),
    [
        ({"model.embedding_dim": 8}, {}, "model or ranks.* model.embedding_dim 8, there 16"),
        ({"data.path": "x"}, {}, "data.path x, there null"),
        ({}, {"world": 4}, "ranks 4, there 2"),
        (INT8, {"rows": {"train": 5}}, "different numbers of rows"),
        (INT8, {"scores": {}}, r"Without test scores .*: b\."),
        (INT8, {"earlier": [{"status": "stopped"}]}, r"Resumed, .*: b\."),
        (INT8, {"host": {"processor": "slow"}}, r"other machines, so compare no speeds than a: b\."),
        (INT8, {"versions": {"torch": "2.11"}}, r"other versions of libraries than a: b\."),
        (INT8, {"git": "def"}, r"other commits than a: b\."),
        (INT8, {}, None),
    ],
)
def test_what_makes_a_comparison_doubtful_is_said_by_name(tmp_path: Path, settings, facts, told) -> None:
    folders = [finished_run(tmp_path / "a"), finished_run(tmp_path / "b", settings=settings, **facts)]
    warnings = cautions(grouped(read_runs(folders)))
    assert len(warnings) == (told is not None)
    assert told is None or re.search(told, warnings[0])


def test_the_same_seed_twice_is_said_and_not_paired(tmp_path: Path) -> None:
    folders = [finished_run(tmp_path / name, 0, ne) for name, ne in (("a", 0.8), ("b", 0.9))]
    folders += [finished_run(tmp_path / "c", 0, 0.85, INT8)]
    plain, int8 = grouped(read_runs(folders))
    assert any("runs of the same seed (a, b)" in warning for warning in cautions([plain, int8]))
    assert difference(int8, plain, "test", "ne").mean == pytest.approx(0.0)


def test_the_page_is_whole_loads_nothing_and_the_console_tells_the_same(tmp_path: Path) -> None:
    for seed in (0, 1):
        finished_run(tmp_path / "ab" / f"plain_{seed}", seed, 0.8 + seed / 100, command="x <y>")
        finished_run(tmp_path / "ab" / f"int8_{seed}", seed, 0.9, INT8 | {"model.embedding_dim": 8})
    console = captured()
    out = compare([tmp_path / "ab"], tmp_path / "page.html", console)
    page = out.read_text()
    parsed = Page(page)
    assert (parsed.open, parsed.loads) == ([], [])
    assert "x &lt;y&gt;" in page
    assert page.count("<svg") == len(curves(grouped(read_runs([tmp_path / "ab"])))) == 5
    assert len(page) < 300_000
    told = text_of(console)
    for words in ("Scores on test", "in data, model or ranks", "0.9000 ±", "Each run", "plain_1"):
        assert words.replace("0.9000 ±", "0.9000") in told.replace("\n", " "), words
        assert words in page, words
    assert told.rstrip().endswith(f"comparison {out}")


def test_curves_are_means_over_the_seeds(tmp_path: Path) -> None:
    groups = ab(tmp_path, 0.02, 0.01, 0.03)
    above = next(chart for chart in curves(groups) if chart.title == "Training NE above that of plain")
    (series,) = above.legend
    assert (series.label, list(series.steps)) == ("int8", [20, 40])
    assert list(series.values) == pytest.approx([0.02, 0.02])


def test_a_folder_of_runs_stands_for_them_in_the_order_they_were_run(tmp_path: Path) -> None:
    finished_run(tmp_path / "b_0", started="2026-01-01T00:00:01+00:00")
    finished_run(tmp_path / "a_0", started="2026-01-01T00:00:02+00:00", settings=INT8)
    assert [run.name for run in read_runs([tmp_path])] == ["b_0", "a_0"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{}/a", "{}/nowhere"], "nowhere/run.json does not exist"),
        (["{}/a"], "There is 1 run to compare"),
        (["{}/a", "{}/../{name}/a"], "is given twice"),
        (["{}/a", "{}/stopped"], r"stopped is not finished but stopped \(SIGTERM\).*resume="),
        (["{}/a", "{}/b", "out={}/missing/x.html"], "must name a file in a folder that is there"),
        (["{}/a", "{}/b", "out={}"], "must name a file"),
        ([], "usage:"),
        (["--frobnicate"], "usage:"),
    ],
)
def test_mistakes_end_with_2_and_a_sentence(tmp_path: Path, capsys, words: list[str], told: str) -> None:
    finished_run(tmp_path / "a")
    finished_run(tmp_path / "b", 1)
    finished_run(tmp_path / "stopped", status="stopped", reason="SIGTERM")
    assert command.main([word.format(tmp_path, name=tmp_path.name) for word in words]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert not list(tmp_path.glob("*.html*"))


def test_a_run_without_test_scores_is_compared_by_the_others(tmp_path: Path) -> None:
    bare = {"scores": {"valid": {"ne": 0.9, "auc": 0.7, "log_loss": 0.4}}}
    folders = [finished_run(tmp_path / "a", **bare), finished_run(tmp_path / "b", settings=INT8, **bare)]
    titles = [found.title for found in tables(grouped(read_runs(folders)))]
    assert "Scores on valid" in titles
    assert "Scores on test" not in titles


def test_an_interrupted_write_leaves_the_page_that_was_there(tmp_path: Path, monkeypatch, capsys) -> None:
    for name, settings in (("a", {}), ("b", INT8)):
        finished_run(tmp_path / name, settings=settings)
    out = tmp_path / "page.html"
    out.write_text("before")

    def interrupted(self: Path, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    assert command.main([str(tmp_path / "a"), str(tmp_path / "b"), f"out={out}"]) == 130
    assert out.read_text() == "before"
    assert [path.name for path in tmp_path.glob("page*")] == ["page.html"]
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.undo()
    write_page(out, "after")
    assert out.read_text() == "after"
