"""The mode of each table by predicted time, plain or compressed, and the published rule."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from tightrec.compression.codec import MODES, Mode
from tightrec.compression.policy.choice import (
    ChoiceConfig,
    ModeChooser,
    published_choice,
    published_speed_up,
)
from tightrec.compression.policy.estimates import ModeCost, Trial

BYTES = {"auto": 0.3, "raw": 4.0, "half": 2.0, "packed": 0.6, "dedup": 0.5, "entropy": 0.3}
NS = {"auto": 9.0, "raw": 0.5, "half": 1.0, "packed": 2.0, "dedup": 4.0, "entropy": 8.0}
"""Of encode; decode takes a quarter."""
VALUES = 100_000


def trial(values: int = 1000, call_s: float = 0.0, **changed: float) -> Trial:
    """The table above, some bytes changed by mode."""
    costs: dict[Mode, ModeCost] = {
        mode: ModeCost(
            bytes_per_value=changed.get(mode, BYTES[mode]),
            encode_s=1e-9 * NS[mode],
            decode_s=0.25e-9 * NS[mode],
            encode_call_s=call_s,
            decode_call_s=call_s,
        )
        for mode in MODES
    }
    return Trial(values=values, costs=costs)


def on_link(
    gb_s: float, *tables: str, initial: Mode = "raw", latency_s: float = 0.0, **config: object
) -> ModeChooser:
    """A chooser that has seen such a link, a step of each table, and their trials."""
    chooser = ModeChooser("forward", tables, config=ChoiceConfig(**config), initial=initial)  # type: ignore[arg-type]
    for size in (10_000, 1_000_000):
        chooser.link_estimate.record(size, latency_s + size / (1e9 * gb_s))
    sent = np.full(len(tables), VALUES * BYTES[initial])
    chooser.record_tables(np.full(len(tables), VALUES), sent)
    for table in tables:
        chooser.record_trial(table, trial())
    return chooser


def agreed(chooser: ModeChooser) -> ModeChooser:
    chooser.agree(chooser.measurements())
    return chooser


def predicted(mode: str, gb_s: float) -> float:
    """Milliseconds of a table, by hand."""
    return 1e3 * VALUES * (BYTES[mode] / (1e9 * gb_s) + 1.25e-9 * NS[mode])


def test_a_slower_link_gets_a_mode_that_takes_longer_and_sends_less() -> None:
    found = []
    for gb_s in (0.01, 0.1, 1.0, 10.0):
        choice = agreed(on_link(gb_s, "t")).choose()["t"]
        modes: tuple[Mode, ...] = ("raw", "half", "packed", "dedup", "entropy")
        best = min(modes, key=lambda mode: predicted(mode, gb_s))
        assert choice.mode == best
        assert choice.predicted_ms == pytest.approx(predicted(best, gb_s))
        assert choice.bytes == pytest.approx(VALUES * BYTES[best])
        found.append(best)
    assert found == ["entropy", "packed", "packed", "raw"]


def test_each_table_gets_its_own_mode_and_says_why() -> None:
    chooser = on_link(0.1, "repeats", "differs")
    chooser.record_trial("repeats", trial(values=10**9, dedup=0.01))
    choices = agreed(chooser).choose()
    assert {table: choice.mode for table, choice in choices.items()} == {
        "repeats": "dedup",
        "differs": "packed",
    }
    assert choices["differs"].reason == "0.85 ms, next dedup 1 ms"
    assert chooser.modes == ["dedup", "packed"]


def test_only_candidates_are_chosen_and_lossless_tables_are_raw() -> None:
    chooser = agreed(on_link(0.01, "t", "ids", candidates=("packed", "half")))
    choices = chooser.choose(lossless=["ids"])
    assert choices["t"].mode == "packed"
    assert choices["ids"].mode == "raw"
    assert "lossless" in choices["ids"].reason


def test_a_mode_stays_where_another_gains_too_little() -> None:
    for gain, mode in ((0.02, "packed"), (0.05, "dedup")):
        chooser = on_link(0.1, "t", initial="packed")
        faster = predicted("packed", 0.1) * (1 - gain)
        size = (faster / 1e3 / VALUES - 1.25e-9 * NS["dedup"]) * 1e8
        chooser.record_trial("t", trial(values=10**9, dedup=size))
        choice = agreed(chooser).choose()["t"]
        assert choice.mode == mode
        assert ("stays: dedup would gain 2.0%" in choice.reason) == (gain == 0.02)


def test_a_table_without_measurements_or_rows_keeps_its_mode() -> None:
    chooser = ModeChooser("backward", ["tried", "empty", "new"])
    assert {c.mode for c in chooser.choose().values()} == {"auto"}
    chooser.link_estimate.record(1e5, 1e-3)
    chooser.record_tables(np.array([VALUES, 0, 0]), np.array([VALUES * 0.3, 24, 24]))
    chooser.record_trial("tried", trial())
    choices = agreed(chooser).choose()
    assert choices["tried"].mode != "auto"
    assert choices["empty"].mode == choices["new"].mode == "auto"
    assert choices["empty"].predicted_ms == 0.0
    assert choices["new"].reason.startswith("auto stays")


def test_bytes_measured_in_use_correct_the_trials_of_the_other_coded_modes() -> None:
    chooser = ModeChooser("forward", ["t"], initial="packed")
    chooser.link_estimate.record(1e4, 1e-3)
    chooser.record_trial("t", trial())
    chooser.record_tables([VALUES], [VALUES * 1.2])  # twice what the trial took
    _, sizes = agreed(chooser)._costs.predict(chooser.modes)
    found = dict(zip(MODES, (sizes[0] / VALUES).tolist(), strict=True))
    assert found == pytest.approx(
        {"auto": 0.6, "raw": 4.0, "half": 2.0, "packed": 1.2, "dedup": 1.0, "entropy": 0.6}
    )


def test_no_coded_mode_is_thought_to_grow_past_raw() -> None:
    chooser = ModeChooser("forward", ["t"], initial="packed")
    chooser.link_estimate.record(1e4, 1e-3)
    chooser.record_trial("t", trial(packed=1.5, dedup=2.0))
    chooser.record_tables([VALUES], [VALUES * 4.5])
    _, sizes = agreed(chooser)._costs.predict(chooser.modes)
    assert sizes[0, MODES.index("dedup")] == pytest.approx(VALUES * 4.0)


def test_tables_that_were_never_tried_do_not_hold_up_the_verdict() -> None:
    chooser = on_link(0.1, "tried", initial="packed")
    chooser = ModeChooser("forward", ["tried", "new", "ids"], initial="packed", link=chooser.link_estimate)
    chooser.record_trial("tried", trial())
    chooser.record_tables(np.full(3, VALUES), VALUES * np.array([0.6, 1.2, 4.0]))
    expected = 3 * predicted("packed", 0.1) + 1e3 * VALUES * (0.6 + 3.4) / 1e8
    assert agreed(chooser).plain_is_faster(1e9).compressed_ms == pytest.approx(expected)
    assert chooser.choose(lossless=["ids"])["ids"].mode == "raw"
    expected = 2 * predicted("packed", 0.1) + 1e3 * VALUES * 0.6 / 1e8 + predicted("raw", 0.1)
    assert chooser.plain_is_faster(1e9).compressed_ms == pytest.approx(expected)


def test_codec_times_measured_in_use_correct_the_trials() -> None:
    chooser = on_link(0.1, "t", initial="packed", latency_s=1e-3)
    step = {
        "wire_bytes": VALUES * 0.6,
        "encode_s": 2 * VALUES * 2e-9,
        "exchange_s": 1e-3 + VALUES * 0.6e-8,
        "decode_s": 3 * VALUES * 0.5e-9,
    }
    chooser.record_step(**step)
    chooser.record_step(**{**step, "exchange_s": math.nan})  # a clock that failed is left out
    chooser.record_trial("t", trial())
    choice = agreed(chooser).choose()["t"]
    assert choice.mode == "packed"
    measured = 1e3 * (VALUES * 0.6e-8 + step["encode_s"] + step["decode_s"])
    assert choice.predicted_ms == pytest.approx(measured)
    report = chooser.report(500)
    assert report["tables"]["t"]["predicted_ms"] == pytest.approx(measured)
    assert report["tables"]["t"]["measured_ms"] is None  # it was measured before the choice
    # The next period takes longer: beside it stands what was predicted before it.
    chooser.record_step(**{**step, "encode_s": 1e-3})
    chooser.record_tables([VALUES], [VALUES * 0.6])
    after = measured + 1.0 - 1e3 * step["encode_s"]
    agreed(chooser)
    for choose in (False, True):
        if choose:
            assert chooser.choose()["t"].predicted_ms == pytest.approx(after)
        row = chooser.report(1000)["tables"]["t"]
        assert (row["predicted_ms"], row["measured_ms"]) == (pytest.approx(measured), pytest.approx(after))
    chooser.record_trial("t", trial(values=10**9, raw=0.001))
    agreed(chooser)
    assert chooser.choose()["t"].mode == "raw"
    assert chooser.report(1500)["tables"]["t"]["measured_ms"] is None
    assert report | {"tables": 0} == {
        "kind": "choice",
        "step": 500,
        "direction": "forward",
        "link_gb_s": pytest.approx(0.1),
        "plain": False,
        "reason": "not examined yet",
        "tables": 0,
    }


def test_the_calls_fixed_part_is_no_tables_time_but_counts_against_plain() -> None:
    chooser = on_link(0.1, "a", "b", initial="packed")
    for table in ("a", "b"):
        chooser.record_trial(table, trial(values=10**9, call_s=2e-3))
    step = {
        "wire_bytes": 1.2 * VALUES,
        "encode_s": 1e-3 + 4e-4,
        "exchange_s": 1.2e-8 * VALUES,
        "decode_s": 1e-3 + 1e-4,
    }
    chooser.record_step(**step)
    choices = agreed(chooser).choose()
    chooser.record_step(**step)
    chooser.record_tables([VALUES] * 2, [VALUES * 0.6] * 2)
    agreed(chooser)
    assert choices["a"].predicted_ms == pytest.approx(predicted("packed", 0.1), rel=1e-3)
    assert chooser.report(1)["tables"]["a"]["measured_ms"] == pytest.approx(
        predicted("packed", 0.1), rel=1e-3
    )
    verdict = chooser.plain_is_faster(8 * VALUES)
    assert verdict.compressed_ms == pytest.approx(2 * predicted("packed", 0.1) + 2.0, rel=1e-3)


def test_a_table_whose_trial_was_disturbed_counts_as_thrice_the_others() -> None:
    chooser = on_link(0.1, "a", "b", "c", initial="packed")
    slow = trial(values=10**9)
    costs = {mode: replace(cost, encode_s=1e-6) for mode, cost in slow.costs.items()}
    chooser.record_trial("c", replace(slow, costs=costs))
    seconds, _ = agreed(chooser)._costs.predict(chooser.modes)
    at = MODES.index("packed")
    assert 1e3 * (seconds[2] - seconds[0])[at] == pytest.approx(1e3 * VALUES * 2 * 2e-9, rel=1e-3)


def test_ranks_that_measured_different_things_decide_alike() -> None:
    first, second = (ModeChooser("forward", ["a", "b"], initial="packed") for _ in range(2))
    first.record_trial("a", trial())
    second.record_trial("b", trial(dedup=0.001))
    for chooser, gb_s, values in ((first, 0.05, [2 * VALUES, 0]), (second, 0.1, [0, 2 * VALUES])):
        for size in (1e4, 1e6):
            chooser.link_estimate.record(size, 1e-3 + size / (1e9 * gb_s))
        chooser.record_tables(np.array(values), 0.6 * np.array(values))
    summed = first.measurements() + second.measurements()
    for chooser in (first, second):
        chooser.agree(summed)
        assert chooser.link is not None
        assert 1e9 * chooser.link.seconds_per_byte == pytest.approx(15.0)
        assert chooser.link.latency_s == pytest.approx(1e-3)
    choices = first.choose()
    assert choices == second.choose()
    assert choices["b"].mode == "dedup"
    assert choices["b"].bytes == pytest.approx(VALUES * 0.001)  # of one rank: the mean
    assert first.plain_is_faster(1e6) == second.plain_is_faster(1e6)


def test_nothing_new_leaves_what_was_agreed() -> None:
    chooser = agreed(on_link(0.1, "t"))
    choices = chooser.choose()
    nothing = chooser.measurements()
    assert not nothing[:-6].any()  # all but what is known of the link
    chooser.agree(nothing)
    assert chooser.choose()["t"].predicted_ms == choices["t"].predicted_ms
    assert chooser.report(0)["tables"]["t"]["measured_ms"] is None
    # Plain steps between measure nothing of the modes: what was compared before stays as it was.
    chooser.record_step(wire_bytes=6e4, encode_s=1e-3, exchange_s=1e-3, decode_s=1e-3)
    chooser.record_tables([VALUES], [VALUES * 0.6])
    agreed(chooser).choose()
    compared = chooser.report(0)["tables"]["t"]
    assert compared["measured_ms"] is not None
    assert chooser.choose()["t"].predicted_ms != compared["predicted_ms"]
    chooser.agree(nothing)
    assert chooser.report(0)["tables"]["t"] == compared


def test_times_of_a_new_trial_count_half() -> None:
    chooser = agreed(on_link(100.0, "t", initial="packed"))
    costs = {mode: replace(cost, encode_s=3 * cost.encode_s) for mode, cost in trial().costs.items()}
    chooser.record_trial("t", Trial(values=1000, costs=costs))
    seconds, _ = agreed(chooser)._costs.predict(chooser.modes)
    at = MODES.index("packed")
    assert 1e3 * seconds[0, at] == pytest.approx(predicted("packed", 100.0) + 1e3 * VALUES * 2e-9)


def test_sums_of_other_tables_or_broken_ones_are_refused() -> None:
    chooser = on_link(0.1, "t")
    with pytest.raises(ValueError, match="same tables on all"):
        chooser.agree(on_link(0.1, "t", "u").measurements())
    with pytest.raises(ValueError, match="finite"):
        chooser.agree(chooser.measurements() * math.nan)


def test_what_was_agreed_is_told_as_plain_bytes_and_ratios() -> None:
    chooser = ModeChooser("forward", ["tried", "new"])
    assert (chooser.plain_bytes, chooser.ratios()) == (0.0, {})
    chooser.record_tables([VALUES, VALUES], [VALUES, VALUES])
    chooser.record_trial("tried", trial())
    assert agreed(chooser).plain_bytes == 8 * VALUES
    assert chooser.ratios() == {"tried": pytest.approx({mode: 4 / BYTES[mode] for mode in MODES})}


def test_trials_go_round_all_tables() -> None:
    chooser = ModeChooser("forward", ["a", "b", "c"])
    assert [chooser.trials_due(2) for _ in range(3)] == [["a", "b"], ["c", "a"], ["b", "c"]]
    assert chooser.trials_due(9) == ["a", "b", "c"]


def test_plain_where_the_link_is_too_fast_and_no_flapping_at_the_border() -> None:
    assert not agreed(on_link(0.1, "t", initial="packed")).plain_is_faster(4 * VALUES).plain
    assert agreed(on_link(100.0, "t", initial="packed")).plain_is_faster(4 * VALUES).plain
    chooser = agreed(on_link(0.1, "t", initial="packed"))
    compressed_s = predicted("packed", 0.1) / 1e3
    plain = []
    for gain in (0.01, 0.05, 0.01, -0.01, 0.01, 0.02):
        verdict = chooser.plain_is_faster(compressed_s / (1 - gain) * 1e8)
        assert verdict.compressed_ms == pytest.approx(predicted("packed", 0.1))
        assert verdict.plain_ms == pytest.approx(predicted("packed", 0.1) / (1 - gain))
        plain.append(verdict.plain)
    # The first gain is too small to begin with, the third not too small to go on with.
    assert plain == [True, False, False, True, True, True]
    assert chooser.report(0)["plain"] is True
    assert "less than 3%" in chooser.report(0)["reason"]


def test_the_exchange_of_sizes_and_latency_count() -> None:
    chooser = agreed(on_link(0.1, "t", initial="packed", latency_s=2e-3))
    verdict = chooser.plain_is_faster(4 * VALUES, size_exchange_s=1e-3, other_s=5e-4)
    assert verdict.compressed_ms == pytest.approx(predicted("packed", 0.1) + 2.0 + 1.0 + 0.5)
    assert verdict.plain_ms == pytest.approx(2.0 + 4e3 * VALUES / 1e8)


def test_a_link_seen_at_one_size_only_is_called_a_guess() -> None:
    assert "guess" not in agreed(on_link(0.1, "t")).plain_is_faster(1e6).reason
    chooser = ModeChooser("forward", ["t"], initial="packed")
    chooser.record_step(wire_bytes=6e4, encode_s=1e-3, exchange_s=1e-3, decode_s=1e-3)
    chooser.record_tables([VALUES], [6e4])
    chooser.record_trial("t", trial())
    assert "guess" in agreed(chooser).plain_is_faster(1e6).reason


def test_plain_is_not_judged_before_anything_is_measured() -> None:
    chooser = ModeChooser("forward", ["t"])
    verdict = chooser.plain_is_faster(1e6)
    assert not verdict.plain
    assert verdict.plain_ms is None
    assert chooser.plain is None


def test_state_goes_through_json_and_to_other_tables() -> None:
    chooser = on_link(0.1, "a", "b", "gone", initial="packed")
    chooser.record_step(wire_bytes=1e5, encode_s=1e-3, exchange_s=1e-3, decode_s=2e-4)
    chooser.record_trial("b", trial(values=10**9, call_s=1e-4, dedup=0.01))
    chooser.record_tables([VALUES] * 3, [VALUES * 1.2] * 3)  # more than was tried
    agreed(chooser).choose()
    chooser.plain_is_faster(1.0)
    state = json.loads(json.dumps(chooser.state_dict(), allow_nan=False))
    again = ModeChooser("forward", ["new", "b", "a"])
    assert again.load_state_dict(state) == ["gone"]
    assert again.modes == ["auto", "dedup", "packed"]
    assert again.plain is True
    before, after = chooser.choose(), again.choose()
    assert after["b"] == before["b"]
    assert after["a"] == before["a"]
    assert after["new"].mode == "auto"
    same = ModeChooser("forward", ["a", "b", "gone"])
    assert same.load_state_dict(state) == []
    assert same.plain_is_faster(1e6) == chooser.plain_is_faster(1e6)
    with pytest.raises(ValueError, match="forward, not of backward"):
        ModeChooser("backward", ["a"]).load_state_dict(state)
    state["modes"]["a"] = "zip"
    with pytest.raises(ValueError, match="table 'a'"):
        again.load_state_dict(state)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        ModeChooser("forward", ["a", "a"])
    with pytest.raises(ValueError, match="initial='zip'"):
        ModeChooser("forward", ["a"], initial="zip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="candidates"):
        ChoiceConfig(candidates=())
    with pytest.raises(ValueError, match="least_gain"):
        ChoiceConfig(least_gain=3)


def test_the_published_rule() -> None:
    # 1 / (1/20 + 4 (1/45 + 1/290)) and 1 / (1/20 + 4 (1/60 + 1/40)), by hand.
    assert published_speed_up(20, "dedup") == pytest.approx(6.5496, rel=1e-4)
    assert published_speed_up(20, "entropy") == pytest.approx(4.6154, rel=1e-4)
    assert published_speed_up(20, "dedup", link_gb_s=0.0) == pytest.approx(20)
    ratios: dict[str, dict[Mode, float]] = {
        "repeats": {"dedup": 9.0, "entropy": 12.0, "packed": 99.0},
        "differs": {"dedup": 5.0, "entropy": 12.0},
    }
    assert published_choice(ratios) == {"repeats": "dedup", "differs": "entropy"}
    assert published_choice(ratios, link_gb_s=0.1)["repeats"] == "entropy"
    assert published_choice({"t": {"dedup": 3.0, "entropy": 3.0}}, 0.0) == {"t": "dedup"}
    with pytest.raises(ValueError, match="table 'bad'"):
        published_choice({"bad": {"dedup": 3.0}})
    with pytest.raises(ValueError, match="ratio of 0"):
        published_speed_up(0, "dedup")
    with pytest.raises(ValueError, match="'packed' has no published speed"):
        published_speed_up(2, "packed")
