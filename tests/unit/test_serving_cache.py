"""Both levels in front of a served deep hash embedding: what comes out, what is counted, what is kept."""

import numpy as np
import pytest
import torch
from cache_made import COLUMNS, DIM, all_vectors, bags, frequencies, made_hashed
from torch import Tensor

from tightrec.formats.columns import Bags, Columns
from tightrec.serving.caching import cache
from tightrec.serving.caching.cache import Caches, attach
from tightrec.serving.paths import CacheConfig
from tightrec.snapshot.hashed import HashedLookup

ROWS = 40


def answers(hashed: HashedLookup, batches: int = 60) -> list[Tensor]:
    with torch.inference_mode():
        return [hashed(*bags(hashed, ROWS, seed), ROWS) for seed in range(batches)]


def attached(hashed: HashedLookup, levels: str, memory_mb: float = 0.01, **settings: object) -> Caches:
    config = CacheConfig(levels=levels, memory_mb=memory_mb, centroids=16, pieces=1)
    return attach(hashed, config, None, "a", **settings)


@pytest.mark.parametrize("kind", ["int8", "fp16", "bf16"])
@pytest.mark.parametrize("memory_mb", [0.001, 0.005, 0.02, 1])
@pytest.mark.parametrize("warm", [False, True])
def test_the_encoder_level_changes_no_bit(kind: str, memory_mb: float, warm: bool) -> None:
    hashed = made_hashed(kind=kind)
    wanted = answers(hashed)
    caches = attached(hashed, "encoder", memory_mb, warm=frequencies(hashed) if warm else None)
    found = answers(hashed)
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))
    hits, misses = caches.counts["encoder"]
    assert hits > 0 and (misses == 0) == (memory_mb == 1)


def test_float32_layers_change_by_their_rounding_alone() -> None:
    hashed = made_hashed(kind="fp32")
    wanted = answers(hashed)
    attached(hashed, "encoder", warm=frequencies(hashed))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(wanted, answers(hashed), strict=True))


@pytest.mark.parametrize("levels", ["encoder", "decoder", "both"])
def test_each_id_has_one_vector_whatever_stands_beside_it(levels: str) -> None:
    hashed = made_hashed()
    exact = all_vectors(hashed)
    caches = attached(hashed, levels, warm=frequencies(hashed))
    approximate = attached(made_hashed(), "decoder")
    ids = torch.arange(300)
    features = torch.ones_like(ids)
    centroids = approximate(1, ids)
    for _ in range(30):
        found = caches.together(ids, features)
        is_exact = (found == exact[1]).all(1)
        assert torch.equal(found[is_exact], exact[1][is_exact])
        if levels == "encoder":
            assert is_exact.all()
    if levels != "encoder":
        assert not is_exact.all()
    if levels == "both":
        # Clustered with weights here, so near to the others' centroids, not equal to them.
        assert float((found - exact[1]).square().mean()) < float((centroids - exact[1]).square().mean())
        assert is_exact[:20].all()


def test_overflow_ids_and_empty_bags_are_zero_at_every_level() -> None:
    for levels in ("encoder", "decoder", "both"):
        hashed = made_hashed()
        caches = attached(hashed, levels)
        offsets = torch.tensor([0, 2, 2, 4, 4, 6, 6])
        ids = torch.tensor([7, 7, 300, 300, 1000, 1000])
        for _ in range(20):
            assert not hashed(ids, offsets, 2).any()
        assert sum(sum(pair) for pair in caches.counts.values()) == 0
        mixed = caches.together(torch.tensor([7, 6, 300, 299]), torch.tensor([0, 0, 1, 1]))
        assert mixed.any(1).tolist() == [False, True, False, True]


def test_both_levels_are_nearer_than_the_decoder_level_and_cost_more_memory() -> None:
    hashed = made_hashed()
    wanted = torch.stack(answers(hashed))
    error, memory = {}, {}
    for levels in ("decoder", "both"):
        caches = attached(hashed, levels, warm=frequencies(hashed))
        error[levels] = float((torch.stack(answers(hashed)) - wanted).square().mean())
        memory[levels] = caches.memory_bytes
    assert 0 < error["both"] < error["decoder"] / 2
    assert memory["decoder"] < memory["both"] <= 10_000


@pytest.mark.parametrize("levels", ["encoder", "decoder", "both"])
@pytest.mark.parametrize("memory_mb", [0.0013, 0.003, 0.01, 0.1])
def test_memory_stays_in_its_bound(levels: str, memory_mb: float) -> None:
    hashed = made_hashed()
    caches = attached(hashed, levels, memory_mb, warm=frequencies(hashed))
    answers(hashed, 20)
    assert 0 < caches.memory_bytes <= memory_mb * 1e6


def test_features_without_room_for_a_decoder_level_are_computed_exactly() -> None:
    hashed = made_hashed()
    wanted = [all_vectors(hashed)[2], torch.arange(1000), torch.full((1000,), 2)]
    caches = attached(hashed, "decoder", 0.0015)
    assert caches.features == {"country": "exact", "item.id": "approximate", "user": "none"}
    assert torch.equal(caches.together(*wanted[1:]), wanted[0])
    assert caches.counts == {"decoder": (0, 1000)}


def test_room_for_all_ids_makes_both_levels_exact() -> None:
    hashed = made_hashed()
    wanted = answers(hashed)
    caches = attached(hashed, "both", 1.0)
    assert all(torch.equal(one, other) for one, other in zip(wanted, answers(hashed), strict=True))
    assert sum(caches.counts["decoder"]) < sum(caches.counts["encoder"])


def test_counts_are_of_ids_and_reach_every_one() -> None:
    hashed = made_hashed()
    caches = attached(hashed, "both", 0.004)
    asked = 0
    for seed in range(40):
        ids, offsets = bags(hashed, ROWS, seed)
        hashed(ids, offsets, ROWS)
        ends = offsets[::ROWS]
        limits = torch.repeat_interleave(torch.tensor(hashed.cardinalities), ends.diff())
        asked += int((ids < limits).sum())
    hits, misses = caches.counts["encoder"]
    # Hits and misses of the encoder level are all ids; the decoder level is asked for the misses.
    assert hits + misses == asked
    assert sum(caches.counts["decoder"]) == misses


def test_ids_that_become_hot_become_exact() -> None:
    hashed = made_hashed()
    exact = all_vectors(hashed)[2]
    caches = attached(hashed, "both", 0.004)
    ids, features = torch.arange(900, 910), torch.full((10,), 2)
    before = caches.together(ids, features)
    for _ in range(100):
        caches.together(ids.repeat(20), features.repeat(20))
    assert not torch.equal(before, exact[900:910])
    assert torch.equal(caches.together(ids, features), exact[900:910])


def test_warm_ids_are_there_from_the_start() -> None:
    hashed = made_hashed()
    warm = [(torch.arange(5), torch.full((5,), 100)) for _ in hashed.names]
    caches = attached(hashed, "encoder", 0.004, warm=warm)
    caches.together(torch.arange(5), torch.full((5,), 2))
    assert caches.counts["encoder"] == (5, 0)


def test_closed_caches_leave_the_lookup_as_it_was() -> None:
    hashed = made_hashed()
    wanted = answers(hashed, 3)
    caches = attached(hashed, "decoder")
    assert not torch.equal(answers(hashed, 3)[0], wanted[0])
    caches.close()
    assert torch.equal(answers(hashed, 3)[0], wanted[0])
    first, second = attached(hashed, "decoder"), attached(hashed, "encoder")
    first.close()
    assert hashed.vectors is second


def test_two_caches_of_one_lookup_can_take_turns() -> None:
    hashed = made_hashed()
    near, exact = attached(hashed, "decoder"), attached(hashed, "encoder")
    found = {}
    for _ in range(2):
        for caches in (near, exact):
            hashed.vectors = caches
            found.setdefault(caches, answers(hashed, 2)[1])
            assert torch.equal(found[caches], answers(hashed, 2)[1])
    assert not torch.equal(found[near], found[exact])


def test_no_levels_change_nothing() -> None:
    hashed = made_hashed()
    attached(hashed, "decoder")
    caches = attached(hashed, "none")
    assert hashed.vectors == hashed.compute
    assert caches.counts == {} and caches.memory_bytes == 0


def test_what_does_not_fit_is_refused() -> None:
    hashed = made_hashed()
    with pytest.raises(ValueError, match="decoder level of a cache needs at least"):
        attached(hashed, "decoder", 0.0001)
    with pytest.raises(ValueError, match="encoder level of a cache needs at least"):
        attached(hashed, "encoder", 0.0001)
    assert hashed.vectors == hashed.compute


def test_no_rows_are_no_trouble() -> None:
    for levels in ("encoder", "decoder", "both"):
        hashed = made_hashed()
        attached(hashed, levels)
        found = hashed(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 0)
        assert found.shape == (0, 3 * DIM)


def test_frequencies_are_counted_by_name() -> None:
    hashed = made_hashed(columns=COLUMNS[:2])
    sparse = (
        Bags(np.array([9, 9, 9])),
        Bags(np.array([5, 5, 2, 5]), np.array([0, 1, 1, 4])),
        Bags(np.array([6, 0, 6])),
    )
    rows = Columns(np.zeros((3, 0), np.float32), np.zeros(3, np.float32), sparse)
    found = cache.frequencies(rows, ["other", "item.id", "country"], hashed)
    assert [(ids.tolist(), times.tolist()) for ids, times in found] == [([0, 6], [1, 2]), ([2, 5], [1, 3])]
