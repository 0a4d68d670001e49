"""The bounds that a job is given: levels, schedule, homogenisation, the cache that each step asks."""

import json

import pytest
import torch

from tightrec.compression.bounds import Bound
from tightrec.compression.codec import encode
from tightrec.compression.layout import Layout
from tightrec.compression.policy.config import BoundConfig, TableBound
from tightrec.compression.policy.policy import BoundPolicy, TableFacts

FACTS = [
    TableFacts(name="small", rows=100, dim=16),
    TableFacts(name="middle", rows=50_000, dim=16),
    TableFacts(name="large", rows=1_000_000, dim=16),
]
NAMES = [table.name for table in FACTS]


def words(policy: BoundPolicy, direction="forward") -> list[str]:
    return [policy.word(direction, name) for name in NAMES]


def test_by_default_all_tables_have_the_two_configured_bounds_at_every_step():
    policy = BoundPolicy(BoundConfig(), FACTS)
    version = policy.version
    for step in (0, 1, 70_000):
        policy.set_step(step)
        assert words(policy) == ["range:0.03"] * 3 and words(policy, "backward") == ["range:0.01"] * 3
        assert policy.multiplier == 1.0 and not policy.probe_due(step) and not policy.sample_due(step)
    assert policy.version == version and policy.messages() == []


def test_an_exchange_is_given_the_same_object_until_a_bound_changes():
    config = BoundConfig(schedule="step", factor=2.0, steps=100, backward="lossless")
    policy = BoundPolicy(config, FACTS)

    def ask(direction="forward", share=1.0):
        return policy.bounds(direction, ["large", "large"], ["l#0", "l#1"], share)

    first, version = ask(), policy.version
    for step in range(10):
        policy.set_step(step)
        assert ask() is first and policy.version == version
    other, halved = ask("backward"), ask(share=0.5)
    policy.set_step(10)
    assert policy.version != version
    assert ask() is not first and ask().bounds[0].value == pytest.approx(0.03 * 1.9)
    assert ask(share=0.5) is not halved and ask(share=0.5).bounds[1].value == pytest.approx(0.03 * 0.95)
    assert ask("backward") is other
    assert ask().tables == ("l#0", "l#1") and first.bounds == (Bound(value=0.06, of="range"),) * 2


def test_lossless_tables_are_told_and_hold_a_bound_that_the_codec_takes():
    config = BoundConfig(tables={"middle": TableBound(forward="lossless")}, schedule="sc24", level="rows")
    policy = BoundPolicy(config, FACTS)
    assert policy.lossless("forward", ["large", "middle", "middle"]) == [False, True, True]
    assert policy.lossless("backward", NAMES) == [False] * 3
    assert policy.bound("forward", "middle") is None and policy.word("forward", "middle") == "lossless"
    bounds = policy.bounds("forward", NAMES, NAMES, share=0.25)
    layout = Layout.columns(rows=[2], dims=[4, 4, 4], tables=NAMES)
    encode(
        torch.rand(2, 12),
        layout,
        bounds,
        {"small": "auto", "middle": "raw", "large": "auto"},
        backend="reference",
    )


def test_an_unknown_table_is_refused_by_name():
    policy = BoundPolicy(BoundConfig(), FACTS)
    with pytest.raises(ValueError, match="'missing'"):
        policy.bounds("forward", ["missing"], ["m"])
    with pytest.raises(ValueError, match="'missing'"):
        policy.observe_rows("missing", torch.zeros(1, 1))
    with pytest.raises(ValueError, match="a name comes twice"):
        BoundPolicy(BoundConfig(), [FACTS[0], FACTS[0]])
    with pytest.raises(ValueError, match="matches no table"):
        BoundPolicy(BoundConfig(tables={"missing": TableBound()}), FACTS)


def test_a_schedule_multiplies_every_kind_of_bound_both_ways_but_no_lossless_one():
    tables = {
        "small": TableBound(forward="absolute:0.001", backward="rms:0.5"),
        "middle": TableBound(forward="lossless", backward="lossless"),
        "large": TableBound(forward="range:0.4"),
    }
    policy = BoundPolicy(BoundConfig(schedule="linear", factor=2.0, steps=100, tables=tables), FACTS)
    policy.set_step(50)
    assert policy.multiplier == 1.5
    # The range stops at one half.
    assert words(policy) == ["absolute:0.0015", "lossless", "range:0.5"]
    assert words(policy, "backward") == ["rms:0.75", "lossless", "range:0.015"]
    policy.set_step(100)
    assert words(policy) == ["absolute:0.001", "lossless", "range:0.4"]


def test_row_classes_scale_the_forward_bound_that_a_table_is_configured_with():
    policy = BoundPolicy(
        BoundConfig(level="rows", tables={"large": TableBound(forward="absolute:0.3")}), FACTS
    )
    assert words(policy) == ["range:0.05", "range:0.03", "absolute:0.1"]
    assert words(policy, "backward") == ["range:0.01"] * 3


def test_homogenisation_is_agreed_over_ranks_and_then_kept():
    config = BoundConfig(level="homogenisation", sample_after=5, sample_batches=2)
    ranks = [BoundPolicy(config, FACTS) for _ in range(2)]
    apart = torch.eye(40)
    together = torch.cat([torch.arange(40)[:, None] * 1e-4 + torch.zeros(40, 3), torch.ones(1, 3)])
    due, done = [], []
    for step in range(12):
        for rank in ranks:
            rank.set_step(step)
        due += [step] if ranks[0].sample_due(step) else []
        if ranks[0].sample_due(step):
            ranks[0].observe_rows("small", apart)
            ranks[1].observe_rows("large", together)
            ranks[1].observe_rows("middle", torch.zeros(0, 3))
        done += [step] if ranks[0].homogenisation_due(step) else []
        if ranks[0].homogenisation_due(step):
            counts = [rank.homogenisation_counts() for rank in ranks]
            summed = [sum(pair) for pair in zip(*counts, strict=True)]
            assert summed == [80, 80, 0, 0, 82, 4]
            assert words(ranks[0]) == ["range:0.03"] * 3
            for rank in ranks:
                rank.set_homogenisation(summed)
    assert due == [5, 6] and done == [7]
    for rank in ranks:
        assert words(rank) == ["range:0.05", "range:0.03", "range:0.01"]
    told = ranks[0].messages()
    assert told[0].startswith("table small is loose: homogenisation index 0.000 of 80")
    assert told[1].startswith("table middle is base: no rows") and told[2].startswith("table large is tight")
    with pytest.raises(ValueError, match="two numbers a table"):
        ranks[0].set_homogenisation([1, 1])

    resumed = BoundPolicy(config, FACTS[::-1])
    resumed.load_state_dict(json.loads(json.dumps(ranks[0].state_dict())))
    resumed.set_step(12)
    assert words(resumed) == words(ranks[0])
    assert not resumed.sample_due(12) and not resumed.homogenisation_due(12)


def test_a_job_resumed_before_it_was_classed_samples_from_there():
    config = BoundConfig(level="homogenisation", sample_after=0, sample_batches=2)
    started = BoundPolicy(config, FACTS)
    started.set_step(0)
    started.set_step(1)
    resumed = BoundPolicy(config, FACTS)
    resumed.set_step(0)
    resumed.load_state_dict(started.state_dict())
    resumed.set_step(90)
    assert resumed.sample_due(90) and resumed.sample_due(91) and not resumed.sample_due(92)
    assert resumed.homogenisation_due(92)


def test_all_lossless_neither_samples_nor_probes():
    for level, budget in (("homogenisation", None), ("sensitivity", None), ("fixed", 1e-4)):
        config = BoundConfig(forward="lossless", backward="lossless", level=level, sample_after=0)
        policy = BoundPolicy(config, FACTS, budget)
        policy.set_step(200)
        assert not policy.sample_due(200) and not policy.probe_due(200) and policy.probe_plan() == []
        assert policy.lossless("forward", NAMES) == [True] * 3
        assert len(policy.bounds("backward", NAMES, NAMES).bounds) == 3
        assert not BoundPolicy(BoundConfig(level=level), [], budget).probe_due(200)
