"""Drift, NE and calibration in service: what rings, and what does not."""

import json
import logging
import math
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from tightrec.models.scores import score
from tightrec.snapshot import monitor as module
from tightrec.snapshot.monitor import BLOCKS, Alarm, Monitor, MonitorConfig, score_histogram
from tightrec.snapshot.score_sums import calibration_of, moment_sums, ne_of

Rows = tuple[np.ndarray, np.ndarray]


def rows(
    random: np.random.Generator, count: int, *, shift: float = 0, bias: float = 0, noise: float = 0
) -> Rows:
    """Probabilities and labels of rows whose true logits have mean -2 + ``shift``; the probabilities say
    ``bias`` more than the truth, and a share ``noise`` of the labels is drawn at the base rate instead."""
    logits = random.normal(-2 + shift, 1.0, count)
    chance = 1 / (1 + np.exp(-logits))
    labels = random.random(count) < chance
    redrawn = random.random(count) < noise
    labels = np.where(redrawn, random.random(count) < chance.mean(), labels)
    return (1 / (1 + np.exp(-(logits + bias)))).astype(np.float32), labels.astype(np.float32)


def reference(seed: int = 0, count: int = 50_000) -> dict[str, Any]:
    return score_histogram(*rows(np.random.default_rng(seed), count))


CONFIG = MonitorConfig(window=10_000, least_rows=2_000)


def fed(monitor: Monitor, random: np.random.Generator, count: int, **how: float) -> list[Alarm]:
    """The alarms of ``count`` rows that come in batches of odd sizes."""
    alarms = []
    while count > 0:
        some = min(count, int(random.integers(1, 1500)))
        alarms += monitor.update(*rows(random, some, **how))
        count -= some
    return alarms


@pytest.mark.parametrize("seed", range(3))
def test_no_drift_raises_no_alarm_over_many_windows(seed: int) -> None:
    monitor = Monitor(reference(), CONFIG)
    assert fed(monitor, np.random.default_rng(100 + seed), 1_000_000) == []
    values = monitor.values()
    assert values["psi"] < 0.02
    assert abs(values["ne"] - monitor._figures["ne"][0]) < 0.05
    assert abs(values["calibration"] - 1) < 0.1
    assert values["rows"] == values["labelled_rows"] == 10_000


def test_small_windows_stay_quiet_although_they_swing_past_the_thresholds() -> None:
    monitor = Monitor(reference(), MonitorConfig(window=200, least_rows=20))
    random = np.random.default_rng(1)
    largest = dict.fromkeys(("psi", "calibration"), 0.0)
    for _ in range(3000):
        assert monitor.update(*rows(random, 20)) == []
        values = monitor.values()
        largest["psi"] = max(largest["psi"], values["psi"])
        largest["calibration"] = max(largest["calibration"], abs((values["calibration"] or 1) - 1))
    # The test would prove nothing of the standard errors otherwise.
    assert largest["psi"] > monitor.config.psi
    assert largest["calibration"] > monitor.config.calibration_band


def test_drift_of_the_scores_rings_once_and_again_after_recovery(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tightrec.snapshot.monitor")
    monitor = Monitor(reference(), CONFIG)
    random = np.random.default_rng(2)
    assert fed(monitor, random, 20_000) == []
    (alarm,) = fed(monitor, random, 20_000, shift=0.8)
    assert (alarm.what, alarm.threshold, alarm.reference) == ("psi", 0.2, 0.0)
    assert alarm.value >= 0.2
    assert alarm.rows == 10_000
    assert 20_000 < alarm.at_row <= 31_000 and alarm.at_row % 1_000 == 0
    assert monitor.active == {"psi": alarm}
    assert fed(monitor, random, 20_000) == []
    assert monitor.active == {}
    (again,) = fed(monitor, random, 20_000, shift=0.8)
    assert monitor.alarms == [alarm, again]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [alarm.sentence, again.sentence]
    assert "psi is" in warnings[0] and "over the last 10,000 rows, past 0.2" in warnings[0]
    assert [r.getMessage().split(":")[0] for r in caplog.records if r.levelno == logging.INFO] == [
        "psi recovered"
    ]


def test_predictions_that_say_too_much_raise_calibration() -> None:
    for bias, side in ((0.3, 1), (-0.3, -1)):
        monitor = Monitor(reference(), CONFIG)
        alarms = fed(monitor, np.random.default_rng(3), 15_000, bias=bias)
        (alarm,) = [a for a in alarms if a.what == "calibration"]
        assert (alarm.value - alarm.reference) * side > 0.1 * alarm.reference
        assert alarm.threshold == pytest.approx(alarm.reference * (1 + 0.1 * side))


def test_noise_in_the_labels_raises_ne_alone() -> None:
    monitor = Monitor(reference(), CONFIG)
    (alarm,) = fed(monitor, np.random.default_rng(4), 15_000, noise=0.6)
    assert alarm.what == "ne"
    assert alarm.value >= alarm.threshold == pytest.approx(1.05 * alarm.reference)


def test_thresholds_may_be_chosen() -> None:
    random = np.random.default_rng(5)
    for setting, how in (
        ("psi", {"shift": 0.8}),
        ("ne_increase", {"noise": 0.6}),
        ("calibration_band", {"bias": 0.3}),
    ):
        what = setting.split("_")[0]
        strict, lax = (
            Monitor(reference(), CONFIG),
            Monitor(reference(), MonitorConfig(window=10_000, **{setting: 50.0})),
        )
        assert what in [a.what for a in fed(strict, random, 15_000, **how)]
        assert what not in [a.what for a in fed(lax, random, 15_000, **how)]


def test_nothing_is_judged_on_fewer_rows_than_told() -> None:
    monitor = Monitor(reference(), MonitorConfig(window=10_000, least_rows=5_000))
    assert monitor.update(np.full(4_999, 0.9)) == []
    (alarm,) = monitor.update(np.full(1, 0.9))
    assert (alarm.rows, alarm.at_row) == (5_000, 5_000)


def test_a_value_that_swings_around_the_threshold_rings_once() -> None:
    histogram = {"edges": [0.5], "counts": [50_000, 50_000]}
    config = MonitorConfig(window=10_000, least_rows=1_000, psi=0.2)
    monitor = Monitor(histogram, config)

    def psi(share: float) -> list[Alarm]:
        """Alarms of a whole window with that share of high scores: psi is (share - 1/2) ln(...) twice."""
        return monitor.update(
            np.tile(np.repeat([0.9, 0.1], [round(1000 * share), round(1000 * (1 - share))]), 10)
        )

    assert len(psi(0.73)) == 1  # psi 0.229
    assert monitor.values()["psi"] == pytest.approx(0.2288, abs=1e-3)
    for _ in range(3):
        assert psi(0.71) == []  # 0.188: below the threshold, not recovered
        assert psi(0.73) == []
    assert psi(0.68) == []  # 0.136
    assert monitor.active == {}
    assert len(psi(0.73)) == 1


def test_how_rows_are_cut_into_updates_does_not_matter() -> None:
    random = np.random.default_rng(6)
    parts = [rows(random, 12_345), rows(random, 23_456, shift=0.8, bias=0.5)]
    p, y = (np.concatenate(column) for column in zip(*parts, strict=True))
    states = []
    for step in (len(p), 1000, 777, 17):
        monitor = Monitor(reference(), CONFIG)
        for start in range(0, len(p), step):
            monitor.update(p[start : start + step], y[start : start + step])
        assert monitor.alarms
        states.append((monitor.alarms, monitor.values()))
    for alarms, values in states[1:]:
        assert {(a.what, a.at_row) for a in alarms} == {(a.what, a.at_row) for a in states[0][0]}
        assert values == pytest.approx(states[0][1])


def test_the_window_forgets_what_is_older() -> None:
    monitor = Monitor(reference(), MonitorConfig(window=1_000, least_rows=1_000))
    random = np.random.default_rng(7)
    monitor.update(*rows(random, 5_000, shift=3))
    p, y = rows(random, 1_000)
    monitor.update(p, y)
    alone = Monitor(reference(), MonitorConfig(window=1_000, least_rows=1_000))
    alone.update(p, y)
    assert monitor.values() == pytest.approx(alone.values())
    assert monitor.values()["psi"] < 0.2


def test_labels_may_come_later_and_in_another_order() -> None:
    random = np.random.default_rng(8)
    p, y = rows(random, 10_000, bias=0.3)
    at_once, later = Monitor(reference(), CONFIG), Monitor(reference(), CONFIG)
    at_once.update(p, y)
    assert [a.what for a in at_once.alarms] == ["calibration"]
    assert later.update(p) == []
    assert later.values()["ne"] is None and later.values()["labelled_rows"] == 0
    order = random.permutation(10_000)
    (alarm,) = later.update_labels(p[order], y[order])
    assert alarm.what == "calibration"
    assert later.values() == pytest.approx(at_once.values())


def test_ne_and_calibration_are_those_of_the_trainer() -> None:
    p, y = rows(np.random.default_rng(9), 10_000, bias=0.2)
    monitor = Monitor(reference(), CONFIG)
    monitor.update(torch.from_numpy(p), torch.from_numpy(y))
    expected = score(torch.logit(torch.from_numpy(p).double()), torch.from_numpy(y))
    assert monitor.values()["ne"] == pytest.approx(expected.ne, rel=1e-6)
    assert monitor.values()["calibration"] == pytest.approx(expected.calibration, rel=1e-6)


def test_standard_errors_are_those_of_a_thousand_draws() -> None:
    random = np.random.default_rng(10)
    drawn = [moment_sums(*(c.astype(float) for c in rows(random, 1_000))) for _ in range(1_000)]
    for figure in (ne_of, calibration_of):
        values, errors = np.array([figure(sums) for sums in drawn]).T
        assert errors.mean() == pytest.approx(values.std(), rel=0.1)


def test_a_reference_without_labels_watches_drift_alone() -> None:
    random = np.random.default_rng(11)
    monitor = Monitor(score_histogram(rows(random, 10_000)[0]), CONFIG)
    assert fed(monitor, random, 15_000, noise=0.6, bias=0.1) == []
    assert [a.what for a in fed(monitor, random, 15_000, shift=2)] == ["psi"]


def test_sure_scores_and_labels_all_alike_do_not_break_it() -> None:
    monitor = Monitor(reference(), MonitorConfig(window=100, least_rows=100))
    for label in (0, 1):
        monitor.update(np.repeat([0.0, 1.0], 50), np.full(100, label))
        values = monitor.values()
        assert values["ne"] is None
        assert values["calibration"] == (None if label == 0 else 0.5)
    monitor.update(np.repeat([0.0, 1.0], 50), np.repeat([1, 0], 50))
    assert math.isfinite(monitor.values()["ne"])
    assert monitor.update([]) == []


def test_a_state_goes_through_json_and_goes_on_as_if_never_left() -> None:
    random = np.random.default_rng(12)
    first = [rows(random, 777, shift=1.5) for _ in range(20)]
    second = [rows(random, 777) for _ in range(20)]
    whole, left = Monitor(reference(), CONFIG), Monitor(reference(), CONFIG)
    for batch in first:
        whole.update(*batch)
        left.update(*batch)
    assert left.active
    state = json.loads(json.dumps(left.state(), allow_nan=False))
    resumed = Monitor(reference(), CONFIG)
    resumed.restore(state)
    assert resumed.active == left.active and resumed.alarms == left.alarms
    for batch in second:
        assert resumed.update(*batch) == whole.update(*batch)
    assert resumed.state() == whole.state()


def test_a_state_of_another_monitor_or_a_broken_one_is_refused() -> None:
    monitor = Monitor(reference(), CONFIG)
    monitor.update(np.full(3_000, 0.5))
    state = monitor.state()
    for other in (Monitor(reference(seed=1), CONFIG), Monitor(reference(), MonitorConfig())):
        with pytest.raises(ValueError, match="another snapshot or configuration"):
            other.restore(state)
    for broken in (
        {k: v for k, v in state.items() if k != "labelled"},
        {**state, "scored": {**state["scored"], "filling": [1.0]}},
        {**state, "active": [{"what": "psi"}]},
    ):
        with pytest.raises(ValueError, match="state is malformed"):
            monitor.restore(broken)
    with pytest.raises(ValueError, match="another snapshot or configuration"):
        monitor.restore([])  # type: ignore[arg-type]
    assert monitor.state() == state


def test_threads_may_share_a_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = Monitor(reference(), MonitorConfig(window=1_000, least_rows=1_000))
    p, y = rows(np.random.default_rng(13), 70)

    def slowly(real: Any) -> Any:
        def called(*arguments: Any) -> Any:
            time.sleep(1e-4)  # lets the other threads run within an update
            return real(*arguments)

        return called

    monkeypatch.setattr(module, "counts_of", slowly(module.counts_of))
    monkeypatch.setattr(module, "moment_sums", slowly(module.moment_sums))

    def work() -> None:
        for _ in range(20):
            monitor.update(p, y)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = monitor.state()
    for window, of_block in (("scored", np.sum), ("labelled", lambda sums: sums[0])):
        assert state[window]["seen"] == 7_000
        assert [of_block(block) for block in state[window]["blocks"]] == [100] * BLOCKS


@pytest.mark.parametrize(
    ("update", "says"),
    [
        (([0.5, 1.5],), r"probabilities must lie between 0 and 1: row 1 has 1.5"),
        (([0.5, math.nan],), "row 1 has nan"),
        (([[0.5]],), r"probabilities must have one dimension, not shape \[1, 1\]"),
        ((["x"],), "probabilities must be numbers"),
        (([0.5, 0.5], [1]), "there are 1 labels for 2 probabilities"),
        (([0.5, 0.5], [1, 0.5]), "labels must be 0 or 1: row 1 has 0.5"),
        (([0.5], [math.nan]), "labels must be 0 or 1: row 0 has nan"),
    ],
)
def test_a_mistake_is_refused_and_nothing_taken_in(update: tuple[Any, ...], says: str) -> None:
    monitor = Monitor(reference(), CONFIG)
    with pytest.raises(ValueError, match=says):
        monitor.update(*update)
    assert monitor.state() == Monitor(reference(), CONFIG).state()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"window": 1_005}, "window=1005 must be a multiple of 10"),
        ({"window": 0}, "window=0"),
        ({"least_rows": 0}, "least_rows=0 must lie between 1 and window=20000"),
        ({"window": 1_000}, "least_rows=2000 must lie between 1 and window=1000"),
        ({"psi": 0}, "psi=0 must be above 0"),
        ({"ne_increase": math.nan}, "ne_increase=nan must be above 0"),
        ({"calibration_band": -1}, "calibration_band=-1 must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MonitorConfig(**wrong)


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"edges": [0.5], "counts": [1]},
        {"edges": [0.5], "counts": [0, 0]},
        {"edges": [0.5], "counts": [1, 1], "ne": {"value": 0, "error": 0}},
        {"edges": [0.5], "counts": [1, 1], "calibration": {"value": 1}},
    ],
)
def test_a_broken_reference_is_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not what score_histogram returns"):
        Monitor(broken)


def test_the_histogram_has_bins_of_equally_many_rows() -> None:
    p, y = rows(np.random.default_rng(14), 10_000)
    found = score_histogram(torch.from_numpy(p), y)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["counts"][0] == found["counts"][-1] == 0
    assert found["counts"][1:-1] == pytest.approx([500] * 20, abs=3)
    assert found["edges"] == sorted(found["edges"])
    assert found["ne"]["value"] == pytest.approx(0.88, abs=0.02)
    assert score_histogram(p).keys() == {"edges", "counts"}
    with pytest.raises(ValueError, match="at least one row"):
        score_histogram([])


def test_scores_that_are_all_equal_or_few_have_a_histogram_that_tells_drift() -> None:
    constant = score_histogram(np.full(5_000, 0.25))
    assert sum(constant["counts"]) == 5_000 and len(constant["counts"]) == 3
    for value, alarms in ((0.25, 0), (0.2499, 1), (0.2501, 1)):
        monitor = Monitor(constant, MonitorConfig(window=1_000, least_rows=1_000))
        assert len(monitor.update(np.full(1_000, value))) == alarms
    few = score_histogram(np.repeat([0.1, 0.2, 0.9], [10, 4_000, 990]))
    assert few["counts"] == [0, 4_010, 990, 0]


def test_the_window_is_of_ten_blocks() -> None:
    monitor = Monitor(reference(), CONFIG)
    monitor.update(np.full(CONFIG.window // BLOCKS - 1, 0.1))
    assert monitor.values()["rows"] == 0
    monitor.update(np.full(1, 0.1))
    assert monitor.values()["rows"] == 1_000
