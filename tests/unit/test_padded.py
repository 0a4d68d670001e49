"""Features with empty bags behind them: the same lookups at one number of bags."""

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.sharding.dedup import dedup_bags
from tightrec.sharding.sharded import padded


def ragged(counts: list[int], weighted: bool) -> KeyedJaggedTensor:
    lengths = torch.tensor([(3 * i + 1) % 4 for i in range(sum(counts))], dtype=torch.int32)
    ids = torch.arange(int(lengths.sum()))
    return KeyedJaggedTensor(
        keys=[f"f{i}" for i in range(len(counts))],
        values=ids,
        lengths=lengths,
        weights=ids.float() / 2 if weighted else None,
        stride_per_key_per_rank=[[count] for count in counts],
        inverse_indices=(
            [f"f{i}" for i in range(len(counts))],
            torch.zeros(len(counts), 1, dtype=torch.int64),
        ),
    )


def test_bags_keep_their_ids_and_empty_ones_follow() -> None:
    for weighted in (False, True):
        features = ragged([3, 5, 0, 1], weighted)
        result = padded(features)
        assert not result.variable_stride_per_key()
        assert result.stride() == 5
        assert result.values() is features.values()
        assert result.weights_or_none() is features.weights_or_none()
        lengths = result.lengths().view(4, 5)
        assert lengths.dtype == features.lengths().dtype
        at = 0
        for row, count in zip(lengths, [3, 5, 0, 1], strict=True):
            assert torch.equal(row[:count], features.lengths()[at : at + count])
            assert not row[count:].any()
            at += count
        assert result.length_per_key() == features.length_per_key()
        assert all(torch.equal(result[f"f{i}"].values(), features[f"f{i}"].values()) for i in range(4))


def test_equal_counts_and_plain_batches_are_left_as_they_are() -> None:
    equal = ragged([4, 4], weighted=False)
    assert torch.equal(padded(equal).lengths(), equal.lengths())
    plain = KeyedJaggedTensor(keys=["a"], values=torch.arange(3), lengths=torch.tensor([1, 2]))
    assert padded(plain) is plain


def test_nothing_at_all() -> None:
    assert padded(ragged([0, 0], weighted=True)).stride() == 0
    assert padded(ragged([], weighted=False)).stride() == 0


def test_a_deduplicated_batch() -> None:
    batch = KeyedJaggedTensor(
        keys=["a", "b"], values=torch.tensor([5, 5, 6, 1, 2, 3]), lengths=torch.tensor([1, 1, 1, 1, 1, 1])
    )
    result = padded(dedup_bags(batch))
    assert result.stride() == 3
    assert result.lengths().tolist() == [1, 1, 0, 1, 1, 1]
    assert result.values().tolist() == [5, 6, 1, 2, 3]
