"""Bounds as words, what is refused, and the published schedule."""

import math
from dataclasses import asdict

import pytest

from tightrec.compression.bounds import Bound
from tightrec.compression.policy.config import (
    BoundConfig,
    TableBound,
    check_budget,
    check_patterns,
    configured,
    format_bound,
    parse_bound,
)
from tightrec.compression.policy.schedules import schedule_multiplier
from tightrec.formats.settings import from_mapping


@pytest.mark.parametrize(
    ("word", "bound"),
    [
        ("range:0.03", Bound(value=0.03, of="range")),
        ("range:0.5", Bound(value=0.5, of="range")),
        ("rms:1.5", Bound(value=1.5, of="rms")),
        ("absolute:0.001", Bound(value=1e-3)),
        ("lossless", None),
    ],
)
def test_a_word_is_a_bound_and_the_bound_that_word(word, bound):
    assert parse_bound(word) == bound
    assert format_bound(bound) == word


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("0.03", "is no bound"),
        ("share:0.03", "is no bound"),
        ("range:much", "'much' is no number"),
        ("range:3", "at most 0.5 of the range"),
        ("range:nan", "must be from"),
        ("rms:0", "must be from"),
        ("absolute:-1", "must be from"),
        ("absolute:inf", "must be from"),
        ("lossless:1", "is no bound"),
    ],
)
def test_a_word_that_is_no_bound_is_refused_with_its_setting(word, told):
    with pytest.raises(ValueError, match=told) as error:
        BoundConfig(backward=word)
    assert str(error.value).startswith(f"codec.bound.backward={word}")
    with pytest.raises(ValueError, match=told) as error:
        BoundConfig(tables={"t_*": TableBound(forward=word)})
    assert str(error.value).startswith(f"codec.bound.tables.t_*.forward={word}")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"level": "row"}, "codec.bound.level=row is unknown"),
        ({"schedule": "cosine"}, "codec.bound.schedule=cosine is unknown"),
        ({"factor": 0.5}, "codec.bound.factor=0.5"),
        ({"factor": math.inf}, "codec.bound.factor=inf"),
        ({"steps": 0}, "codec.bound.steps=0"),
        ({"probe_every": 0}, "codec.bound.probe_every=0"),
        ({"sample_after": -1}, "codec.bound.sample_after=-1"),
        ({"rate": 1.0}, "codec.bound.rate=1.0"),
        ({"least_multiplier": 1.5}, "codec.bound.least_multiplier=1.5 must be above 0 and at most 1"),
        ({"backward_cap": 0.0}, "codec.bound.backward_cap=0.0 must be above 0."),
        ({"probe_memory": 2}, "codec.bound.probe_memory=2"),
        ({"ladder": ()}, "codec.bound.ladder="),
        ({"ladder": (0.0, 1.0)}, "codec.bound.ladder="),
        ({"loose_rows": 400_000}, "codec.bound.loose_rows=400000 must be below"),
        ({"tight_index": 1.5}, "codec.bound.tight_index=1.5"),
        ({"tightest": 0.0}, "codec.bound.tightest=0.0"),
        ({"tightest": 0.2}, "codec.bound.tightest=0.2 must be below"),
    ],
)
def test_a_setting_out_of_place_is_refused_by_name(settings, told):
    with pytest.raises(ValueError, match=r"codec\.bound") as error:
        BoundConfig(**settings)
    assert told in str(error.value)


def test_it_is_read_from_plain_mappings_as_hydra_gives_them():
    config = BoundConfig(tables={"t_*": TableBound(forward="rms:0.5")}, level="rows")
    assert from_mapping(BoundConfig, asdict(config), "codec.bound") == config
    with pytest.raises(ValueError, match=r"codec\.bound.*range:3"):
        from_mapping(BoundConfig, {"forward": "range:3"}, "codec.bound")


def test_the_last_pattern_that_names_a_direction_counts_for_it():
    config = BoundConfig(
        tables={
            "t_*": TableBound(forward="range:0.1", backward="lossless"),
            "t_user": TableBound(forward="lossless"),
            "*": TableBound(),
        }
    )
    names = ["t_user", "t_item", "genre"]
    assert [format_bound(b) for b in configured(config, "forward", names).values()] == [
        "lossless",
        "range:0.1",
        "range:0.03",
    ]
    assert [format_bound(b) for b in configured(config, "backward", names).values()] == [
        "lossless",
        "lossless",
        "range:0.01",
    ]


def test_a_pattern_must_match_a_table_and_is_told_where_it_is_not_exchanged():
    config = BoundConfig(tables={"small*": TableBound(forward="lossless")})
    with pytest.raises(ValueError, match=r"codec\.bound\.tables\.small\* matches no table.*: big"):
        check_patterns(config, ["big"], [])
    (told,) = check_patterns(config, ["big"], ["small_1"])
    assert "small*" in told and "not exchanged" in told
    assert check_patterns(config, ["big", "small_2"], ["small_1"]) == []


@pytest.mark.parametrize("budget", [0.0, -1e-4, math.nan, math.inf])
def test_a_budget_of_nothing_is_refused(budget):
    with pytest.raises(ValueError, match=r"codec\.budget_ne=.*above 0"):
        check_budget(BoundConfig(), budget)


def test_a_schedule_needs_a_budget_or_stands_against_it():
    with pytest.raises(ValueError, match=r"feedback.*not set"):
        check_budget(BoundConfig(schedule="feedback"), None)
    with pytest.raises(ValueError, match=r"codec\.bound\.schedule=sc24 loosens"):
        check_budget(BoundConfig(schedule="sc24"), 1e-4)
    check_budget(BoundConfig(schedule="sc24"), None)
    check_budget(BoundConfig(schedule="feedback"), 1e-4)


N = 65_536


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("step", 0, 2.0),
        ("step", 6553, 2.0),
        ("step", 6554, 1.9),
        ("step", N // 2, 1.5),
        ("step", N - 1, 1.1),
        ("linear", 0, 2.0),
        ("linear", N // 4, 1.75),
        ("linear", N - 1, 1 + 1 / N),
        ("log", 0, 2.0),
        ("log", N // 2, 2 - math.log(1 + (math.e - 1) / 2)),
        ("constant", 0, 1.0),
        ("feedback", 0, 1.0),
    ],
)
def test_the_schedules_are_the_published_ones(schedule, step, expected):
    # By hand from the formulas with c = 2: step 2 - floor(10t) / 10, linear 2 - t, log 2 - ln(1 + t (e - 1)).
    assert schedule_multiplier(schedule, step) == pytest.approx(expected, rel=1e-12)
    assert schedule_multiplier(schedule, N) == 1.0


def test_sc24_ignores_the_settings_and_the_others_do_not():
    assert schedule_multiplier("sc24", 0, factor=5.0, steps=10) == 2.0
    assert schedule_multiplier("sc24", N // 2, factor=5.0, steps=10) == pytest.approx(1.5)
    assert schedule_multiplier("linear", 5, factor=5.0, steps=10) == pytest.approx(5 * (1 - 0.5 * 0.8))
    assert schedule_multiplier("step", 10, factor=5.0, steps=10) == 1.0
