"""Hashes and decoders of deep hash embeddings: against plain integers, torch's own layers and derivatives."""

import hashlib

import pytest
import torch
from torch import nn

from tightrec.models import dhe
from tightrec.models.config import RepresentationConfig
from tightrec.models.dhe import Decoders, Hashes, grouped_linear, next_prime

FEW = {"hashes": 6, "buckets": 1000}


def hashes_of(cardinality: int, name: str = "user", **settings) -> Hashes:
    return Hashes(name, cardinality, RepresentationConfig(**(FEW | settings)))


def draws(words: str, count: int) -> list[int]:
    """SplitMix64 in Python's integers."""
    seed, mask, found = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little"), 2**64 - 1, []
    for number in range(1, count + 1):
        mixed = (seed + number * 0x9E3779B97F4A7C15) & mask
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        found.append(mixed ^ (mixed >> 31))
    return found


@pytest.mark.parametrize("cardinality", [1, 1000, 1001, 3_000_000, 2**27, 2**31 - 1])
def test_hashes_are_those_of_the_formula_in_exact_integers(cardinality):
    made = hashes_of(cardinality, hash_seed=4)
    prime = next_prime(max(1000, cardinality - 1))
    numbers = draws("4:user", 12)
    factors, offsets = [1 + n % (prime - 1) for n in numbers[:6]], [n % prime for n in numbers[6:]]
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, cardinality, (300,), generator=random)
    ids = torch.cat([ids, torch.tensor([0, cardinality // 2, cardinality - 1])])
    expected = [
        [(a * i + b) % prime % 1000 for a, b in zip(factors, offsets, strict=True)] for i in ids.tolist()
    ]
    assert made.buckets_of(ids).tolist() == expected
    # The codes are made another way where float64 holds the products.
    back = ((made(ids).double() + 1) * 999 / 2).round().long()
    assert back.tolist() == expected


@pytest.mark.parametrize("cardinality", [5000, 30_000_000])
def test_codes_of_the_most_buckets_are_exact(cardinality):
    # A prime above 2**24, and below twice the buckets: the remainder cannot be taken in float32.
    made = hashes_of(cardinality, buckets=2**24 - 1)
    ids = torch.arange(0, cardinality, cardinality // 997)
    expected = made.buckets_of(ids).float().mul_(2 / (2**24 - 2)).sub_(1)
    assert torch.equal(made(ids), expected)


def test_both_ways_to_hash_are_taken():
    assert hashes_of(2**20)._exact
    assert not hashes_of(2**31 - 1)._exact


def test_hashes_never_change():
    # A trained decoder knows these codes and no others: a change of them breaks every checkpoint.
    assert hashes_of(5000).buckets_of(torch.tensor([0, 1, 4999])).tolist() == [
        [910, 97, 579, 643, 279, 733],
        [680, 867, 47, 748, 580, 814],
        [827, 17, 713, 220, 75, 397],
    ]


def test_features_and_seeds_have_hashes_of_their_own_and_share_nothing_with_torchs_generator():
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one = hashes_of(50).a
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(hashes_of(50).a, one)
    assert not torch.equal(hashes_of(50, name="item").a, one)
    assert not torch.equal(hashes_of(50, hash_seed=1).a, one)


def test_hashes_are_in_no_state_dict():
    assert hashes_of(50).state_dict() == {}


def test_ids_differ_in_their_codes_even_where_there_are_more_ids_than_buckets():
    made = hashes_of(20_000, buckets=100)
    codes = made.buckets_of(torch.arange(20_000))
    assert len(codes.unique(dim=0)) == 20_000
    assert (codes.min(), codes.max()) == (0, 99)


def test_the_uniform_transform_fills_minus_one_to_one():
    codes = hashes_of(5000, hashes=64)(torch.arange(5000))
    assert codes.dtype == torch.float32
    assert -1 <= codes.min() < -0.99
    assert 0.99 < codes.max() <= 1
    assert abs(codes.mean()) < 0.01
    assert codes.var() == pytest.approx(1 / 3, abs=0.01)


def test_the_gaussian_transform_is_standard_normal_and_finite():
    made = hashes_of(20_000, hashes=64, transform="gaussian", buckets=1_000_000)
    codes = made(torch.arange(20_000))
    assert codes.isfinite().all()
    assert abs(codes.mean()) < 0.01
    assert codes.var() == pytest.approx(1, abs=0.01)
    inside = [(codes.abs() < limit).double().mean().item() for limit in (1, 2, 3)]
    assert inside == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.005)
    pair = torch.stack((codes[:, 0], codes[:, 1]))
    assert abs(torch.corrcoef(pair)[0, 1]) < 0.03


def test_work_in_chunks_changes_nothing(monkeypatch):
    made, ids = hashes_of(5000), torch.arange(0, 5000, 3)
    whole = made(ids)
    monkeypatch.setattr(dhe, "_CHUNK_VALUES", 50)
    assert torch.equal(made(ids), whole)
    assert made(ids[:0]).shape == (0, 6)


def test_too_many_ids_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"feature user has 2,147,483,648 ids.*features\.user=table"):
        hashes_of(2**31)


@pytest.mark.parametrize("divisor", [3, 49, 1000, 999_983, 1_000_003, 2**24 - 3])
def test_remainders_in_float64_are_exact_around_every_multiple(divisor):
    random = torch.Generator().manual_seed(5)
    most = min(2**53 // divisor, 2**48) - 1
    factors = torch.randint(1, most, (20_000,), generator=random)
    values = torch.cat([factors * divisor + step for step in (-1, 0, 1)])
    assert torch.equal(dhe._modulo(values.double(), divisor).long(), values % divisor)


def test_next_prime():
    assert [next_prime(n) for n in (0, 1, 2, 3, 13, 24, 1_000_000)] == [2, 2, 3, 5, 17, 29, 1_000_003]


# ---- decoders


@pytest.mark.parametrize(
    ("activation", "module"),
    [("sigmoid", nn.Sigmoid()), ("relu", nn.ReLU()), ("mish", nn.Mish()), ("linear", nn.Identity())],
)
@pytest.mark.parametrize("hidden", [(), (5,), (7, 5)])
def test_decoders_are_a_network_a_feature(activation, module, hidden):
    torch.manual_seed(0)
    made = Decoders(3, 4, RepresentationConfig(hashes=6, decoder=hidden, activation=activation))
    counts, codes = [5, 0, 2], torch.randn(7, 6)
    vectors = made(codes, counts)
    widths, start = [6, *hidden, 4], 0
    for feature, count in enumerate(counts):
        layers: list[nn.Module] = []
        for place in range(len(widths) - 1):
            layer = nn.Linear(widths[place], widths[place + 1])
            layer.weight.data, layer.bias.data = made.weights[place][feature], made.biases[place][feature]
            layers += [nn.ReLU(), layer] if place else [layer]
        expected = nn.Sequential(*layers, module)(codes[start : start + count])
        assert torch.allclose(vectors[start : start + count], expected, atol=1e-6)
        start += count


def test_decoders_start_as_torchs_linear_layers():
    torch.manual_seed(0)
    made = Decoders(4, 8, RepresentationConfig(hashes=400, decoder=(100,)))
    for name, bound in (("weights.0", 400**-0.5), ("weights.1", 100**-0.5), ("biases.0", 400**-0.5)):
        assert made.state_dict()[name].abs().max() == pytest.approx(bound, rel=0.02), name
    assert sorted(made.state_dict()) == ["biases.0", "biases.1", "weights.0", "weights.1"]


@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 0, 0), (0, 5, 0)])
def test_grouped_linear_has_the_right_derivatives(counts):
    random = torch.Generator().manual_seed(2)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random).requires_grad_()

    arguments = values(sum(counts), 4), values(3, 2, 4), values(3, 2)
    assert torch.autograd.gradcheck(lambda v, w, b: grouped_linear(v, w, b, counts), arguments)


def test_groups_without_a_row_still_give_their_parameters_a_gradient():
    # DistributedDataParallel waits for every parameter's gradient in every step.
    made = Decoders(2, 4, RepresentationConfig(hashes=6, decoder=(5,)))
    made(torch.randn(0, 6), [0, 0]).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in made.parameters())
