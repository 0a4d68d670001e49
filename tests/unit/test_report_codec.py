"""What a run tells about compression: records, console, TensorBoard and the page's section."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from report_run import QUIET, captured, describe, finish, text_of, train, whole_run

from tightrec.trainer.report.compression import compression
from tightrec.trainer.report.config import LoggingConfig
from tightrec.trainer.report.html import write_report
from tightrec.trainer.report.records import RecordFile, read_records, read_run
from tightrec.trainer.report.run_log import Direction, RunLog


def table(
    name: str = "t_city", sent: float = 50.0, error: float | None = 0.98, **more: Any
) -> dict[str, Any]:
    figures = {"rows": 512, "distinct": 40, "plain_bytes": 1_000.0, "sent_bytes": sent, "bound": "range:0.03"}
    return {name: {**figures, "error_over_bound": error, "mode": "dedup", **more}}


def tell(
    log: RunLog, step: int, direction: Direction = "forward", sent: float = 100.0, **tables: Any
) -> None:
    log.codec(
        step=step,
        direction=direction,
        encode_ms=0.5,
        exchange_ms=2.0,
        decode_ms=0.25,
        plain_bytes=2_000.0,
        sent_bytes=sent,
        multiplier=1.5,
        tables=tables or table(),
    )


def choose(log: RunLog, step: int, **more: Any) -> None:
    choice = {"mode": "entropy", "reason": "0.4 ms <less>", "predicted_ms": 0.41, "measured_ms": None, **more}
    log.choice(step=step, direction="forward", link_gb_s=12.5, plain=True, tables={"t_city": choice})


def compressed_run(folder: Path, config: LoggingConfig = QUIET) -> str:
    console = captured()
    with RunLog(folder, 0, config, console) as log:
        describe(log)
        for step, sent in ((1, 100.0), (2, 300.0)):
            tell(log, step, sent=sent, **table(sent=sent / 2, error=1.0 - step / 10))
            tell(log, step, "backward", 50.0)
            train(log, step)
        log.probe(
            step=2,
            total_dne=1.5e-4,
            budget=2e-4,
            multiplier=1.5,
            tables={"t_city": {"dne": 1.2e-4, "bound": "range:0.03"}},
        )
        choose(log, 2)
        finish(log)
    return text_of(console)


def test_records_of_both_directions_stand_beside_each_other(tmp_path: Path) -> None:
    compressed_run(tmp_path)
    records = read_records(tmp_path)
    codec = [(r["direction"], r["step"], r["ratio"]) for r in records if r["kind"] == "codec"]
    assert codec == [
        ("forward", 1, 20.0),
        ("forward", 2, 2_000 / 300),
        ("backward", 1, 40.0),
        ("backward", 2, 40.0),
    ]
    first = next(r for r in records if r["kind"] == "codec")
    assert first["tables"]["t_city"] == table(error=0.9)["t_city"] | {"ratio": 20.0}
    assert (first["encode_ms"], first["exchange_ms"], first["decode_ms"]) == (0.5, 2.0, 0.25)
    assert next(r for r in records if r["kind"] == "probe")["tables"]["t_city"]["dne"] == 1.2e-4
    choice = next(r for r in records if r["kind"] == "choice")
    assert (choice["link_gb_s"], choice["plain"], choice["tables"]["t_city"]["mode"]) == (
        12.5,
        True,
        "entropy",
    )


def test_a_resumed_run_replaces_the_steps_it_repeats_in_each_direction_alone(tmp_path: Path) -> None:
    file = RecordFile(tmp_path)
    for part, steps in (("first", (1, 2)), ("second", (2,))):
        for direction in ("forward", "backward") if part == "first" else ("backward",):
            for step in steps:
                file.write({"kind": "codec", "direction": direction, "step": step, "part": part})
    file.close()
    kept = [(r["direction"], r["step"], r["part"]) for r in read_records(tmp_path)]
    assert kept == [
        ("forward", 1, "first"),
        ("forward", 2, "first"),
        ("backward", 1, "first"),
        ("backward", 2, "second"),
    ]


def test_nothing_sent_has_no_ratio(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0, QUIET, captured()) as log:
        tell(log, 1, sent=0.0, **table(sent=0.0))
    (record,) = read_records(tmp_path)
    assert (record["ratio"], record["tables"]["t_city"]["ratio"]) == (None, None)
    assert "<h2>Compression</h2>" in write_report(tmp_path).read_text()


def test_the_console_tells_the_ratios_of_both_directions_and_the_whole_runs_at_the_end(
    tmp_path: Path,
) -> None:
    told = compressed_run(tmp_path)
    assert "5.1 kB/step  forward 20.0x  backward 40.0x" in told
    assert "fewer bytes than plain float32: forward 10.0x, backward 40.0x" in told
    run = read_run(tmp_path)
    assert run["compression"]["forward"] == {"plain_bytes": 2_000.0, "sent_bytes": 200.0, "ratio": 10.0}
    console = captured()
    whole_run(tmp_path / "plain", console)
    assert "forward 2.0 kB" in text_of(console)
    assert not re.search(r"\dx", text_of(console))


def test_other_ranks_record_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", 1, QUIET, captured()) as log:
        tell(log, 1)
        choose(log, 1)
        log.probe(step=1, total_dne=0.0, budget=None, multiplier=1.0, tables={})
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_the_ratios_times_and_each_tables_ratio(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    compressed_run(tmp_path, LoggingConfig(plain_every_s=0))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {
        *(f"codec/{way}/{name}" for way in ("forward", "backward") for name in ("ratio", "sent_bytes")),
        *(f"codec/forward/{part}_ms" for part in ("encode", "exchange", "decode")),
        "codec/forward_tables/t_city/ratio",
        "probe/total_dne",
        "probe_tables/t_city/dne",
        "choice/forward/link_gb_s",
    } <= set(events.Tags()["scalars"])
    assert [e.value for e in events.Scalars("codec/forward/ratio")] == pytest.approx([20.0, 2_000 / 300])
    assert len(events.Scalars("codec/forward_tables/t_city/error_over_bound")) == 2


def test_the_page_shows_each_tables_figures_and_the_choice_with_its_reason(tmp_path: Path) -> None:
    compressed_run(tmp_path)
    page = (tmp_path / "report.html").read_text()
    section = page[page.index("<h2>Compression</h2>") : page.index("<h2>Scores</h2>")]
    for title in (
        "Times fewer bytes than plain float32",
        "Sent in frames a step",
        "Bounds multiplied by",
        "Exchange forward, rank 0",
        "Exchange backward, rank 0",
        "Normalised entropy that the bounds cost",
        "budget 0.0002",
    ):
        assert title in section, title
    rows = [
        re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", section, re.DOTALL)
    ]
    bound = ["range:0.03", "0.900", "dedup", "+0.000120"]
    assert ["t_city", "512", "40", "1.0 kB", "100 bytes", "10.0x", *bound] in rows
    assert ["t_city", "entropy", "0.410", "–", "0.4 ms &lt;less&gt;"] in rows
    assert "measured at 12.5 GB/s. It is too fast to gain, so float32 is sent." in section


def test_a_run_without_compression_shows_nothing_of_it(tmp_path: Path) -> None:
    whole_run(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Compression" not in page
    assert "fewer bytes" not in page
    assert read_run(tmp_path)["compression"] == {}


def test_tables_come_with_the_largest_first_and_a_long_list_is_cut() -> None:
    tables: dict[str, Any] = {}
    for number in range(120):
        tables |= table(f"t_{number}", plain_bytes=float(number))
    record = {"kind": "codec", "direction": "forward", "step": 1, "tables": json.loads(json.dumps(tables))}
    (grid,) = compression([record]).tables
    assert [row[0] for row in grid.rows[:2]] == ["t_119", "t_118"]
    assert len(grid.rows) == 100
    assert grid.note == "20 more tables stand in metrics.jsonl."


def test_unmeasured_figures_are_dashes_not_errors(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0, QUIET, captured()) as log:
        describe(log)
        log.codec(
            step=1,
            direction="forward",
            encode_ms=None,
            exchange_ms=None,
            decode_ms=None,
            plain_bytes=math.nan,
            sent_bytes=1.0,
            multiplier=1.0,
            tables=table(error=None, bound=None, mode=None),
        )
        log.probe(step=1, total_dne=math.nan, budget=None, multiplier=1.0, tables={})
        choose(log, 1, predicted_ms=None)
    section = compression(read_records(tmp_path))
    assert section.tables[0].rows[0][6:] == ["–", "–", "–"]
    assert section.tables[1].rows[0][2:4] == ["–", "–"]
    assert [chart.title for chart in section.charts] == ["Sent in frames a step", "Bounds multiplied by"]


def test_one_slow_window_does_not_hide_the_others() -> None:
    def drawn(first: float) -> str:
        record = {"kind": "codec", "direction": "forward", "exchange_ms": 2.0, "decode_ms": 1.0}
        times = [first, *[1.0] * 9]
        records = [{**record, "step": step, "encode_ms": ms} for step, ms in enumerate(times, start=1)]
        (chart,) = compression(records).charts
        assert chart.legend[0].label == "encode 1.00 ms"
        # Without the identifiers of the clip paths, which depend on the shapes.
        return ",".join(re.findall(r">([\d.]+)</text>", chart.svg))

    assert drawn(50_000.0) == drawn(90_000.0) != drawn(1.5)
    assert "50000" not in drawn(50_000.0)
