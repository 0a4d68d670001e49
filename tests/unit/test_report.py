"""A run's console, records, summary and page: complete after any end, and built from the files alone."""

import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from tightrec.trainer.metrics import Scores
from tightrec.trainer.report import provenance
from tightrec.trainer.report.charts import Series, bar_chart, line_chart
from tightrec.trainer.report.closing import final_table
from tightrec.trainer.report.config import LoggingConfig
from tightrec.trainer.report.console import ProgressConsole, Status
from tightrec.trainer.report.html import render, write_report
from tightrec.trainer.report.records import RecordFile, finite, read_records, read_run, write_run
from tightrec.trainer.report.run_log import RunLog
from tightrec.trainer.step_split import TimeSplit

SCORES = Scores(rows=900, log_loss=0.41, ne=0.85, auc=0.791, calibration=1.01, base_rate=0.25)
QUIET = LoggingConfig(tensorboard=False, plain_every_s=0)
PLAN = {
    "table": "t_<city>",
    "type": "row_wise",
    "ranks": [0, 1],
    "rows": 1000,
    "dim": 16,
    "memory_bytes": 64_000,
    "predicted_bytes_per_step": 2_000,
}


def captured(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def describe(log: RunLog) -> None:
    config = {"name": "trial", "seed": 7, "model": {"embedding_dim": 16, "top_layers": [8]}, "resume": None}
    log.describe(
        config=config, world=2, device="cpu", plan=[PLAN], rows={"train": 9000}, parameters_rank0=123
    )


def train(log: RunLog, step: int, loss: float = 0.5, split: TimeSplit | None = None) -> None:
    log.train(
        step=step,
        loss=loss,
        ne=0.9,
        rows_per_s=1234.0,
        learning_rate_factor=1.0,
        input_bytes=100.0,
        forward_bytes=2_000.0,
        backward_bytes=3_000.0,
        split=split,
    )


def finish(log: RunLog) -> None:
    log.finish(
        status="finished",
        scores={"test": dataclasses.asdict(SCORES)},
        bayes_auc={"test": 0.8},
        steps=2,
        rows_per_s=1234.0,
        bytes_per_step={"input": 100.0, "forward": 2_000.0, "backward": 3_000.0},
        checkpoint="checkpoints/step-2",
    )


def whole_run(folder: Path, console: Console | None = None) -> None:
    with RunLog(folder, 0, QUIET, console or captured()) as log:
        describe(log)
        log.begin_epoch(epoch=0, epochs=2, step=0, steps=2)
        log.warn("two tables <are> replicated")
        train(log, 1)
        train(log, 2, math.nan, split=TimeSplit(data=1.0, dense=4.0))
        log.evaluation("test", 2, SCORES)
        finish(log)


def test_records_are_valid_json_whatever_the_numbers(tmp_path: Path) -> None:
    whole_run(tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [r["kind"] for r in records] == ["warning", "train", "train", "split", "eval"]
    assert records[2] | {"time_s": 0} == {
        "kind": "train",
        "step": 2,
        "epoch": 0,
        "loss": None,
        "ne": 0.9,
        "rows_per_s": 1234.0,
        "learning_rate_factor": 1.0,
        "input_bytes": 100.0,
        "forward_bytes": 2_000.0,
        "backward_bytes": 3_000.0,
        "time_s": 0,
    }
    assert records[3]["total"] == 5.0
    assert records[4]["auc"] == 0.791
    assert finite({"a": [math.inf, 1.0, {"b": math.nan}], "c": Path("x")}) == {
        "a": [None, 1.0, {"b": None}],
        "c": "x",
    }


def test_a_record_is_on_its_way_to_disk_before_the_next_step(tmp_path: Path) -> None:
    file = RecordFile(tmp_path)
    file.write({"kind": "train", "step": 1})
    assert read_records(tmp_path) == [{"kind": "train", "step": 1}]
    file.close()


def test_a_resumed_run_continues_its_records_and_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    first = RecordFile(tmp_path)
    for step in (1, 2, 3):
        first.write({"kind": "train", "step": step, "part": "first"})
    first.write({"kind": "eval", "split": "valid", "step": 2})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    second = RecordFile(tmp_path)
    for step in (2, 3):
        second.write({"kind": "train", "step": step, "part": "second"})
    second.close()
    records = read_records(tmp_path)
    trained = [(r["step"], r["part"]) for r in records if r["kind"] == "train"]
    assert trained == [(1, "first"), (2, "second"), (3, "second")]
    assert sum(r["kind"] == "eval" for r in records) == 1


def test_run_json_holds_what_it_takes_to_run_it_again(tmp_path: Path) -> None:
    whole_run(tmp_path)
    run = read_run(tmp_path)
    assert (run["status"], run["seed"], run["world"], run["name"]) == ("finished", 7, 2, "trial")
    assert run["config"]["model"]["embedding_dim"] == 16
    assert run["plan"] == [PLAN]
    assert run["scores"]["test"]["auc"] == 0.791
    assert run["bytes_per_step"]["backward"] == 3_000.0
    assert run["time_split_ms"]["dense"] == 4.0
    assert run["versions"]["torch"]
    assert run["host"]["cores"] >= 1
    assert run["started"] <= run["ended"]
    assert "pytest" in run["command"]


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()])
def test_a_failed_run_says_why_and_keeps_its_records_and_page(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with RunLog(tmp_path, 0, QUIET, captured()) as log:
            describe(log)
            train(log, 1)
            raise error

    with pytest.raises(type(error)):
        fail()
    run = read_run(tmp_path)
    assert (run["status"], run["reason"]) == ("failed", f"{type(error).__name__}: {error}")
    assert len(read_records(tmp_path)) == 1
    assert type(error).__name__ in (tmp_path / "report.html").read_text()


def test_a_run_that_fails_before_it_is_described_still_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such data"), RunLog(tmp_path / "new", 0, QUIET, captured()):
        raise ValueError("no such data")
    assert read_run(tmp_path / "new")["reason"] == "ValueError: no such data"


def test_a_failing_report_does_not_hide_the_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr("tightrec.trainer.report.run_log.write_report", broken)
    console = captured()
    with pytest.raises(RuntimeError, match="the cause"), RunLog(tmp_path, 0, QUIET, console):
        raise RuntimeError("the cause")
    assert "no report could be written: disk full" in text_of(console)


def test_a_run_without_a_result_is_not_called_finished(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0, QUIET, captured()) as log:
        describe(log)
    assert read_run(tmp_path)["status"] == "stopped"


def test_a_resumed_run_remembers_its_earlier_part(tmp_path: Path) -> None:
    whole_run(tmp_path)
    with pytest.raises(RuntimeError), RunLog(tmp_path, 0, QUIET, captured()):
        raise RuntimeError
    whole_run(tmp_path)
    assert [part["status"] for part in read_run(tmp_path)["earlier"]] == ["finished", "failed"]


def test_other_ranks_write_and_say_nothing(tmp_path: Path) -> None:
    console = captured()
    with RunLog(tmp_path / "run", 1, QUIET, console) as log:
        describe(log)
        log.begin_epoch(epoch=0, epochs=1, step=0, steps=2)
        log.say("hello")
        log.warn("careful")
        train(log, 1)
        log.evaluation("test", 1, SCORES)
        finish(log)
    assert text_of(console) == ""
    assert list(tmp_path.iterdir()) == []


def test_the_console_tells_progress_evaluations_and_the_end(tmp_path: Path) -> None:
    console = captured()
    whole_run(tmp_path, console)
    told = text_of(console)
    assert told.count("warning: two tables <are> replicated") == 1
    assert "epoch 1/2  step 1/2  loss 0.5000  NE 0.9000  1,234 rows/s  5.1 kB/step" in told
    assert "step 2/2  loss –" in told
    assert "test after step 2: AUC 0.7910  NE 0.8500" in told
    assert re.search(r"test .* 900 .* 0\.7910 .* 0\.8000 .* 0\.8500 .* 0\.4100 .* 1\.010", told)
    assert "finished: 2 steps, 1,234 rows/s" in told
    assert "input 100 bytes, forward 2.0 kB, backward 3.0 kB" in told
    assert told.rstrip().endswith(str(tmp_path / "report.html"))


def test_a_score_that_is_missing_is_warned_about_once(tmp_path: Path) -> None:
    console = captured()
    nothing = dataclasses.replace(SCORES, auc=math.nan, note="all 900 labels are 0")
    with RunLog(tmp_path, 0, QUIET, console) as log:
        log.evaluation("valid", 5, nothing)
        log.evaluation("valid", 5, nothing)
    assert text_of(console).count("warning: valid after step 5: all 900 labels are 0.") == 1


def test_without_a_terminal_progress_lines_keep_their_distance() -> None:
    console = captured()
    progress = ProgressConsole(3600.0, console)
    for step in range(1, 6):
        progress.progress(Status(step=step))
    assert text_of(console).count("step") == 1


def test_a_terminal_has_one_live_line_that_goes_away() -> None:
    console = captured(terminal=True)
    progress = ProgressConsole(0.0, console)
    progress.progress(Status(step=1))
    progress.progress(Status(step=2))
    progress.say("between")
    progress.close()
    progress.close()
    told = text_of(console)
    assert "step 2" in told
    assert "\x1b[2K" in told
    assert "between\n" in told


def test_the_time_left_counts_the_epochs_to_come() -> None:
    status = Status(epoch=0, epochs=3, step=10, epoch_end=30, epoch_steps=30)
    assert status.text(2.0).endswith("2:40 min left")
    assert "left" not in status.text(None)


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


def test_the_closing_table_has_no_bayes_column_where_it_is_not_known() -> None:
    console = captured()
    console.print(final_table({"scores": {"test": {"auc": 0.7}}, "status": "stopped", "reason": "SIGTERM"}))
    assert "Bayes" not in text_of(console)
    assert "0.7000" in text_of(console)
    assert "stopped (SIGTERM)" in text_of(console)


def test_the_command_is_torchruns_where_torchrun_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/bin/python", "-u", "-m", "tightrec.trainer", "data=movielens", "name=a b"]
    monkeypatch.setattr("sys.orig_argv", words)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert provenance.command() == "/bin/python -u -m tightrec.trainer data=movielens 'name=a b'"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    started = "--nproc-per-node 2 -m tightrec.trainer data=movielens 'name=a b'"
    assert provenance.command() == f"torchrun --standalone {started}"
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert provenance.command() == f"torchrun --nnodes 4 {started}"


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "run.json"))):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "setting", [{"every_steps": 0}, {"split_every": -1}, {"plain_every_s": -0.5}], ids=lambda s: next(iter(s))
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"logging.{next(iter(setting))}="):
        LoggingConfig(**setting)
