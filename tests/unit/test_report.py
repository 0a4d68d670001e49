"""A run's console, records and summary: complete after any end, silent on other ranks."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from report_run import PLAN, QUIET, SCORES, captured, describe, finish, text_of, train, whole_run

from tightrec.trainer.report import provenance
from tightrec.trainer.report.closing import final_table
from tightrec.trainer.report.config import LoggingConfig
from tightrec.trainer.report.console import ProgressConsole, Status
from tightrec.trainer.report.html import write_report
from tightrec.trainer.report.records import RecordFile, finite, read_records, read_run
from tightrec.trainer.report.run_log import RunLog


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
        "rows": 4096,
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


def test_a_gpu_is_named_where_the_run_uses_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"card {device}")
    with RunLog(tmp_path, 0, QUIET, captured()) as log:
        log.describe(config={}, world=1, device="cuda:0", plan=[], rows={}, parameters_rank0=1)
    assert "card cuda:0" in write_report(tmp_path).read_text()
    whole_run(tmp_path)
    assert read_run(tmp_path)["gpu"] is None


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


@pytest.mark.parametrize(
    "setting", [{"every_steps": 0}, {"split_every": -1}, {"plain_every_s": -0.5}], ids=lambda s: next(iter(s))
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"logging.{next(iter(setting))}="):
        LoggingConfig(**setting)
