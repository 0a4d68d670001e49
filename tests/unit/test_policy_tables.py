"""Classes of tables, sensitivities from noisy measurements, and the allocation against brute force."""

import itertools
import math

import numpy as np
import pytest
import torch

from tightrec.compression.bounds import Bound
from tightrec.compression.codec import decode, encode
from tightrec.compression.layout import Layout
from tightrec.compression.policy.budget import Candidate, allocate, model_bits, predicted_dne
from tightrec.compression.policy.classes import (
    class_by_index,
    class_by_rows,
    count_distinct,
    homogenisation_index,
)
from tightrec.compression.policy.config import BoundConfig
from tightrec.compression.policy.sensitivity import Sensitivity, fit, mirrored, symmetric_dne

CONFIG = BoundConfig()


@pytest.mark.parametrize(
    ("rows", "name"),
    [(1, "loose"), (970, "loose"), (1_442, "base"), (313_829, "base"), (415_421, "tight"), (10**9, "tight")],
)
def test_row_counts_give_the_released_classes(rows, name):
    assert class_by_rows(rows, CONFIG) == name


@pytest.mark.parametrize(
    ("index", "name"), [(0.0, "loose"), (0.01, "loose"), (0.05, "base"), (0.1, "tight"), (0.9, "tight")]
)
def test_a_table_that_quantisation_makes_homogeneous_is_tight(index, name):
    assert class_by_index(index, CONFIG) == name


def test_the_index_is_the_share_of_rows_that_became_equal_to_another():
    # Range 10, so that a bound of 0.05 is 0.5 and codes are whole numbers.
    rows = torch.tensor([[0.0, 10.0], [0.1, 9.9], [-0.0, 10.0], [5.0, 5.0], [math.nan, 0.0], [3.0, 3.0]])
    assert count_distinct(rows, Bound(value=0.05, of="range")) == (4, 3)
    assert homogenisation_index(4, 3) == 0.25
    assert count_distinct(rows, Bound(value=0.001)) == (4, 4)


@pytest.mark.parametrize("kind", ["range", "rms", "absolute"])
def test_rows_are_counted_as_the_codec_makes_them_equal(kind):
    rows = (
        torch.randn(300, 4, generator=torch.Generator().manual_seed(3)) * torch.logspace(-2, 0, 300)[:, None]
    )
    bound = Bound(value=0.05, of=kind)
    layout = Layout.columns(rows=[300], dims=[4], tables=["t"])
    again = decode(encode(rows, layout, bound, "packed", backend="reference"), layout, backend="reference")
    before, after = count_distinct(rows, bound)
    assert before == 300
    assert after == len(torch.unique(again + 0.0, dim=0)) < 250


@pytest.mark.parametrize("rows", [torch.zeros(0, 4), torch.full((3, 4), math.nan), torch.zeros(5, 0)])
def test_no_rows_are_no_distinct_rows(rows):
    assert count_distinct(rows, Bound(value=0.03, of="range")) == (0, 0)


def test_equal_values_are_one_row():
    assert count_distinct(torch.ones(5, 3), Bound(value=0.03, of="range")) == (1, 1)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 4), (math.nan, 1)])
def test_an_impossible_sample_is_refused(before, after):
    with pytest.raises(ValueError, match="no sample"):
        homogenisation_index(before, after)


def noisy(slope: float, noise: float, count: int, seed: int, outliers: float = 0.0):
    generator = np.random.default_rng(seed)
    bounds = np.array([0.02, 0.05, 0.1])[np.arange(count) % 3]
    slopes = slope + generator.normal(0, noise, count) * np.where(generator.random(count) < outliers, 30, 1)
    return list(zip(bounds.tolist(), (slopes * bounds**2).tolist(), strict=True))


def test_a_mirrored_measurement_holds_no_first_order_term():
    generator = torch.Generator().manual_seed(5)
    exact, gradient = torch.rand(2, 50, 8, generator=generator, dtype=torch.float64)
    quantised = torch.round(exact / 0.2) * 0.2
    errors = quantised - exact

    def ne(values):
        return float((gradient * values).mean() + 3.0 * (values - exact).square().mean())

    found = symmetric_dne(ne(exact), ne(quantised), ne(mirrored(exact, quantised)))
    assert found == pytest.approx(3.0 * float(errors.square().mean()), rel=1e-9)
    assert torch.equal(
        (mirrored(exact, quantised) - exact).abs() <= 0.1 + 1e-9, torch.ones(50, 8, dtype=torch.bool)
    )
    assert ne(quantised) - ne(exact) != pytest.approx(found, rel=0.05)


def test_the_slope_is_exact_without_noise():
    found = fit(noisy(0.3, 0.0, 5, seed=0))
    assert (
        found.slope == pytest.approx(0.3) and found.error == pytest.approx(0, abs=1e-9) and found.count == 5
    )
    single = fit([(0.1, -2e-3)])
    assert single.slope == pytest.approx(-0.2) and single.error == pytest.approx(0.2)
    assert single.cautious == pytest.approx(0.2)
    assert fit([(0.1, 0.0)] * 3).cautious == 0
    # More than half equal and the rest not: the rest still says that the slope is not known exactly.
    assert fit([(0.1, 0.0)] * 3 + [(0.1, 1e-3)] * 2).error > 0.01


def test_the_standard_error_says_how_far_the_slope_is_off():
    fits = [fit(noisy(0.3, 0.1, 16, seed)) for seed in range(300)]
    off = np.array([(f.slope - 0.3) / f.error for f in fits])
    assert abs(off.mean()) < 0.15
    assert 0.8 < off.std() < 1.4
    assert np.mean([f.cautious > 0.3 for f in fits]) > 0.75


def test_outliers_hardly_move_the_slope():
    clean = [fit(noisy(0.3, 0.1, 16, seed)).slope for seed in range(200)]
    dirty = [noisy(0.3, 0.1, 16, seed, outliers=0.1) for seed in range(200)]
    assert np.std([fit(each).slope for each in dirty]) < 2 * np.std(clean)
    assert np.std([np.mean([y / b**2 for b, y in each]) for each in dirty]) > 4 * np.std(clean)


def test_noise_never_gives_a_negative_cost():
    found = fit([(0.1, -1e-3), (0.05, -3e-4), (0.02, -1e-4)])
    assert found.slope < 0
    assert found.cautious == found.error > 0


def test_a_table_keeps_its_last_finite_measurements():
    table = Sensitivity(memory=2)
    assert table.fit() is None and table.add(0.1, 1.0) and table.fit().slope == pytest.approx(100.0)
    assert [table.add(0.1, dne) for dne in (1.0, math.nan, 2.0, math.inf, 3.0)] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert (
        table.taken == 6
        and table.fit().slope == pytest.approx(250.0)
        and table.measurements == [(0.1, 2.0), (0.1, 3.0)]
    )
    with pytest.raises(ValueError, match="above 0"):
        table.add(0.0, 1.0)
    with pytest.raises(ValueError, match="at least one"):
        fit([])


def candidates(rows, low=0.001, high=0.1):
    return [
        Candidate(table=f"t{i}", sensitivity=s, values=v, low=low, high=high) for i, (s, v) in enumerate(rows)
    ]


def test_without_limits_the_budget_is_shared_like_the_values():
    tables = candidates([(0.5, 100.0), (0.01, 300.0), (2.0, 600.0)], low=1e-9, high=10.0)
    bounds = allocate(tables, 1e-3)
    spent = [t.sensitivity * bounds[t.table] ** 2 for t in tables]
    assert spent == pytest.approx([1e-4, 3e-4, 6e-4], rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_as_cheap_as_the_best_of_all_combinations(seed):
    generator = np.random.default_rng(seed)
    tables = candidates(
        zip(10 ** generator.uniform(-3, 1, 4), 10 ** generator.uniform(2, 5, 4), strict=True),
        low=0.01,
        high=0.1,
    )
    ends = [predicted_dne(tables, dict.fromkeys((t.table for t in tables), b)) for b in (0.01, 0.1)]
    budget = ends[0] * (ends[1] / ends[0]) ** generator.uniform(0.1, 0.9)
    bounds = allocate(tables, budget)
    assert predicted_dne(tables, bounds) == pytest.approx(budget, rel=1e-9)
    assert all(0.01 <= bound <= 0.1 for bound in bounds.values())
    ladder = np.geomspace(0.01, 0.1, 25)
    grid = np.array(list(itertools.product(range(25), repeat=4)))
    dne = sum(t.sensitivity * ladder[grid[:, i]] ** 2 for i, t in enumerate(tables))
    bits = sum(t.values * np.log2(1 / (2 * ladder[grid[:, i]])) for i, t in enumerate(tables))
    best = bits[dne <= budget].min()
    rung = math.log2(ladder[1] / ladder[0]) * sum(t.values for t in tables)
    assert best - rung <= model_bits(tables, bounds) <= best + 1e-6


def test_a_table_at_its_limit_leaves_the_rest_to_the_others():
    tables = [
        Candidate(table="free", sensitivity=0.0, values=1e6, low=0.001, high=0.1),
        Candidate(table="cheap", sensitivity=1e-4, values=500.0, low=0.001, high=0.1),
        Candidate(table="given", sensitivity=1.0, values=500.0, low=0.01, high=0.01),
        Candidate(table="dear", sensitivity=1.0, values=10.0, low=0.001, high=0.1),
    ]
    bounds = allocate(tables, 2e-4)
    assert bounds["free"] == bounds["cheap"] == 0.1 and bounds["given"] == 0.01
    assert bounds["dear"] == pytest.approx(math.sqrt(2e-4 - 1e-4 - 1e-6))


def test_too_small_a_budget_gives_the_tightest_and_a_large_one_the_loosest():
    tables = candidates([(1.0, 10.0), (2.0, 20.0)])
    assert set(allocate(tables, 1e-9).values()) == {0.001}
    assert set(allocate(tables, 1.0).values()) == {0.1}
    assert allocate([], 1.0) == {}
    assert allocate(candidates([(1.0, 5.0)]), 1e-4) == pytest.approx({"t0": 0.01})


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_no_budget_is_refused(budget):
    with pytest.raises(ValueError, match="cannot be allocated"):
        allocate(candidates([(1.0, 10.0)]), budget)


@pytest.mark.parametrize("row", [(-1.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)])
def test_a_table_that_makes_no_sense_is_refused(row):
    with pytest.raises(ValueError, match="'t0'"):
        candidates([row])
