"""Counts in bounded memory equal plain counts, and ids get the documented numbers."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tightrec.trainer.data.prepare.numbering import TEST, TRAIN, VALID, Hashing, Vocabulary, draw_splits
from tightrec.trainer.data.prepare.vocabulary import (
    ENTRY_BYTES,
    Choice,
    Run,
    RunCounter,
    count_run,
    least_count,
    merged,
    spilled_runs,
)

IDS = st.integers(0, 2**32 - 1) | st.integers(0, 20) | st.integers(2**32 - 5, 2**32 - 1)
BATCHES = st.lists(st.lists(IDS, max_size=40), max_size=12)
MASK = 2**64 - 1


def mix(x: int) -> int:
    """The splitmix64 finaliser as the paper writes it, in Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def run_of(values: list[int]) -> Run:
    return count_run(np.array(values, np.uint32))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=BATCHES, second=BATCHES, most=st.integers(1, 30), spill_every=st.integers(1, 5))
def test_counts_survive_spilling_and_merging_by_ranges(
    tmp_path: Path, first: list[list[int]], second: list[list[int]], most: int, spill_every: int
) -> None:
    counter, ends = RunCounter(2), []
    length = max(len(first), len(second))
    columns = [column + [[]] * (length - len(column)) for column in (first, second)]
    for at, (one, two) in enumerate(zip(*columns, strict=True)):
        counter.add([run_of(one), run_of(two)])
        if at % spill_every == 0:
            ends.append(counter.spill(tmp_path, len(ends)))
            assert counter.used_bytes == 0
    ends.append(counter.spill(tmp_path, len(ends)))
    for column, batches in enumerate(columns):
        found = list(merged(spilled_runs(tmp_path, ends, column), most))
        ids = [key for run in found for key in run.ids.tolist()]
        counts = [count for run in found for count in run.counts.tolist()]
        expected = Counter(key for batch in batches for key in batch)
        assert ids == sorted(expected)
        assert counts == [expected[key] for key in ids]
        assert all(len(run.ids) <= most for run in found)


def test_runs_in_memory_stay_few_and_no_larger_than_their_distinct_ids_ask_for() -> None:
    counter = RunCounter(1)
    for _ in range(100):
        counter.add([run_of(list(range(50)))])
    assert counter.used_bytes == 50 * ENTRY_BYTES


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(IDS, max_size=200), min_count=st.integers(1, 4), max_ids=st.none() | st.integers(1, 20)
)
def test_the_frequent_ids_are_chosen_whatever_the_ranges(
    values: list[int], min_count: int, max_ids: int | None
) -> None:
    choice = Choice(min_count=min_count, max_ids=max_ids, hold=1_000).take(merged([run_of(values)], 7))
    counts = Counter(values)
    ranked = sorted(
        (key for key, count in counts.items() if count >= min_count), key=lambda k: (-counts[k], k)
    )
    assert choice.ids.tolist() == sorted(ranked[:max_ids])
    assert choice.count == len(choice.ids)
    for often in range(1, 6):
        assert choice.histogram[often:].sum() == sum(count >= often for count in counts.values())


def test_of_many_equally_frequent_ids_the_smaller_ones_are_kept() -> None:
    values = np.random.default_rng(0).integers(0, 3_000, 5_000, np.uint32)
    choice = Choice(min_count=1, max_ids=700, hold=10_000).take(merged([count_run(values)], 2_000))
    counts = Counter(values.tolist())
    assert choice.ids.tolist() == sorted(sorted(counts, key=lambda key: (-counts[key], key))[:700])


def test_a_choice_too_large_to_hold_is_counted_and_a_fitting_threshold_proposed() -> None:
    values = [key for key in range(100) for _ in range(1 + key % 10)]
    choice = Choice(min_count=1, max_ids=None, hold=35).take(merged([run_of(values)], 10))
    assert (choice.count, len(choice.ids)) == (100, 0)
    assert least_count(choice.histogram, 35) == 8
    assert least_count(np.full(1_001, 50), 35) is None


@settings(max_examples=100, deadline=None)
@given(chosen=st.sets(IDS, max_size=60), asked=st.lists(IDS, max_size=60), blank=st.sets(st.integers(0, 59)))
def test_numbers_are_missing_rare_or_the_place_in_the_vocabulary(
    chosen: set[int], asked: list[int], blank: set[int]
) -> None:
    vocabulary = Vocabulary(np.array(sorted(chosen), np.uint32))
    values = np.array([*asked, *chosen], np.uint32)
    missing = np.array([(at in blank) << 3 | 0b10111 for at in range(len(values))], np.uint32)
    rows = np.arange(len(values))[::-1].copy()
    numbers = vocabulary.numbers(values, missing, 3, rows)
    place = {key: 2 + at for at, key in enumerate(sorted(chosen))}
    assert numbers.tolist() == [0 if r in blank else place.get(int(values[r]), 1) for r in rows.tolist()]
    assert vocabulary.cardinality == 2 + len(chosen)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(IDS, max_size=50), size=st.integers(2, 2**32 - 1), seed=st.integers(0, 2**63 - 1))
def test_hashing_follows_its_documented_rule(values: list[int], size: int, seed: int) -> None:
    hashing = Hashing(size, seed, 25)
    missing = np.zeros(len(values) + 1, np.uint32)
    missing[-1] = 1 << 25
    numbers = hashing.numbers(np.array([*values, 0], np.uint32), missing, 25, np.arange(len(values) + 1))
    salt = mix((64 * seed + 25) & MASK)
    expected = [1 + ((mix((key + salt) & MASK) >> 32) * (size - 1) >> 32) for key in values]
    assert numbers.tolist() == [*expected, 0]
    assert hashing.cardinality == size


def test_hashes_of_two_columns_differ_and_spread() -> None:
    values = np.arange(20_000, dtype=np.uint32)
    none, rows = np.zeros(20_000, np.uint32), np.arange(20_000)
    first, second = (Hashing(101, 0, column).numbers(values, none, column, rows) for column in (0, 1))
    assert (first == second).mean() < 0.02
    counts = np.bincount(first, minlength=101)
    assert counts[0] == 0
    assert counts[1:].min() > 140
    assert counts[1:].max() < 260


@pytest.mark.parametrize(("valid_share", "test_share"), [(0.1, 0.1), (0.0, 0.3), (0.25, 0.0), (0.0, 0.0)])
def test_rows_are_drawn_into_splits_by_their_shares_and_the_documented_rule(
    valid_share: float, test_share: float
) -> None:
    lines = np.arange(1, 30_001)
    splits = draw_splits(lines, 3, 7, valid_share, test_share)
    for code, share in ((TEST, test_share), (VALID, valid_share), (TRAIN, 1 - test_share - valid_share)):
        assert abs((splits == code).mean() - share) < 0.01
    salt = mix((3 + mix(7)) & MASK)
    u = [(mix((line + salt) & MASK) >> 11) / 2**53 for line in range(1, 200)]
    below = test_share + valid_share
    assert splits[:199].tolist() == [TEST if x < test_share else VALID if x < below else TRAIN for x in u]
    assert (draw_splits(lines, 4, 7, 0.2, 0.2) != draw_splits(lines, 3, 7, 0.2, 0.2)).any()
    assert (draw_splits(lines, 3, 8, 0.2, 0.2) != draw_splits(lines, 3, 7, 0.2, 0.2)).any()
