"""The search for types: what it measures, what it finds, and how near that is to the best."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from planted_parts import plant

from tightrec.formats.columns import Columns
from tightrec.snapshot import search as searching
from tightrec.snapshot.calibrate import chosen_ranges, input_histograms
from tightrec.snapshot.config import PrecisionConfig
from tightrec.snapshot.parts import Parts, logits_of
from tightrec.snapshot.precision import LAYER_TYPES, TABLE_TYPES, Plan
from tightrec.snapshot.search import Found, search, sensitivity_json, smallest
from tightrec.snapshot.sensitivity import Bench, Cost, Loss, expected_loss
from tightrec.snapshot.verify import ne_loss

BATCH = 512


def ranges_of(
    parts: Parts, columns: Columns, layers: Sequence[str], method: str
) -> dict[str, tuple[float, float]]:
    histograms = input_histograms(parts.scorer(parts.exact), columns, BATCH)
    return chosen_ranges(histograms, method, layers)


def found_in(parts: Parts, columns: Columns, budget: float, **settings: Any) -> tuple[Found, list[str]]:
    config = PrecisionConfig(precision="auto", budget_ne=budget, batch_size=BATCH, **settings)
    histograms = input_histograms(parts.scorer(parts.exact), columns, BATCH)
    lines: list[str] = []
    return search(parts, columns, histograms, config, lines.append), lines


def measured(parts: Parts, columns: Columns, plan: Plan) -> tuple[float, float]:
    """NE loss and error of ``plan`` as one whole scorer has it, the way a snapshot is verified."""
    int8 = [name for name, kind in plan.layers.items() if kind == "int8"]
    ranges = ranges_of(parts, columns, int8, plan.ranges)
    exact, low = (
        logits_of(scorer, columns, BATCH)
        for scorer in (parts.scorer(parts.exact), parts.scorer(plan, ranges))
    )
    return ne_loss(exact, low, torch.from_numpy(columns.labels))


def cost(ne: float, error: float, expected: float) -> Cost:
    return Cost(
        part="table:a",
        kind="int8",
        ne_loss=ne,
        ne_loss_error=error,
        expected_loss=expected,
        bytes=1,
        float32_bytes=4,
    )


@pytest.mark.parametrize(("dense", "pooling"), [(0, "sum"), (3, "mean")])
def test_a_mixture_is_measured_as_the_whole_model_scores(dense: int, pooling: str) -> None:
    parts, columns = plant([0.5, 0.3, 0.4], dense=dense, multi_hot=True, pooling=pooling)
    bench = Bench(parts, columns, ranges_of(parts, columns, list(parts.layers), "min_max"), "greedy", BATCH)
    one = {**bench.exact, "table:t_0": "int2", "table:t_2": "int4", "layer:top.0": "int8"}
    other = {**bench.exact, "table:t_1": "int8", "table:t_2": "fp16", "layer:top.1": "bf16"}
    # The first one again after another one: what is kept of a mixture must not leak into the next.
    for types in (one, other, bench.exact, one):
        loss = bench.loss(types)
        plan = bench.plan(types, "min_max")
        assert (loss.ne_loss, loss.ne_loss_error) == measured(parts, columns, plan)
        assert (loss.expected_loss > 0) == (types != bench.exact)


def test_the_sensitive_table_keeps_more_bits() -> None:
    parts, columns = plant([0.05, 1.5, 0.05], rows=8000)
    found, _ = found_in(parts, columns, 0.003)
    bits = {
        name: int(kind.removeprefix("int").removeprefix("fp")) for name, kind in found.plan.tables.items()
    }
    assert bits["t_1"] > max(bits["t_0"], bits["t_2"])
    assert found.bytes < found.float32_bytes / 2
    assert searching.ranked(found)[0] == "table:t_1"


def test_without_a_budget_only_what_cannot_differ_gets_smaller() -> None:
    parts, columns = plant([0.5, 0.0, 0.5])
    found, _ = found_in(parts, columns, 0.0)
    # A row of zeros is a row of zeros in every type.
    assert found.plan.tables == {"t_0": "fp32", "t_1": "int2", "t_2": "fp32"}
    assert set(found.plan.layers.values()) == {"fp32"}
    assert measured(parts, columns, found.plan)[0] == 0


def test_a_large_budget_gives_the_smallest_types_at_once() -> None:
    parts, columns = plant([0.5, 0.1, 0.5])
    found, _ = found_in(parts, columns, 0.9)
    assert set(found.plan.tables.values()) == {"int2"}
    assert set(found.plan.layers.values()) == {"int8"}
    assert len(found.steps) == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [1e-5, 1e-4, 1e-3])
def test_the_plan_found_is_within_the_budget(seed: int, budget: float) -> None:
    parts, columns = plant([0.5, 0.2, 0.4, 0.1], dense=2, multi_hot=True, seed=seed)
    found, _ = found_in(parts, columns, budget)
    loss, error = measured(parts, columns, found.plan)
    assert (found.ne_loss, found.ne_loss_error) == (loss, error)
    assert loss + error <= budget
    # Nor does it stay at float32 out of caution.
    assert found.bytes < 0.7 * found.float32_bytes


def test_rows_that_were_not_searched_on_lose_no_more() -> None:
    parts, columns = plant([0.5, 0.3, 0.4], rows=40_000)
    seen, unseen = columns.slice(0, 10_000), columns.slice(10_000, 40_000)
    found, _ = found_in(parts, seen, 1e-4)
    assert len(found.steps) > 1 and found.bytes < 0.35 * found.float32_bytes
    loss, error = measured(parts, unseen, found.plan)
    assert error < 1e-4
    assert loss <= 1e-4


def test_the_same_inputs_give_the_same_result() -> None:
    parts, columns = plant([0.5, 0.5, 0.2])
    first, second = (found_in(parts, columns, 1e-5)[0] for _ in range(2))
    assert len(first.steps) > 5
    assert dataclasses.asdict(first) == dataclasses.asdict(second)


def test_of_types_of_equal_size_the_one_that_loses_less_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    # Both take 2 bytes a weight and stay within the budget; fp16 has 3 bits more, but comes second.
    halves = {"layer": ("bf16", "fp16"), "table": ()}
    monkeypatch.setattr(searching, "types_of", lambda part: halves[part.split(":")[0]])
    parts, columns = plant([0.3, 0.3])
    found, _ = found_in(parts, columns, 0.9)
    assert set(found.plan.layers.values()) == {"fp16"}


def test_the_proposal_is_the_best_of_all() -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        options = [
            [(100, 0.0), *((int(random.integers(1, 100)), float(random.integers(1, 50))) for _ in range(3))]
            for _ in range(5)
        ]
        # Of these the costs are whole units of the grid, so that rounding changes nothing.
        limit = float(random.choice([5, 20, 40, 80, 125]))
        within = [
            chosen
            for chosen in itertools.product(range(4), repeat=5)
            if sum(one[at][1] for one, at in zip(options, chosen, strict=True)) <= limit
        ]
        sizes = {
            chosen: sum(one[at][0] for one, at in zip(options, chosen, strict=True)) for chosen in within
        }
        assert sizes[tuple(smallest(options, limit))] == min(sizes.values())


def test_ties_go_to_the_lower_cost_then_to_the_first() -> None:
    assert smallest([[(8, 0.0), (4, 3.0), (4, 2.0)]], 5.0) == [2]
    assert smallest([[(8, 0.0), (4, 2.0), (4, 2.0)]], 5.0) == [1]
    assert smallest([[(8, 0.0), (4, 1.0)], [(8, 0.0), (4, 1.0)]], 0.0) == [0, 0]
    assert smallest([[(8, 0.0), (4, float("nan")), (6, float("inf"))]], 5.0) == [0]


def test_brute_force_finds_little_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 tables of 4 types each, all 64 mixtures are measured: the best one is found in 9 of 10 cases, and
    the worst find is at most 15 % larger than it."""
    kinds = ("int8", "int4", "int2")
    monkeypatch.setattr(searching, "types_of", lambda part: kinds if part.startswith("table:") else ())
    excess = []
    for seed in range(5):
        stds, counts = [1.2, 0.6, 0.9], [40, 90, 60]
        parts, columns = plant(stds, cardinalities=counts, seed=seed)
        bench = Bench(parts, columns, {}, "greedy", BATCH)
        mixtures = [
            {**bench.exact, **dict(zip(("table:t_0", "table:t_1", "table:t_2"), chosen, strict=True))}
            for chosen in itertools.product(("fp32", *kinds), repeat=3)
        ]
        sized = [(parts.bytes(types), bench.loss(types).bound) for types in mixtures]
        for budget in (2e-6, 1e-5, 3e-5, 1e-4, 3e-4):
            best = min(size for size, bound in sized if bound <= budget)
            found, _ = found_in(parts, columns, budget, ranges="dynamic")
            assert found.bytes >= best
            excess.append(found.bytes / best - 1)
    assert max(excess) <= 0.15
    assert sum(over == 0 for over in excess) > 0.9 * len(excess)


def test_a_lucky_loss_buys_nothing() -> None:
    # Below 0 by two standard errors: the expected loss counts.
    assert cost(-1e-4, 5e-5, 2e-5).charge == 2e-5
    # Below 0 by ten: a real gain, but none to spend elsewhere.
    assert cost(-1e-4, 1e-5, 2e-5).charge == 0
    # Above the expected loss by ten: labels know better.
    assert cost(3e-4, 1e-5, 2e-5).charge == pytest.approx(2.7e-4)
    assert np.isnan(cost(np.nan, np.nan, np.nan).charge)


def test_the_bound_asks_labels_and_probabilities() -> None:
    def bound(ne: float, error: float, expected: float) -> float:
        return Loss(ne_loss=ne, ne_loss_error=error, expected_loss=expected).bound

    assert bound(2.0, 1.0, 0.5) == 3.0
    # Labels that like the mixture by chance do not hide what it is expected to lose ...
    assert bound(-1.0, 1.0, 0.5) == 1.5
    # ... but they may with certainty.
    assert bound(-4.0, 1.0, 0.5) == -1.0


def test_the_expected_loss_is_the_mean_over_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(2000, generator=generator)
    other = exact + 0.2 * torch.randn(2000, generator=generator)
    draws = [torch.bernoulli(exact.sigmoid(), generator=generator) for _ in range(300)]
    losses = torch.tensor([ne_loss(exact, other, labels)[0] for labels in draws])
    expected = expected_loss(exact, other, draws[0])
    assert float(losses.mean()) == pytest.approx(expected, rel=0.1)
    assert float(losses.std()) > expected / 4
    assert expected_loss(exact, exact, draws[0]) == 0


def test_it_says_what_it_did() -> None:
    parts, columns = plant([0.5, 0.2])
    found, lines = found_in(parts, columns, 1e-4)
    assert lines[0] == "measuring 2 tables and 2 layers alone at every type, on 2,000 rows"
    assert lines[1].startswith(f"found {found.bytes / found.float32_bytes:.1%} of float32's size, NE loss ")
    assert "(budget 0.0100%)" in lines[1]
    smaller = [step for step in found.steps if step.bytes < found.bytes and step.ne_loss <= 1e-4]
    assert smaller and lines[2].startswith(f"{len(smaller)} smaller mixtures stayed within the budget")


def test_a_type_that_cannot_hold_a_table_is_left_out() -> None:
    parts, columns = plant([0.2, 0.2])
    parts.tables["t_1"][3, 2] = 1e5
    found, lines = found_in(parts, columns, 0.9)
    assert any(line.startswith("table:t_1 cannot be fp16: ") for line in lines)
    assert ("table:t_1", "fp16") not in {(cost.part, cost.kind) for cost in found.costs}
    assert ("table:t_0", "fp16") in {(cost.part, cost.kind) for cost in found.costs}


def test_many_rows_measure_parts_on_some_and_mixtures_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "COST_ROWS", 500)
    parts, columns = plant([0.5, 0.2])
    found, lines = found_in(parts, columns, 1e-4, ranges="min_max")
    assert lines[0].endswith("on 500 rows")
    assert found.rows == 2000
    few = columns.take(np.linspace(0, 1999, 500).astype(np.int64))
    bench = Bench(parts, few, ranges_of(parts, columns, list(parts.layers), "min_max"), "greedy", BATCH)
    assert found.costs[0] == bench.cost("table:t_0", "fp16")
    assert (found.ne_loss, found.ne_loss_error) == measured(parts, columns, found.plan)


@pytest.mark.parametrize("label", [0, 1])
def test_rows_of_one_label_are_refused(label: int) -> None:
    parts, columns = plant([0.5])
    one = columns.take(np.flatnonzero(columns.labels == label))
    with pytest.raises(ValueError, match="NE needs both labels"):
        found_in(parts, one, 0.001)


def test_a_broken_float32_model_is_refused() -> None:
    parts, columns = plant([0.5])
    parts.extras["constant"][0] = torch.nan
    bench = (parts, columns, {}, "greedy", BATCH)
    with pytest.raises(ValueError, match="no finite number"):
        Bench(*bench)


def test_the_table_of_costs_is_whole_and_plain_json() -> None:
    parts, columns = plant([0.5, 0.2])
    found, _ = found_in(parts, columns, 1e-4, row_search="min_max", ranges="kl")
    plain = json.loads(json.dumps(sensitivity_json(found)))
    assert [(one["part"], one["kind"]) for one in plain["costs"]] == [
        *((f"table:t_{i}", kind) for i in range(2) for kind in TABLE_TYPES if kind != "fp32"),
        *((f"layer:top.{i}", kind) for i in range(2) for kind in LAYER_TYPES if kind != "fp32"),
    ]
    assert plain["costs"][2]["bytes"] == 40 * (4 + 4) and plain["costs"][2]["float32_bytes"] == 40 * 32
    assert plain["found"]["plan"]["row_search"] == "min_max"
    assert plain["found"]["plan"]["ranges"] == "kl"
    assert sorted(plain["ranking"]) == ["layer:top.0", "layer:top.1", "table:t_0", "table:t_1"]
    assert sum(step["kept"] for step in plain["steps"]) >= 1
    assert plain["steps"][-1].keys() >= {"what", "bytes", "ne_loss", "ne_loss_error", "expected_loss"}
