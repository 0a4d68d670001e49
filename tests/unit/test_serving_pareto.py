"""Which paths are kept: those that none beats at every size, as far as the device's memory goes."""

import dataclasses

import pytest
from explored import path

from tightrec.serving.explore.pareto import cost_a_row, fit_memory, keep, needed_bytes, pareto_front
from tightrec.serving.paths import Device, Profile


def names(paths):
    return [path.name for path in paths]


def device(memory_bytes=None, slots=2):
    return Device(name="cpu", slots=slots, memory_bytes=memory_bytes)


def test_a_path_that_is_worse_in_everything_is_dropped_with_the_reason():
    better, worse = path("better", accuracy=0.8), path("worse", ms=(1.5, 3.0, 30.0), accuracy=0.7)
    front, dropped = pareto_front([worse, better], "accuracy")
    assert names(front) == ["better"]
    assert dropped == [(worse, "better is as good, as fast at every size, and takes no more slots")]


@pytest.mark.parametrize(
    "other",
    [
        path("more accurate", ms=(9.0, 9.0, 90.0), accuracy=0.9),
        path("faster at one size", ms=(9.0, 1.0, 90.0), accuracy=0.1),
        path("faster at the largest", ms=(9.0, 9.0, 19.0), accuracy=0.1),
    ],
    ids=lambda other: other.name,
)
def test_a_path_that_is_best_in_anything_stays(other):
    front, dropped = pareto_front([path("first"), other], "accuracy")
    assert sorted(names(front)) == sorted(["first", other.name])
    assert not dropped


def test_a_path_of_fewer_slots_stays_though_it_is_slower_and_as_accurate():
    one, two = path("one", ms=(2.0, 4.0, 40.0)), path("two", threads=2)
    assert sorted(names(pareto_front([one, two], "accuracy")[0])) == ["one", "two"]
    best_two = path("best two", accuracy=0.9, threads=2)
    assert sorted(names(pareto_front([one, best_two], "accuracy")[0])) == ["best two", "one"]
    slow_two = path("slow two", threads=2, ms=(2.0, 4.0, 40.0))
    assert names(pareto_front([slow_two, one], "accuracy")[0]) == ["one"]


def test_of_paths_within_the_tolerance_one_is_left_and_the_more_accurate_one_wins():
    a = path("a", accuracy=0.8, ms=(1.01, 2.02, 20.2))
    b = path("b", accuracy=0.7)
    far = path("far", accuracy=0.7, ms=(0.9, 1.9, 19.0))
    assert names(pareto_front([b, a], "accuracy")[0]) == ["a"]
    assert names(pareto_front([far, a], "accuracy")[0]) == ["a", "far"]


def test_twins_are_one_path():
    assert len(pareto_front([path("a"), path("b")], "accuracy")[0]) == 1


def test_the_quality_asked_for_decides():
    a = path("a", accuracy=0.8, auc=0.7, ne=0.9)
    b = path("b", accuracy=0.7, auc=0.8, ne=0.8)
    assert names(pareto_front([a, b], "accuracy")[0]) == ["a"]
    assert names(pareto_front([a, b], "auc")[0]) == ["b"]
    assert names(pareto_front([a, b], "ne")[0]) == ["b"]


def test_paths_of_other_sizes_are_not_compared():
    other = dataclasses.replace(path("other"), profile=Profile(rows=(1,), latency_ms=(9.0,), tail_ms=(9.0,)))
    assert len(pareto_front([path("a", accuracy=0.9), other], "accuracy")[0]) == 2


def test_memory_counts_every_worker_and_a_shared_snapshot_once():
    alone = path("alone", memory_bytes=100)
    assert needed_bytes(device(), [alone]) == 200  # two workers of one thread
    assert needed_bytes(device(), [path("wide", threads=2, memory_bytes=100)]) == 100
    assert needed_bytes(device(slots=3), [path("wide", threads=2, memory_bytes=100)]) == 100
    cached = path("cached", fingerprint="alone", memory_bytes=130, cache_bytes=30)
    assert needed_bytes(device(), [alone, cached]) == 2 * (100 + 30)
    other = path("other", memory_bytes=100)
    assert needed_bytes(device(), [alone, other]) == 400


def test_the_cheapest_path_is_kept_and_the_most_accurate_ones_fill_the_rest():
    cheap = path("cheap", accuracy=0.7, ms=(1.0, 1.0, 10.0), memory_bytes=10)
    middle = path("middle", accuracy=0.8, memory_bytes=20)
    best = path("best", accuracy=0.9, memory_bytes=100)
    kept, dropped = fit_memory(device(2 * 30), [best, middle, cheap], "accuracy")
    assert names(kept) == ["middle", "cheap"]
    assert names(path for path, _ in dropped) == ["best"]
    assert dropped[0][1] == "no room: 200 bytes more make 220 of the 60 on cpu"
    kept, dropped = fit_memory(device(2 * 110), [middle, cheap, best], "accuracy")
    assert names(kept) == ["best", "cheap"]
    kept, dropped = fit_memory(device(2 * 130), [middle, cheap, best], "accuracy")
    assert names(kept) == ["best", "middle", "cheap"] and not dropped


def test_where_the_cheapest_does_not_fit_the_cheapest_that_does_is_kept():
    cheap = path("cheap", ms=(1.0, 1.0, 10.0), memory_bytes=1000)
    small = path("small", accuracy=0.6, memory_bytes=10)
    kept, _ = fit_memory(device(20), [cheap, small], "accuracy")
    assert names(kept) == ["small"]


def test_no_room_for_any_path_says_the_smallest_need_and_the_limit():
    with pytest.raises(ValueError, match=r"cpu: the smallest path needs 20 bytes, but memory allows 19\."):
        fit_memory(device(19), [path("a", memory_bytes=10), path("b", memory_bytes=1000)], "accuracy")


def test_a_path_that_does_not_fit_drops_none_that_does():
    large, small = path("large", accuracy=0.9, memory_bytes=1000), path("small", memory_bytes=10)
    kept = keep(device(20), [large, small], "accuracy")
    assert names(kept.paths) == ["small"]
    assert kept.dropped == ((large, "no room: it needs 2,000 of the 20 on cpu"),)


def test_cost_is_slot_time_a_row_at_the_best_throughput():
    assert cost_a_row(path(ms=(1.0, 2.0, 40.96))) == pytest.approx(0.01)
    assert cost_a_row(path(ms=(1.0, 2.0, 40.96), threads=2)) == pytest.approx(0.02)


def test_every_path_is_kept_or_dropped():
    paths = [path(f"p{i}", accuracy=0.7 + i / 100, ms=(1 + i % 3, 2 + i, 30 - i)) for i in range(9)]
    kept = keep(device(6 * 1000), paths, "accuracy")
    assert sorted(names(kept.paths) + names(path for path, _ in kept.dropped)) == sorted(names(paths))
    assert needed_bytes(device(), kept.paths) <= 6 * 1000
