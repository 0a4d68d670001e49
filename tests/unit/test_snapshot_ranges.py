"""Histograms of activations, and that a range is the best by its own criterion."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tightrec.snapshot import ranges
from tightrec.snapshot.ranges import BINS, METHODS, SHARE, Histogram, affine, divergence


def counted(*batches: Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


def squared_error(centres: np.ndarray, counts: np.ndarray, low: float, high: float, bits: int) -> float:
    """Expected: a value inside is off by a uniform error of half a step at most, one outside is clipped."""
    step = (high - low) / (2**bits - 1)
    inside = (centres >= low) & (centres <= high)
    clipped = centres - np.clip(centres, low, high)
    return float((counts * np.where(inside, step**2 / 12, clipped**2)).sum())


def normal(seed: int, count: int = 20_000, scale: float = 1.0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale


batches = st.lists(
    st.lists(st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, 1e-30, -3e37]), max_size=30), max_size=6
)


@given(batches=batches)
@settings(max_examples=200, deadline=None)
def test_batches_count_like_their_whole(batches: list[list[float]]) -> None:
    """In any split and order the same bins: growing merges whole bins and loses nothing."""
    parts = [torch.tensor(batch) for batch in batches]
    whole, split, reverse = (
        counted(torch.cat([torch.zeros(0), *parts])),
        counted(*parts),
        counted(*parts[::-1]),
    )
    for other in (split, reverse):
        assert (other.low, other.high, other.zeros, other.total) == (
            whole.low,
            whole.high,
            whole.zeros,
            whole.total,
        )
        for mine, theirs in zip(whole.bins(), other.bins(), strict=True):
            assert np.array_equal(mine, theirs)
    assert int(whole.bins()[1].sum()) == whole.total - whole.zeros


@given(batches=batches)
@settings(max_examples=100, deadline=None)
def test_every_value_is_in_its_bin(batches: list[list[float]]) -> None:
    values = np.array([v for batch in batches for v in batch], dtype=np.float32).astype(np.float64)
    histogram = counted(*(torch.tensor(batch) for batch in batches))
    edges, counts = histogram.bins()
    assert len(counts) <= BINS
    for edge, count in list(zip(edges, counts, strict=True))[:: max(len(edges) // 40, 1)]:
        inside = (values >= edge) & (values < edge + histogram.width) & (values != 0)
        assert int(inside.sum()) == count


def test_a_tiny_first_batch_costs_no_resolution() -> None:
    histogram = counted(torch.tensor([1e-20]), torch.tensor([-3.0, 5.0]), normal(1))
    assert BINS // 2 <= len(histogram.bins()[1]) <= BINS
    assert histogram.width <= 8 / (BINS // 2)


@pytest.mark.parametrize("value", [3.0, -3.0])
@pytest.mark.parametrize("method", METHODS)
def test_a_constant_is_its_range(method: str, value: float) -> None:
    low, high = counted(torch.full((100,), value)).range(method, 8)
    assert (low, high) == (min(value, 0.0), max(value, 0.0))


@pytest.mark.parametrize("method", METHODS)
def test_zeros_alone_have_an_empty_range(method: str) -> None:
    assert counted(torch.zeros(10)).range(method, 8) == (0.0, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_a_spike_of_zeros_moves_nothing(method: str) -> None:
    values = normal(2).abs()
    spiked = counted(values, torch.zeros(500_000))
    assert spiked.range(method, 8) == counted(values).range(method, 8)
    assert spiked.zeros == 500_000


@pytest.mark.parametrize("method", METHODS)
@given(batches=batches)
@settings(max_examples=15, deadline=None)
def test_ranges_lie_within_what_was_seen_and_hold_zero(method: str, batches: list[list[float]]) -> None:
    histogram = counted(*(torch.tensor(batch) for batch in batches), torch.ones(1))
    low, high = histogram.range(method, 8)
    assert histogram.low <= low <= 0 <= high <= histogram.high


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["normal", "relu", "outlier", "skewed"])
def test_l2_has_the_least_squared_error_of_all_candidates(kind: str, bits: int) -> None:
    values = {
        "normal": normal(3),
        "relu": normal(4).relu(),
        "outlier": torch.cat([normal(5), torch.tensor([90.0])]),
        "skewed": torch.cat([normal(6).abs() * 5, -normal(7).abs()]),
    }[kind]
    histogram = counted(values)
    edges, counts = histogram.bins()
    centres = edges + histogram.width / 2
    chosen = squared_error(centres, counts, *histogram.range("l2", bits), bits)
    pairs = histogram.candidates("l2", bits)
    costs = [squared_error(centres, counts, *pair, bits) for pair in pairs]
    assert len(pairs) > ranges.SHRINKS
    assert chosen <= min(costs) * (1 + 1e-9)
    assert min(costs) < max(costs)


def test_the_criterion_of_l2_is_the_squared_error() -> None:
    """Against quantising the values themselves, wide and clipped."""
    values = normal(8, 200_000)
    histogram = counted(values)
    edges, counts = histogram.bins()
    for low, high in ((-5.0, 5.0), (-2.0, 3.0), (-0.5, 0.5)):
        scale, zero_point = affine(low, high, 8)
        levels = torch.clamp(torch.round(values / scale) + zero_point, 0, 255)
        measured = float(((levels - zero_point) * scale - values).double().pow(2).sum())
        expected = squared_error(edges + histogram.width / 2, counts, low, high, 8)
        assert math.isclose(measured, expected, rel_tol=0.03)


def test_l2_cuts_an_outlier_off() -> None:
    values = torch.cat([normal(9, 1_000_000), torch.tensor([15.0])])
    low, high = counted(values).range("l2", 8)
    assert -5 < low < -3 and 3 < high < 9


@pytest.mark.parametrize("kind", ["normal", "relu"])
def test_kl_diverges_least_of_all_candidates(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "SHRINKS", 12)
    monkeypatch.setattr(ranges, "BINS", 512)  # few enough for candidates narrower than 256 bins
    histogram = counted(normal(10) if kind == "normal" else normal(11).relu())
    edges, counts = histogram.bins()
    held = counts > 0
    centres = edges[held] + histogram.width / 2
    pairs = histogram.candidates("kl", 8)
    costs = [plain_divergence(centres, counts[held], *pair, 8) for pair in pairs]
    chosen = pairs.index(histogram.range("kl", 8))
    assert math.isclose(costs[chosen], min(costs), rel_tol=1e-9)
    assert all((high - low) / histogram.width >= 256 for low, high in pairs)
    for pair, cost in zip(pairs, costs, strict=True):
        assert math.isclose(divergence(centres, counts[held], *pair, 8), cost, rel_tol=1e-9)


def plain_divergence(centres: np.ndarray, counts: np.ndarray, low: float, high: float, bits: int) -> float:
    """Written as a loop over values, from the words of the docstring."""
    scale, zero_point = affine(low, high, bits)
    inside = [i for i, c in enumerate(centres) if low <= c <= high]
    p = {i: float(counts[i]) for i in inside}
    groups: dict[int, list[int]] = {}
    for i in inside:
        level = min(max(round(centres[i] / scale) + zero_point, 0), 2**bits - 1)
        groups.setdefault(level, []).append(i)
    total = sum(p.values())
    q = {i: sum(p[j] for j in group) / len(group) / total for group in groups.values() for i in group}
    p[inside[0]] += float(sum(counts[: inside[0]]))
    p[inside[-1]] += float(sum(counts[inside[-1] + 1 :]))
    whole = sum(p.values())
    return sum(v / whole * math.log(v / whole / q[i]) for i, v in p.items())


@given(seed=st.integers(0, 1000), positive=st.booleans(), scale=st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_percentile_keeps_its_share_and_no_more(seed: int, positive: bool, scale: float) -> None:
    values = normal(seed, 50_000, scale)
    values = values.abs() if positive else values
    histogram = counted(values)
    low, high = histogram.range("percentile", 8)
    spare = len(values) * (1 - SHARE) / 2
    kept = values[values != 0].double()
    assert int((kept > high).sum()) <= spare and int((kept < low).sum()) <= spare
    # One bin less at an end, and more than the spare values would be beyond it.
    assert int((kept > high - 1.01 * histogram.width).sum()) > math.floor(spare)
    if not positive:
        assert int((kept < low + 1.01 * histogram.width).sum()) > math.floor(spare)


@given(low=st.floats(-1e30, 1e30), high=st.floats(-1e30, 1e30), bits=st.sampled_from([4, 7, 8]))
@settings(max_examples=200, deadline=None)
def test_scales_and_zero_points_hold_the_range(low: float, high: float, bits: int) -> None:
    scale, zero_point = affine(low, high, bits)
    top = 2**bits - 1
    assert scale > 0 and float(np.float32(scale)) == scale and 0 <= zero_point <= top
    if max(high, 0.0) - min(low, 0.0) > 1e-30:
        assert -zero_point * scale <= min(low, 0.0) + 0.501 * scale
        assert (top - zero_point) * scale >= max(high, 0.0) - 0.501 * scale
        assert scale * top <= (max(high, 0.0) - min(low, 0.0)) * 1.0001


def test_a_range_without_extent_has_a_usable_scale() -> None:
    for edge in (0.0, 1e-44, 1e-38):
        assert affine(0.0, edge, 8) == (1.0, 0)
        assert affine(-edge, 0.0, 8) == (1.0, 0)


def test_values_that_are_not_finite_are_refused_and_nothing_is_counted() -> None:
    histogram = counted(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="2 of 3 values are NaN or infinite"):
        histogram.update(torch.tensor([math.nan, 9.0, math.inf]))
    assert (histogram.total, histogram.low, histogram.high) == (2, 0.0, 2.0)


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'l3' is no way .*choose one of min_max, percentile, l2, kl"):
        counted(torch.ones(1)).range("l3", 8)
    for histogram in (Histogram(), counted(torch.zeros(0))):
        with pytest.raises(ValueError, match="no value was seen"):
            histogram.range("l2", 8)


def test_any_shape_and_type_counts() -> None:
    values = torch.tensor([[[1.0, -2.0]], [[0.0, 4.0]]])
    for taken in (values, values.bfloat16(), values.double(), values.requires_grad_()):
        histogram = counted(taken)
        assert (histogram.low, histogram.high, histogram.zeros, histogram.total) == (-2.0, 4.0, 1, 4)
