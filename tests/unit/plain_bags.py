"""Bags of a KeyedJaggedTensor as plain Python values, and deduplication the slow, obvious way."""

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

Bag = tuple[tuple[int, ...], bytes]
"""Ids, and the bytes of the weights."""

VIEWS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def stored_bags(features: KeyedJaggedTensor) -> list[list[Bag]]:
    """Per feature, the bags that the tensor stores."""
    values, weights = features.values().tolist(), features.weights_or_none()
    size = 0 if weights is None else weights.element_size()
    raw = b"" if weights is None else weights.view(VIEWS[size]).numpy().tobytes()
    bags: list[list[Bag]] = []
    lengths, start = iter(features.lengths().view(-1).tolist()), 0
    for count in features.stride_per_key():
        bags.append([])
        for _ in range(count):
            end = start + next(lengths)
            bags[-1].append((tuple(values[start:end]), raw[start * size : end * size]))
            start = end
    return bags


def expanded_bags(features: KeyedJaggedTensor) -> list[list[Bag]]:
    """Per feature, the bag of each row; inverse indices followed where there are some."""
    inverse = features.inverse_indices_or_none()
    if inverse is None:
        return stored_bags(features)
    assert inverse[0] == features.keys()
    rows = zip(stored_bags(features), inverse[1].tolist(), strict=True)
    return [[stored[i] for i in numbers] for stored, numbers in rows]


def distinct(bags: list[Bag]) -> tuple[list[Bag], list[int]]:
    """The distinct bags in order of first use, and the number of each row's bag."""
    numbers: dict[Bag, int] = {}
    inverse = [numbers.setdefault(bag, len(numbers)) for bag in bags]
    return list(numbers), inverse
