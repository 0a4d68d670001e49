"""The page about a run: whole, self-contained, and built from the run's files alone."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from report_run import whole_run

from tightrec.trainer.report.charts import Series, bar_chart, line_chart
from tightrec.trainer.report.html import render, write_report
from tightrec.trainer.report.records import RecordFile, write_run


class Page(HTMLParser):
    """Collects what a browser would load, and checks that tags close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object", "image"):
            self.loads.append(tag)
        # xlink:href="#id" points into the page.
        self.loads += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href") and str(v)[:1] != "#"]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.remove(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    whole_run(tmp_path)
    page = (tmp_path / "report.html").read_text()
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.loads == []
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]+)"', "".join(re.findall(r"<clipPath[^>]*>", page)))
    assert len(ids) == len(set(ids)) > 0
    assert "t_&lt;city&gt;" in page
    assert "two tables &lt;are&gt; replicated" in page
    for told in (
        "0.7910",
        "0.8000",
        "model.embedding_dim",
        "Predicted in all: 2.0 kB",
        "measured: 5.0 kB",
        "dense 4.0 ms",
    ):
        assert told in page


def test_the_page_is_built_again_from_the_files_alone(tmp_path: Path) -> None:
    whole_run(tmp_path)
    before = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    assert write_report(tmp_path).read_text() == before


@pytest.mark.parametrize(
    "run",
    [{}, {"status": "running"}, {"scores": {}, "plan": [], "host": {}}],
    ids=["empty", "killed", "bare"],
)
def test_a_run_that_left_little_still_has_a_page(run: dict[str, Any]) -> None:
    page = render(run, [], "folder")
    assert "The run has no final scores." in page
    assert "<svg" not in page
    assert ("Not ended" in page) == (run.get("status") == "running")


def test_a_single_record_of_nothing_still_draws(tmp_path: Path) -> None:
    file = RecordFile(tmp_path)
    file.write({"kind": "train", "step": 1, "loss": math.nan, "ne": math.nan, "rows_per_s": math.nan})
    file.write({"kind": "split", "step": 1, "dense": math.nan})
    file.write({"kind": "eval", "split": "valid", "step": 1, "auc": math.nan})
    file.close()
    write_run(tmp_path, {"status": "failed"})
    assert "<svg" in write_report(tmp_path).read_text()


@pytest.mark.parametrize("points", [1, 3, 2000])
def test_charts_are_xml_in_the_colours_of_the_page(points: int) -> None:
    steps = list(range(points))
    lines = [
        Series(label="a", steps=steps, values=[None, *map(float, steps[1:])], colour=0),
        Series(label="level", steps=(), values=[3.0], colour=7, level=True),
    ]
    layers = [Series(label=str(i), steps=steps, values=[1.0] * points, colour=i) for i in range(8)]
    for chart, colours in (
        (line_chart("Lines", lines, "rows/s", from_zero=True), (0, 7)),
        (bar_chart("Bars", layers, "ms"), range(8)),
    ):
        ElementTree.fromstring(chart.svg.replace("xlink:", ""))
        assert not re.search(r"#0[0-3]0[0-9a-f]0[0-9a-f]", chart.svg)
        for colour in colours:
            assert f"var(--series-{colour})" in chart.svg
        # A page of a long run stays small: lines and bars are thinned.
        assert len(chart.svg) < 250_000


def test_thinned_bars_are_means_of_their_neighbours() -> None:
    steps = list(range(120))
    even = bar_chart("t", [Series(label="a", steps=steps, values=[2.0] * 120)]).svg
    uneven = bar_chart("t", [Series(label="a", steps=steps, values=[1.0, 3.0] * 60)]).svg
    assert uneven == even


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "run.json"))):
        write_report(tmp_path)
