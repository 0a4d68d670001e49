"""Distinct bags of a batch: what equal rows of a feature share is looked up and sent once.

Legend: F features, B rows (bags a feature), N ids in all bags. Bag i is row i % B of feature i // B.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

_LARGEST = 2**63 - 1
_BITS_OF = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class _Bags:
    """A batch's bags, feature after feature."""

    values: Tensor
    """[N], any integer type."""

    weight_bits: Tensor | None
    """[N], the weights' bits as integers, so that equal means bit-equal."""

    lengths: Tensor
    """int64 [F * B]"""

    starts: Tensor
    """int64 [F * B]: where a bag's ids begin in ``values``."""

    features: int
    stride: int
    shortest: int
    longest: int

    def per_feature(self, step: int) -> Tensor:
        """int64 [F, 1]: 0, ``step``, 2 ``step`` and so on."""
        return torch.arange(self.features, device=self.lengths.device)[:, None] * step

    def owners_and_places(self) -> tuple[Tensor, Tensor]:
        """For each id (int64 [N]) the bag that it is in, and its place there."""
        owners = torch.repeat_interleave(self.lengths, output_size=len(self.values))
        return owners, torch.arange(len(owners), device=owners.device) - self.starts.index_select(0, owners)


def dedup_bags(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same batch with every feature's distinct bags only, in order of first use.

    Two bags are equal if they hold the same ids, and weights of the same bits, in the same order; empty bags
    are equal. The result has a variable batch per feature (``stride_per_key_per_rank`` of one column),
    fresh values, lengths and weights of the types of the input, and ``inverse_indices``: the keys, and an
    int64 [F, B] that holds for row b of feature f the number of its bag among those of the feature.
    ``stride()`` stays B.

    A batch that has inverse indices already is returned as it is. Bags with two ids or more, with weights or
    without any id are found by a 64-bit hash and then compared id by id; of two different bags with the
    same hash the later one is kept as it is, so a collision costs space, never correctness. Works on the
    features' device; on CUDA the host waits for sizes, at most five times a call.

    Args:
        features: F keys, stride B, on CPU or CUDA. Ids may be any value of their type, negative included;
            values behind the last bag are left out.

    Raises:
        ValueError: variable batch per feature without inverse indices; a key that stands twice; weights that
            require a gradient; lengths that are not one a key and row, or add up to more than there are
            values.

    The deduplication of bags is that of RecD (Zhao et al. 2023), in the form that torchrec takes.
    """
    if features.variable_stride_per_key():
        if features.inverse_indices_or_none() is None:
            raise ValueError(
                "dedup_bags: the batch has a variable batch per feature but no inverse indices, so nothing "
                "tells which row uses which bag. Pass inverse_indices=(keys, int64 [features, rows]) when "
                "making the KeyedJaggedTensor, or give every feature the same number of rows."
            )
        return features
    _require_distinct_keys(features.keys())
    bags = _bags_of(features)
    keys = _exact_keys(bags)
    if keys is not None:
        return _deduplicated(features, bags, _first_with_same(keys))
    owners, places = bags.owners_and_places()
    first = _first_with_same(_bag_hashes(bags, owners, places))
    return _deduplicated(features, bags, _confirmed(first, bags, owners, places))


def _require_distinct_keys(keys: list[str]) -> None:
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(
            f"dedup_bags: the batch holds the key {twice[0]!r} twice, and torchrec finds a feature's rows by "
            "its key. Give each feature one key; tables can share it through their feature_names."
        )


def _bags_of(features: KeyedJaggedTensor) -> _Bags:
    lengths = features.lengths().view(-1).long()
    count, stride = len(features.keys()), features.stride()
    if len(lengths) != count * stride:
        raise ValueError(
            f"dedup_bags: the batch has {len(lengths)} lengths, but {count} keys and stride {stride} need "
            f"{count * stride}. Make the KeyedJaggedTensor with one length for each key and row."
        )
    total, shortest, longest = 0, 0, 0
    if len(lengths):
        total, shortest, longest = torch.stack([lengths.sum(), *torch.aminmax(lengths)]).tolist()
    values, weights = features.values(), features.weights_or_none()
    if total > len(values):
        raise ValueError(
            f"dedup_bags: the lengths of the batch add up to {total} ids, but it holds {len(values)} values. "
            "Make the KeyedJaggedTensor from lengths that fit its values."
        )
    if weights is not None and weights.requires_grad:
        raise ValueError(
            "dedup_bags: the weights of the batch require a gradient, which bags that share one copy of "
            "their weights cannot give back to each row. Detach the weights, or set codec.dedup=false."
        )
    return _Bags(
        values=values[:total],
        weight_bits=None if weights is None else weights[:total].view(_BITS_OF[weights.element_size()]),
        lengths=lengths,
        starts=lengths.cumsum(0) - lengths,
        features=count,
        stride=stride,
        shortest=shortest,
        longest=longest,
    )


def _exact_keys(bags: _Bags) -> Tensor | None:
    """Integers [F * B], equal for equal bags and for no others; None where 64 bits cannot tell them apart."""
    if bags.weight_bits is not None or not bags.shortest == bags.longest == 1:
        return None
    least, most = (int(bound) for bound in torch.stack(torch.aminmax(bags.values)).tolist())
    span = most - least + 1
    if span * bags.features > _LARGEST:
        return None
    numbers = bags.values.long().view(bags.features, bags.stride) - least
    keys = (numbers + bags.per_feature(span)).view(-1)
    # The sort is most of the work, and narrow numbers sort faster.
    return keys.int() if span * bags.features <= 2**31 else keys


def _bag_hashes(bags: _Bags, owners: Tensor, places: Tensor) -> Tensor:
    """int64 [F * B]: hashes of feature, length, ids and weights, each at its place.

    A multilinear hash modulo 2^64 (Carter and Wegman 1979): every number times an odd constant of its
    place. It takes one multiplication an id and no shift, which torch does not vectorise on CPU.
    """
    factors = _odd_numbers(2 * bags.longest + 2, bags.lengths.device)
    terms = bags.values.long() * factors.index_select(0, places)
    if bags.weight_bits is not None:
        terms += bags.weight_bits.long() * factors.index_select(0, places + bags.longest)
    # Wraps around like the hash does, so that differences of running sums are exact.
    sums = torch.cat([terms.new_zeros(1), terms.cumsum(0)])
    hashes = sums.index_select(0, bags.starts + bags.lengths) - sums.index_select(0, bags.starts)
    hashes += bags.lengths * factors[-1]
    return (hashes.view(bags.features, bags.stride) + bags.per_feature(1) * factors[-2]).view(-1)


def _odd_numbers(count: int, device: torch.device) -> Tensor:
    """int64 [count], the same on every machine: splitmix64's outputs (Steele et al. 2014) made odd."""
    mixed = torch.arange(1, count + 1, device=device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        # An arithmetic shift repeats the sign; the logical one brings in zeros.
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return mixed | 1


def _first_with_same(keys: Tensor) -> Tensor:
    """int64 [n]: for each of the ``keys`` [n] the first place that holds the same key."""
    ordered, places = keys.sort(stable=True)
    count = torch.arange(len(keys), device=keys.device)
    opens = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=opens[1:])
    opening = torch.where(opens, count, 0).cummax(0).values
    return torch.empty_like(places).scatter_(0, places, places.index_select(0, opening))


def _confirmed(representative: Tensor, bags: _Bags, owners: Tensor, places: Tensor) -> Tensor:
    """``representative`` [F * B] with bags that differ from theirs standing for themselves."""
    own = torch.arange(len(representative), device=representative.device)
    # The first bag of a hash lies before: in the same feature or in an earlier one.
    alike = representative >= bags.per_feature(bags.stride).expand(-1, bags.stride).reshape(-1)
    alike &= bags.lengths == bags.lengths.index_select(0, representative)
    representative = torch.where(alike, representative, own)
    theirs = bags.starts.index_select(0, representative).index_select(0, owners).add_(places)
    differs = bags.values != bags.values.index_select(0, theirs)
    if bags.weight_bits is not None:
        differs |= bags.weight_bits != bags.weight_bits.index_select(0, theirs)
    if differs.any():
        wrong = owners[differs]
        representative[wrong] = wrong
    return representative


def _elements(starts: Tensor, lengths: Tensor, total: int) -> Tensor:
    """int64 [total]: the places of the ids of bags with these ``starts`` [n] and ``lengths`` [n]."""
    shifts = starts - (lengths.cumsum(0) - lengths)
    places = torch.arange(total, device=starts.device)
    return places + torch.repeat_interleave(shifts, lengths, output_size=total)


def _deduplicated(features: KeyedJaggedTensor, bags: _Bags, representative: Tensor) -> KeyedJaggedTensor:
    """The batch with those bags only that are their own representative [F * B]."""
    shape = (bags.features, bags.stride)
    own = torch.arange(len(representative), device=representative.device)
    distinct = representative == own
    counts = distinct.view(shape).sum(1)
    ids = (bags.lengths * distinct).view(shape).sum(1)
    counts_list, ids_list = torch.stack([counts, ids]).tolist()
    numbers = (distinct.cumsum(0) - 1).index_select(0, representative).view(shape)
    chosen = distinct.nonzero().view(-1)
    places = chosen
    if not bags.shortest == bags.longest == 1:
        starts, lengths = bags.starts.index_select(0, chosen), bags.lengths.index_select(0, chosen)
        places = _elements(starts, lengths, sum(ids_list))
    weights = features.weights_or_none()
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values().index_select(0, places),
        weights=None if weights is None else weights.index_select(0, places),
        lengths=features.lengths().view(-1).index_select(0, chosen),
        stride=bags.stride,
        stride_per_key_per_rank=[[count] for count in counts_list],
        stride_per_key=counts_list,
        length_per_key=ids_list,
        inverse_indices=(features.keys(), numbers - (counts.cumsum(0) - counts)[:, None]),
    )
