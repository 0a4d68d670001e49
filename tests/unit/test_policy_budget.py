"""Bounds that follow from probes: plans, allocation, feedback, the backward rule, and the checkpoint."""

import json
import math

import numpy as np
import pytest

from tightrec.compression.policy.config import BoundConfig, TableBound
from tightrec.compression.policy.feedback import Feedback
from tightrec.compression.policy.policy import BoundPolicy, TableFacts

TRUE = {"a": 0.02, "b": 0.3, "c": 2.0, "d": 0.005}
"""dNE / b^2 of each table."""
VALUES = {"a": 4e4, "b": 2e4, "c": 1e4, "d": 3e4}
FACTS = [TableFacts(name=name, rows=1000, dim=16) for name in TRUE]
BUDGET = 2e-4


class World:
    """A job in which errors cost what the model says, or more above the bound ``bend``.

    ``noise`` is the standard deviation of a measurement as a share of it; one in twenty is ten times off.
    """

    def __init__(self, policy: BoundPolicy, noise=0.0, seed=0, true=TRUE, bend=math.inf) -> None:
        self.policy, self.noise, self.true = policy, noise, dict(true)
        self.random = np.random.default_rng(seed)
        self.step, self.bend = 0, bend

    def cost(self, table: str, bound: float) -> float:
        return self.true[table] * bound**2 * (1 + (bound / self.bend) ** 2)

    def total(self) -> float:
        return sum(self.cost(t, self.policy.bound("forward", t).value) for t in self.true)

    def seen(self, dne: float) -> float:
        odd = 10.0 if self.random.random() < 0.05 else 1.0
        return dne * (1 + odd * self.noise * self.random.normal())

    def forward(self) -> dict[str, float]:
        return {t: self.policy.bound("forward", t).value for t in self.true}

    def backward(self) -> dict[str, float]:
        return {t: self.policy.bound("backward", t).value for t in self.true}

    def probe(self, probes: int = 1) -> "World":
        for _ in range(probes):
            self.step += 200
            self.policy.set_step(self.step)
            assert self.policy.probe_due(self.step)
            measured = [(t, b, self.seen(self.cost(t, b))) for t, b in self.policy.probe_plan()]
            total = self.seen(self.total())
            self.policy.observe_probe(self.step, measured, total, VALUES)
        return self


@pytest.mark.parametrize(
    ("settings", "budget", "due"),
    [
        ({}, None, False),
        ({"level": "rows", "schedule": "sc24"}, None, False),
        ({"level": "sensitivity"}, None, True),
        ({"schedule": "feedback", "level": "rows"}, BUDGET, True),
        ({}, BUDGET, True),
    ],
)
def test_probes_are_due_where_something_follows_from_them(settings, budget, due):
    policy = BoundPolicy(BoundConfig(probe_every=50, **settings), FACTS, budget)
    assert [step for step in range(120) if policy.probe_due(step)] == ([50, 100] if due else [])


def test_a_plan_is_bounded_and_goes_round_all_tables_and_rungs():
    config = BoundConfig(probe_tables=5)
    policy = BoundPolicy(config, FACTS, BUDGET)
    seen = []
    for step in range(12):
        plan = policy.probe_plan()
        assert len(plan) == len(set(plan)) == 5 and plan == policy.probe_plan()
        seen += plan
        # A measurement that is no number counts as taken, or it would be asked for again and again.
        policy.observe_probe(step, [(t, b, math.nan) for t, b in plan], 1e-4, VALUES)
    assert {pair: seen.count(pair) for pair in seen} == {
        (t, 0.03 * m): 5 for t in TRUE for m in config.ladder
    }
    one = BoundPolicy(config, FACTS[:1], BUDGET)
    assert sorted(one.probe_plan()) == [("a", 0.015), ("a", 0.03), ("a", 0.06)]


def test_bounds_are_as_configured_until_every_table_is_measured():
    policy = BoundPolicy(BoundConfig(probe_tables=3), FACTS, 1e9)
    version = policy.version
    world = World(policy).probe(3)
    assert world.forward() == dict.fromkeys(TRUE, 0.03) and policy.version == version
    assert "1 of 4 tables are measured" in policy.messages()[-1]
    world.probe()
    assert world.forward() == pytest.approx(dict.fromkeys(TRUE, 0.03 * 1.25)) and policy.version != version


def test_without_noise_the_budget_is_met_and_shared_like_the_values():
    world = World(BoundPolicy(BoundConfig(), FACTS, BUDGET)).probe(30)
    assert world.total() == pytest.approx(BUDGET, rel=0.01)
    spent = {t: s * world.forward()[t] ** 2 for t, s in TRUE.items()}
    # d is at its loosest; the others share what it leaves.
    assert world.forward()["d"] == pytest.approx(0.1)
    left = BUDGET - spent["d"]
    assert [spent[t] / left for t in "abc"] == pytest.approx([4 / 7, 2 / 7, 1 / 7], rel=0.02)
    report = world.policy.report()
    assert report["kind"] == "probe" and report["budget"] == BUDGET and report["step"] == world.step
    assert report["total_dne"] == pytest.approx(BUDGET, rel=0.01)
    assert report["tables"]["c"]["dne"] == pytest.approx(spent["c"], rel=0.01)
    assert report["tables"]["c"]["bound"] == world.policy.word("forward", "c")


def test_with_noise_and_a_change_of_the_model_the_budget_still_holds():
    ends, after = [], []
    for seed in range(10):
        world = World(BoundPolicy(BoundConfig(), FACTS, BUDGET), noise=0.3, seed=seed, bend=0.03).probe(40)
        ends.append(world.total() / BUDGET)
        world.true = {t: 8 * s for t, s in TRUE.items()}
        world.probe(30)
        after.append(world.total() / BUDGET)
    for found in (ends, after):
        assert 0.7 < np.median(found) < 1.15, found
        assert 0.5 < min(found) <= max(found) < 1.9, found


def test_no_probe_moves_a_bound_faster_than_the_rate():
    config = BoundConfig(rate=1.25)
    world = World(BoundPolicy(config, FACTS, BUDGET), noise=1.0).probe(4)
    for _ in range(40):
        before, multiplier = world.forward(), world.policy.multiplier
        world.probe()
        # Multiplier and allocation each move by the rate.
        for table, bound in world.forward().items():
            assert before[table] / 1.25**4 * 0.999 <= bound <= before[table] * 1.25**2 * 1.001
        assert multiplier / 1.25**2 * 0.999 <= world.policy.multiplier <= multiplier * 1.25 * 1.001


def test_feedback_alone_scales_what_the_level_gives():
    facts = [TableFacts(name="a", rows=10, dim=4), TableFacts(name="c", rows=10**6, dim=4)]
    policy = BoundPolicy(BoundConfig(schedule="feedback", level="rows"), facts, BUDGET)
    true = {"a": 0.02, "c": 2.0}
    assert policy.probe_plan() == []
    world = World(policy, true=true).probe(20)
    assert world.total() == pytest.approx(BUDGET, rel=0.01)
    assert policy.bound("forward", "a").value == pytest.approx(5 * policy.bound("forward", "c").value)
    assert policy.multiplier == pytest.approx(policy.bound("forward", "c").value / 0.01)


def test_a_table_that_the_user_names_keeps_its_bound_and_its_cost_is_taken_off_the_budget():
    tables = {
        "a": TableBound(forward="range:0.0005"),
        "c": TableBound(forward="range:0.005"),
        "d": TableBound(forward="absolute:0.1"),
    }
    world = World(BoundPolicy(BoundConfig(tables=tables), FACTS, BUDGET)).probe(2)
    assert {t for t, _ in world.policy.probe_plan()} == {"a", "b", "c"}
    world.probe(20)
    # The cost of c, 5e-5, is taken off, and a leaves its share to b; that of d is seen in the total alone.
    multiplier = world.policy.multiplier
    assert multiplier == pytest.approx(math.sqrt(BUDGET / (BUDGET + 5e-5)), rel=0.01)
    assert [world.policy.word("forward", t) for t in "acd"] == [
        f"range:{0.0005 * multiplier:.6g}",
        f"range:{0.005 * multiplier:.6g}",
        f"absolute:{0.1 * multiplier:.6g}",
    ]
    assert world.total() == pytest.approx(BUDGET, rel=0.02)
    later = BoundPolicy(BoundConfig(tables={"b": TableBound(forward="range:0.004")}), FACTS, BUDGET)
    later.load_state_dict(world.policy.state_dict())
    assert later.word("forward", "b") == f"range:{0.004 * multiplier:.6g}"
    named = {"*": TableBound(forward="range:0.02")}
    (told,) = BoundPolicy(BoundConfig(tables=named), FACTS, BUDGET).messages()
    assert "no table's forward bound follows" in told


def test_backward_follows_the_forward_bounds_down_but_not_up():
    tight = World(BoundPolicy(BoundConfig(), FACTS, 1e-6)).probe(30)
    forward = tight.forward()
    weights = sum(VALUES.values())
    mean = math.exp(sum(VALUES[t] * math.log(b / 0.03) for t, b in forward.items()) / weights)
    assert mean < 0.5
    assert tight.backward() == pytest.approx(dict.fromkeys(TRUE, 0.01 * mean))
    loose = World(BoundPolicy(BoundConfig(), FACTS, 1.0)).probe(30)
    assert set(loose.forward().values()) == {0.1}
    assert loose.backward() == pytest.approx(dict.fromkeys(TRUE, 0.01))
    capped = World(BoundPolicy(BoundConfig(backward_cap=1.5), FACTS, 1.0)).probe(30)
    assert capped.backward() == pytest.approx(dict.fromkeys(TRUE, 0.015))


def test_sensitivity_without_a_budget_costs_what_the_configured_bounds_do_in_fewer_bits():
    policy = BoundPolicy(BoundConfig(level="sensitivity"), FACTS)
    world = World(policy)
    configured = world.total()
    world.probe(20)
    assert world.total() == pytest.approx(configured, rel=0.01)
    assert sum(VALUES[t] * math.log2(b / 0.03) for t, b in world.forward().items()) > 0.5 * sum(
        VALUES.values()
    )
    assert policy.multiplier == 1.0 and world.backward() == dict.fromkeys(TRUE, 0.01)


def test_what_is_no_number_is_passed_over_and_told():
    policy = BoundPolicy(BoundConfig(), FACTS, BUDGET)
    world = World(policy).probe(20)
    policy.messages()
    before = world.forward()
    measured = [("a", 0.1, math.nan), ("b", 0.05, math.inf)]
    policy.observe_probe(4200, measured, math.nan, {"a": 0.0, "b": math.nan, "elsewhere": 5.0})
    told = policy.messages()
    assert sum("passed over" in line for line in told) == 3 and all(
        line.startswith("step 4200: ") for line in told
    )
    assert world.forward() == pytest.approx(before, rel=0.05) and policy.report()["total_dne"] is None
    json.dumps(policy.state_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="'elsewhere'"):
        policy.observe_probe(1600, [("elsewhere", 0.1, 1e-4)], 1e-4, {})


def test_a_table_that_cannot_be_measured_does_not_hold_up_the_others():
    policy = BoundPolicy(BoundConfig(), FACTS, BUDGET)
    for step in range(200, 200 * 20, 200):
        measured = [(t, b, math.nan if t == "b" else TRUE[t] * b * b) for t, b in policy.probe_plan()]
        policy.observe_probe(step, measured, BUDGET, VALUES)
    assert policy.bound("forward", "b").value == pytest.approx(0.03 * policy.multiplier)
    assert policy.bound("forward", "d").value == pytest.approx(0.1)
    assert any("['b']" in line for line in policy.messages())


def test_the_feedback_does_not_run_ahead_of_bounds_that_cannot_follow():
    world = World(BoundPolicy(BoundConfig(), FACTS, 1.0)).probe(60)
    assert set(world.forward().values()) == {0.1}
    assert world.policy.multiplier == pytest.approx(1.0, abs=0.05)
    assert any("at their loosest" in line for line in world.policy.messages())
    world = World(BoundPolicy(BoundConfig(), FACTS, 1e-9)).probe(60)
    assert set(world.forward().values()) == {0.001}
    assert world.policy.multiplier > 0.2
    told = world.policy.messages()
    assert any("at its tightest" in line for line in told)
    assert any("the tightest bounds that may be given" in line for line in told)


def test_the_feedback_stays_within_its_limits_and_says_why_it_moves():
    feedback = Feedback(BoundConfig(probe_needed=2), 1e-4)
    told = [feedback.observe(1.0 * feedback.multiplier**2, feedback.multiplier) for _ in range(7)]
    assert feedback.multiplier == 0.125
    assert "1 of 2 probes" in told[0]
    assert "is above codec.budget_ne=0.0001: multiplier 1 -> 0.64" in told[1]
    assert "at its limit" in told[-1]
    for _ in range(40):
        feedback.observe(-1e-6, feedback.multiplier)
    assert feedback.multiplier == 4.0
    noise = Feedback(BoundConfig(probe_needed=2), 1e-4)
    for total in (3e-4, -2e-4, 3e-4, -2e-4):
        last = noise.observe(total, 1.0)
    assert noise.multiplier <= 1.0 and "+-" in last


def test_a_checkpoint_goes_on_as_if_nothing_had_happened():
    config = BoundConfig()
    world = World(BoundPolicy(config, FACTS, BUDGET), noise=0.4).probe(11)
    resumed = BoundPolicy(config, FACTS, BUDGET)
    resumed.load_state_dict(json.loads(json.dumps(world.policy.state_dict())))
    assert resumed.report() == world.policy.report() and resumed.state_dict() == world.policy.state_dict()
    other = World(resumed, noise=0.4)
    other.step, other.random = world.step, np.random.default_rng(7)
    world.random = np.random.default_rng(7)
    world.probe(10)
    other.probe(10)
    assert other.policy.state_dict() == world.policy.state_dict()
    assert other.forward() == world.forward() and other.backward() == world.backward()


def test_tables_that_come_and_go_are_told_and_the_others_keep_what_they_know():
    world = World(BoundPolicy(BoundConfig(), FACTS, BUDGET)).probe(6)
    state = world.policy.state_dict()
    facts = [TableFacts(name="new", rows=10, dim=8), *FACTS[1:]]
    resumed = BoundPolicy(BoundConfig(), facts, BUDGET)
    resumed.load_state_dict(state)
    assert [line.split(":")[0] for line in resumed.messages()] == [
        "table a of the checkpoint is not exchanged here",
        "table new is not in the checkpoint",
    ]
    assert resumed.word("forward", "b") == world.policy.word("forward", "b")
    assert resumed.word("forward", "new") == f"range:{0.03 * resumed.multiplier:.6g}"
    assert resumed.probe_plan()[0][0] == "new"


def test_another_budget_is_followed_and_another_format_refused():
    state = World(BoundPolicy(BoundConfig(), FACTS, BUDGET)).probe(6).policy.state_dict()
    resumed = BoundPolicy(BoundConfig(), FACTS, BUDGET / 4)
    resumed.load_state_dict(state)
    assert resumed.messages() == ["codec.budget_ne was 0.0002, is 5e-05"]
    assert World(resumed).probe(4).total() == pytest.approx(BUDGET / 4, rel=0.1)
    plain = BoundPolicy(BoundConfig(), FACTS)
    plain.load_state_dict(state)
    assert plain.word("forward", "c") == "range:0.03" and plain.multiplier == 1.0
    # Totals of a job that allocates nothing were compared with its multiplier, not with predictions.
    scaling = (
        World(BoundPolicy(BoundConfig(schedule="feedback", level="rows"), FACTS, BUDGET)).probe(4).policy
    )
    resumed = BoundPolicy(BoundConfig(), FACTS, BUDGET)
    resumed.load_state_dict(scaling.state_dict())
    assert resumed.state_dict()["feedback"] == {"multiplier": scaling.multiplier, "totals": []}
    assert scaling.multiplier < 1
    with pytest.raises(ValueError, match="format 2"):
        plain.load_state_dict(state | {"format": 2})
