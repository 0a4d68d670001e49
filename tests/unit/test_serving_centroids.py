"""The decoder level: what is clustered, how near the results are, and which features get it."""

import pytest
import torch
from cache_made import all_vectors, made_hashed, zipf_ids

from tightrec.serving.caching.centroids import (
    Centroids,
    build_clusters,
    chosen_features,
    code_type,
    feature_bytes,
    pieces_of,
)
from tightrec.serving.paths import CacheConfig
from tightrec.snapshot.hashed import HashedLookup

CPU = torch.device("cpu")


def settings(**words: object) -> CacheConfig:
    return CacheConfig(**{"levels": "decoder", "pieces": 1, **words})


def level(hashed: HashedLookup, config: CacheConfig, features: list[int], **words: object) -> Centroids:
    clusters = [build_clusters(hashed, feature, config, **words) for feature in features]
    codes = torch.cat([one.codes for one in clusters]).to(code_type(config))
    results = torch.cat([one.results for one in clusters])
    return Centroids(hashed.cardinalities, features, codes, results, config, CPU)


def errors(hashed: HashedLookup, found: Centroids, feature: int) -> float:
    """Mean squared error over all ids of a feature."""
    ids = torch.arange(hashed.cardinalities[feature])
    exact = hashed.compute(feature, ids)
    return float((found.find(ids, torch.full_like(ids, feature)) - exact).square().mean())


def test_an_ids_vector_is_the_mean_of_those_it_is_clustered_with() -> None:
    hashed, config = made_hashed(), settings(centroids=16)
    vectors = all_vectors(hashed)[1]
    clusters = build_clusters(hashed, 1, config)
    codes = clusters.codes[:, 0]
    for number in codes.unique().tolist():
        mean = vectors[codes == number].double().mean(0).float()
        assert torch.allclose(clusters.results[number, 0], mean, atol=1e-6)
    assert len(codes.unique()) > 12


def test_frequencies_weigh_the_means() -> None:
    hashed, config = made_hashed(), settings(centroids=4)
    weights = torch.ones(300)
    weights[17] = 1e6
    plain, weighed = (build_clusters(hashed, 1, config, given) for given in (None, weights))
    wanted = all_vectors(hashed)[1][17]
    error = [float((one.results[one.codes[17, 0], 0] - wanted).abs().max()) for one in (plain, weighed)]
    assert error[1] < 1e-4 < error[0]


def test_features_of_few_ids_are_exact() -> None:
    hashed = made_hashed()
    for config in (
        settings(centroids=16),
        settings(centroids=300, pieces=4),
        settings(centroids=300, space="encoder"),
    ):
        found = level(hashed, config, [0, 1, 2])
        assert found.exact.tolist() == [count <= config.centroids for count in hashed.cardinalities]
        for feature in found.exact.nonzero().flatten().tolist():
            assert errors(hashed, found, feature) == 0


@pytest.mark.parametrize("centroids", [16, 256, 257, 700])
def test_codes_of_every_width_find_the_centroid_that_was_assigned(centroids: int) -> None:
    hashed = made_hashed()
    config = settings(centroids=centroids)
    assert code_type(config) == (torch.uint8 if centroids <= 256 else torch.int16)
    clusters = build_clusters(hashed, 2, config)
    found = level(hashed, config, [0, 2])
    ids = zipf_ids(1000, 500, 3)
    wanted = clusters.results[clusters.codes[ids, 0], 0]
    assert torch.equal(found.find(ids, torch.full_like(ids, 2)), wanted)


def test_codes_above_32_767_stay_what_they_are() -> None:
    config = settings(centroids=40_000)
    codes = torch.tensor([[0], [32_767], [32_768], [39_999]]).repeat(12_500, 1)
    results = torch.arange(40_000.0).view(-1, 1, 1)
    found = Centroids([50_000], [0], codes.to(code_type(config)), results, config, CPU)
    ids = torch.arange(4)
    assert found.find(ids, torch.zeros_like(ids)).flatten().tolist() == [0, 32_767, 32_768, 39_999]


def test_more_centroids_and_more_pieces_are_nearer() -> None:
    hashed = made_hashed()
    ways = [{"centroids": 8}, {"centroids": 64}, {"centroids": 64, "pieces": 2}]
    found = [errors(hashed, level(hashed, settings(**one), [0, 1, 2]), 2) for one in ways]
    assert found[0] > 2 * found[1] > 4 * found[2] > 0


def test_clusters_of_decoded_vectors_are_nearer_than_those_of_codes() -> None:
    hashed = made_hashed()
    config = settings(centroids=32)
    of_codes = settings(centroids=32, space="encoder")
    decoded = errors(hashed, level(hashed, config, [2]), 2)
    encoded = errors(hashed, level(hashed, of_codes, [2]), 2)
    assert decoded < encoded


def test_results_of_a_centroid_itself_are_what_the_decoder_makes_of_it() -> None:
    hashed = made_hashed(kind="fp32")
    config = settings(centroids=32, space="encoder")
    mean, own = (build_clusters(hashed, 2, config, results=kind) for kind in ("mean", "centroid"))
    assert torch.equal(mean.codes, own.codes)
    codes = hashed.encode(2, torch.arange(1000))
    sizes = torch.bincount(own.codes[:, 0], minlength=32)
    biggest = int(sizes.argmax())
    centre = codes[own.codes[:, 0] == biggest].mean(0)
    # k-means stops before it has settled wholly.
    assert torch.allclose(own.results[biggest, 0], hashed.decode(2, centre[None])[0], atol=0.05)
    vectors = hashed.compute(2, torch.arange(1000))
    error = [float((one.results[one.codes[:, 0], 0] - vectors).square().mean()) for one in (mean, own)]
    assert error[0] <= error[1]


def test_the_same_seed_gives_the_same_clusters() -> None:
    hashed, config = made_hashed(), settings(centroids=10)
    first, again, other = (build_clusters(hashed, 2, config, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.codes, again.codes) and torch.equal(first.results, again.results)
    assert not torch.equal(first.codes, other.codes)


def test_the_smallest_features_come_first_and_the_least_memory_is_named() -> None:
    config = settings(centroids=16)
    sizes = [feature_bytes(count, 8, config) for count in (1000, 7, 300)]
    assert sizes == [1000 + 16 * 32, 7 + 7 * 32, 300 + 16 * 32]
    assert chosen_features((1000, 7, 300), 8, config, sum(sizes)) == [0, 1, 2]
    assert chosen_features((1000, 7, 300), 8, config, sum(sizes) - 1) == [1, 2]
    assert chosen_features((1000, 7, 300), 8, config, sizes[1]) == [1]
    with pytest.raises(ValueError, match=r"at least 0\.000231 MB here, and has 0\.00023"):
        chosen_features((1000, 7, 300), 8, config, sizes[1] - 1)


def test_memory_is_what_was_reckoned() -> None:
    hashed = made_hashed()
    for config in (settings(centroids=300), settings(pieces=2)):
        found = level(hashed, config, [0, 2])
        assert found.memory_bytes == sum(feature_bytes(count, 8, config) for count in (7, 1000))


def test_vectors_are_cut_into_as_many_pieces_as_divide_them() -> None:
    wanted = {(8, 8): 8, (8, 3): 1, (12, 8): 4, (4, 8): 4, (32, 6): 2}
    for (dim, pieces), found in wanted.items():
        assert pieces_of(settings(pieces=pieces), dim) == found
    assert pieces_of(settings(pieces=8, space="encoder"), 8) == 1
    hashed = made_hashed()
    found = [
        errors(hashed, level(hashed, settings(centroids=16, pieces=pieces), [2]), 2) for pieces in (6, 2)
    ]
    assert found[0] == found[1]
