"""Deduplicated bags: what a plain loop finds, for any ids, and right even where hashes collide."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_bags import distinct, expanded_bags, stored_bags
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.sharding import dedup
from tightrec.sharding.dedup import dedup_bags

HALVES, DOUBLES = torch.float16, torch.float64
# Few, so that bags repeat; 0 and -1 because they vanish in careless hashes.
IDS = st.sampled_from([0, 1, 2, -1, 2**31 - 1, -(2**31)])
WEIGHTS = st.sampled_from([0.0, -0.0, 1.0, float("nan")])


def kjt(
    features: list[list[list[int]]], weights: Tensor | None = None, **types: torch.dtype
) -> KeyedJaggedTensor:
    bags = [bag for feature in features for bag in feature]
    return KeyedJaggedTensor(
        keys=[f"f{i}" for i in range(len(features))],
        values=torch.tensor([i for bag in bags for i in bag], dtype=types.get("ids", torch.int64)),
        lengths=torch.tensor([len(bag) for bag in bags], dtype=types.get("lengths", torch.int32)),
        weights=weights,
        stride=len(features[0]) if features else 0,
    )


@st.composite
def batches(draw: st.DrawFn) -> KeyedJaggedTensor:
    rows = draw(st.integers(0, 12))
    one = draw(st.booleans())
    bag = st.lists(IDS, min_size=1 if one else 0, max_size=1 if one else 3)
    features = draw(st.lists(st.lists(bag, min_size=rows, max_size=rows), min_size=0, max_size=4))
    count = sum(len(bag) for feature in features for bag in feature)
    weights = None
    if draw(st.booleans()):
        numbers = draw(st.lists(WEIGHTS, min_size=count, max_size=count))
        weights = torch.tensor(numbers, dtype=draw(st.sampled_from([HALVES, torch.float32, DOUBLES])))
    integers = st.sampled_from([torch.int32, torch.int64])
    return kjt(features, weights, ids=draw(integers), lengths=draw(integers))


@settings(max_examples=300, deadline=None)
@given(batch=batches())
def test_a_plain_loop_finds_the_same_bags_and_inverse_indices(batch: KeyedJaggedTensor) -> None:
    result = dedup_bags(batch)
    expected = [distinct(bags) for bags in stored_bags(batch)]
    assert stored_bags(result) == [bags for bags, _ in expected]
    keys, inverse = result.inverse_indices()
    assert keys == result.keys() == batch.keys()
    assert inverse.tolist() == [numbers for _, numbers in expected]
    assert inverse.dtype == torch.int64
    assert expanded_bags(result) == stored_bags(batch)
    assert result.stride() == batch.stride()
    assert result.variable_stride_per_key()
    for part in ("values", "lengths", "weights_or_none"):
        was, now = getattr(batch, part)(), getattr(result, part)()
        assert (was is None and now is None) or was.dtype == now.dtype
    # What the result already knows must be what torchrec would work out.
    fresh = KeyedJaggedTensor(
        keys=result.keys(),
        values=result.values(),
        lengths=result.lengths(),
        stride_per_key_per_rank=[[len(bags)] for bags, _ in expected],
        inverse_indices=result.inverse_indices(),
    )
    assert result.stride_per_key_per_rank() == fresh.stride_per_key_per_rank()
    if batch.keys():
        assert result.length_per_key() == fresh.length_per_key()
        assert result.stride_per_key() == fresh.stride_per_key()


@pytest.mark.parametrize("top", [2**30 - 1, 2**30, 2**31, 2**32, 2**62 - 2, 2**62 - 1, 2**62, 2**63 - 1])
@pytest.mark.parametrize("bottom", [0, -1, -(2**63)])
def test_single_ids_of_any_size_stay_apart_in_and_between_features(top: int, bottom: int) -> None:
    features = [[[bottom], [top], [bottom], [top - 1]], [[top], [bottom + 1], [top], [bottom]]]
    result = dedup_bags(kjt(features))
    assert stored_bags(result) == [distinct(bags)[0] for bags in stored_bags(kjt(features))]
    assert result.inverse_indices()[1].tolist() == [[0, 1, 0, 2], [0, 1, 0, 2]]
    assert dedup_bags(kjt(features[:1])).stride_per_key() == [3]


def test_long_bags_and_many_rows() -> None:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(0, 40, (3 * 500,), generator=generator)
    values = torch.randint(0, 2**62, (int(lengths.sum()),), generator=generator)
    plain = KeyedJaggedTensor(keys=["a", "b", "c"], values=values, lengths=lengths)
    rows = [
        [bags[i] for i in torch.randint(0, 200, (500,), generator=generator)] for bags in stored_bags(plain)
    ]
    batch = kjt([[list(ids) for ids, _ in bags] for bags in rows])
    result = dedup_bags(batch)
    assert stored_bags(result) == [distinct(bags)[0] for bags in rows]
    assert expanded_bags(result) == rows


@settings(max_examples=150, deadline=None)
@given(batch=batches(), values=st.integers(1, 3))
def test_colliding_hashes_cost_space_but_never_mix_up_bags(batch: KeyedJaggedTensor, values: int) -> None:
    honest = dedup._bag_hashes
    # Where the hash is not used, this shows that the exact keys need no hash.
    with patch.object(dedup, "_bag_hashes", lambda *args: honest(*args) % values):
        result = dedup_bags(batch)
    assert expanded_bags(result) == stored_bags(batch)
    fewest = [len(distinct(bags)[0]) for bags in stored_bags(batch)]
    assert all(n >= least for n, least in zip(result.stride_per_key(), fewest, strict=True))


def test_of_colliding_bags_the_later_ones_are_kept_as_they_are() -> None:
    batch = kjt([[[1], [2], [2], [1], []], [[1], [1], [], [2, 2], [2, 2]]])
    with patch.object(dedup, "_bag_hashes", lambda bags, *rest: torch.zeros_like(bags.lengths)):
        result = dedup_bags(batch)
    assert result.inverse_indices()[1].tolist() == [[0, 1, 2, 0, 3], [0, 1, 2, 3, 4]]
    assert expanded_bags(result) == stored_bags(batch)


def test_the_hash_tells_like_bags_apart() -> None:
    """All bags of up to four of five ids, with two weights each, in two features: no hash is shared."""
    bags: list[list[int]] = [[]]
    for size in range(4):
        bags += [[*bag, i] for bag in bags if len(bag) == size for i in (-1, 0, 1, 2, 2**40)]
    count = sum(len(bag) for bag in bags)
    weights = torch.cat([torch.full((count,), weight) for weight in (1.0, 2.0) * 4])
    result = dedup_bags(kjt([bags * 4] * 2, weights))
    assert result.stride_per_key() == [2 * len(bags) - 1] * 2


def test_offsets_will_do_and_values_behind_the_last_bag_are_left_out() -> None:
    batch = KeyedJaggedTensor(
        keys=["a", "b"], values=torch.tensor([7, 7, 1, 2, 99, 98]), offsets=torch.tensor([0, 1, 2, 4, 4])
    )
    result = dedup_bags(batch)
    assert stored_bags(result) == [[((7,), b"")], [((1, 2), b""), ((), b"")]]
    single = KeyedJaggedTensor(keys=["a"], values=torch.tensor([3, 3, 5]), lengths=torch.tensor([1, 1]))
    assert stored_bags(dedup_bags(single)) == [[((3,), b"")]]


def test_nothing_of_the_input_is_changed_or_shared() -> None:
    features = [[[1], [1, 2]], [[], [3]]]
    batch = kjt(features, torch.ones(4))
    result = dedup_bags(batch)
    for part in (result.values(), result.weights(), result.lengths(), result.inverse_indices()[1]):
        part.fill_(5)
    assert stored_bags(batch) == stored_bags(kjt(features, torch.ones(4)))


def test_a_deduplicated_batch_is_returned_as_it_is() -> None:
    once = dedup_bags(kjt([[[1], [1]]]))
    assert dedup_bags(once) is once


def test_variable_batches_without_inverse_indices_are_refused() -> None:
    batch = KeyedJaggedTensor(
        keys=["a", "b"],
        values=torch.tensor([1, 2, 3]),
        lengths=torch.tensor([1, 1, 1]),
        stride_per_key_per_rank=[[2], [1]],
    )
    with pytest.raises(ValueError, match=r"no inverse indices.*Pass inverse_indices=\(keys, int64"):
        dedup_bags(batch)


def test_a_key_that_stands_twice_is_refused_by_name() -> None:
    batch = KeyedJaggedTensor(
        keys=["a", "b", "b"], values=torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 1, 1])
    )
    with pytest.raises(ValueError, match="the key 'b' twice"):
        dedup_bags(batch)


def test_learned_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"require a gradient.*codec\.dedup=false"):
        dedup_bags(kjt([[[1], [1]]], torch.ones(2, requires_grad=True)))


def test_lengths_beyond_the_values_are_refused() -> None:
    batch = KeyedJaggedTensor(keys=["a"], values=torch.tensor([1, 2]), lengths=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="add up to 3 ids, but it holds 2 values"):
        dedup_bags(batch)


def test_lengths_that_are_not_one_a_key_and_row_are_refused() -> None:
    batch = KeyedJaggedTensor(
        keys=["a", "b"], values=torch.arange(5), lengths=torch.ones(5, dtype=torch.int32)
    )
    with pytest.raises(ValueError, match="5 lengths, but 2 keys and stride 2 need 4"):
        dedup_bags(batch)


def test_a_batch_without_keys_keeps_its_rows() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    result = dedup_bags(KeyedJaggedTensor(keys=[], values=nothing, lengths=nothing, stride=5))
    assert result.stride() == 5
    assert result.inverse_indices()[1].shape == (0, 5)
