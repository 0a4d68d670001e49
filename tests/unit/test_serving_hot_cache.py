"""The encoder level: places, counts and who displaces whom."""

import pytest
import torch
from cache_made import zipf_ids
from torch import Tensor

from tightrec.serving.caching.hot_cache import WAYS, HotVectors

CPU = torch.device("cpu")


def made(ids: int = 1000, memory_bytes: int = 3000, dim: int = 4) -> HotVectors:
    return HotVectors(ids, dim, memory_bytes, CPU)


def vector_of(ids: Tensor, dim: int = 4) -> Tensor:
    return (ids[:, None] * dim + torch.arange(dim)).float()


def look_up(hot: HotVectors, ids: Tensor) -> float:
    """One counted lookup, after which misses may be admitted; the share of hits."""
    hot.count(ids)
    places = hot.find(ids)
    absent = torch.unique(ids[places < 0])
    chosen, slots = hot.admit(absent)
    hot.put(absent[chosen], slots, vector_of(absent[chosen]))
    return float((places >= 0).float().mean())


@pytest.mark.parametrize("memory_bytes", [3000, 30_000], ids=["sets are searched", "direct map"])
def test_what_is_found_is_always_the_ids_own_vector(memory_bytes: int) -> None:
    hot = made(memory_bytes=memory_bytes)
    assert (hot.map is None) == (memory_bytes == 3000)
    for step in range(200):
        ids = zipf_ids(1000, 100, step)
        look_up(hot, (ids * 7 + 13 * (step // 50)) % 1000)  # what is hot moves on
        every = torch.arange(1000)
        places = hot.find(every)
        held = (places >= 0).nonzero().flatten()
        assert torch.equal(hot.vectors[places[held].long()], vector_of(held))
        assert len(held) == int((hot.keys >= 0).sum()) and len(set(places[held].tolist())) == len(held)
    assert int((hot.keys >= 0).sum()) > 20


@pytest.mark.parametrize("memory_bytes", [200, 1000, 3000, 17_001, 100_000])
@pytest.mark.parametrize("ids", [5, 300, 100_000])
def test_memory_with_index_and_counts_stays_in_its_bound(ids: int, memory_bytes: int) -> None:
    least = WAYS * (4 * 4 + 4 + 8)
    if memory_bytes < least:
        with pytest.raises(ValueError, match=r"at least 0\.000224 MB.*raise memory_mb"):
            made(ids, memory_bytes)
        return
    hot = made(ids, memory_bytes)
    assert hot.memory_bytes <= memory_bytes
    assert hot.holds_all or hot.memory_bytes > 0.7 * memory_bytes - least


def test_hot_ids_get_in_and_stay() -> None:
    hot = made(memory_bytes=6000)
    for step in range(100):
        look_up(hot, zipf_ids(1000, 200, step))
    shares = [look_up(hot, zipf_ids(1000, 200, 1000 + step)) for step in range(20)]
    best = float((1 / (torch.arange(hot.slots) + 1.0)).sum() / (1 / (torch.arange(1000) + 1.0)).sum())
    assert sum(shares) / len(shares) > 0.9 * best
    assert (hot.find(torch.arange(20)) >= 0).all()


def test_a_scan_displaces_nothing() -> None:
    hot = made(ids=100_000, memory_bytes=3000)
    ids = torch.arange(hot.slots)
    for _ in range(WAYS):  # one id a set is admitted each time
        look_up(hot, ids)
    assert (hot.find(ids) >= 0).all()
    for start in range(1000, 3000, 50):
        look_up(hot, torch.arange(start, start + 50))
    assert (hot.find(ids) >= 0).all()


def test_what_was_hot_gives_way_after_halvings() -> None:
    hot = made(memory_bytes=3000)
    for _ in range(200):
        look_up(hot, torch.arange(hot.slots))
    for _ in range(200):
        look_up(hot, torch.arange(500, 500 + hot.slots))
    # Some of the old share counters with the new ones.
    assert float((hot.find(torch.arange(500, 500 + hot.slots)) >= 0).float().mean()) > 0.9


def test_counts_are_halved_and_never_wrap() -> None:
    hot = made(ids=20, memory_bytes=10_000)
    for _ in range(3):
        hot.count(torch.zeros(200, dtype=torch.int64))
    assert int(hot.counts[0]) == 255
    hot.count(torch.arange(1, 20).repeat(20))
    assert int(hot.counts[0]) == 127


def test_an_id_is_estimated_no_lower_than_it_was_counted() -> None:
    hot = made(ids=100_000, memory_bytes=3000)
    assert len(hot.counts) < 100_000
    ids = zipf_ids(100_000, hot.slots * 20, 0)
    hot.count(ids)
    distinct, times = torch.unique(ids, return_counts=True)
    estimates = hot._times(distinct)
    assert (estimates >= times.clamp_max(255)).all()
    assert float((estimates == times).float().mean()) > 0.5


def test_the_most_asked_for_are_admitted_first_and_no_more_than_allowed() -> None:
    hot = made()
    ids = torch.arange(10)
    hot.count(ids.repeat_interleave(ids + 1))
    chosen, slots = hot.admit(ids, 3)
    assert chosen.tolist() == [9, 8, 7]
    assert len(set(slots.tolist())) == 3


def test_one_displaces_the_rarest_of_its_set_alone() -> None:
    hot = made()
    rivals = torch.arange(WAYS + 1) * hot.sets  # one set
    hot.count(rivals.repeat_interleave(torch.tensor([5, 9, 9, 9, 2, 9, 9, 9, 6])))
    for one in rivals[:WAYS]:
        chosen, slots = hot.admit(one[None])
        hot.put(one[None], slots, vector_of(one[None]))
    chosen, slots = hot.admit(rivals[WAYS:])
    assert chosen.tolist() == [0]
    hot.put(rivals[WAYS:], slots, vector_of(rivals[WAYS:]))
    assert (hot.find(rivals) < 0).nonzero().flatten().tolist() == [4]


def test_all_ids_have_a_place_where_memory_suffices() -> None:
    hot = made(ids=333, memory_bytes=50_000)
    ids = torch.randperm(333, generator=torch.Generator().manual_seed(0))
    kept, places = hot.places(ids)
    hot.put(ids[kept], places, vector_of(ids[kept]))
    assert hot.holds_all and int((hot.keys >= 0).sum()) == 333
    assert torch.equal(hot.vectors[hot.find(torch.arange(333)).long()], vector_of(torch.arange(333)))


def test_the_first_ids_are_the_hottest_of_each_set() -> None:
    hot = made(memory_bytes=1000)
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    kept, places = hot.places(ids)
    assert len(kept) == hot.slots == len(set(places.tolist()))
    for number in range(hot.sets):
        own = ids[ids % hot.sets == number]
        assert set(ids[kept][places // WAYS == number].tolist()) == set(own[:WAYS].tolist())


def test_what_was_counted_elsewhere_is_worth_as_much() -> None:
    hot = made(ids=100_000, memory_bytes=3000)
    ids = torch.arange(hot.slots)
    hot.start_counts(ids, torch.full_like(ids, 10**9))
    kept, places = hot.places(ids)
    hot.put(ids[kept], places, vector_of(ids[kept]))
    for start in range(1000, 3000, 50):
        look_up(hot, torch.arange(start, start + 50))
    assert (hot.find(ids) >= 0).all()
