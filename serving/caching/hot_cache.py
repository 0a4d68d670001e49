"""Encoder level of MP-Cache (arXiv 2302.10872): final vectors of ids that are asked for often.

The cache is set-associative: an id may lie in the 8 places of one set only, which a few operations on whole
tensors find, however many ids there are. Who gets a place is decided as in TinyLFU (Einziger et al. 2017):
a sketch counts all ids that are looked up (a count-min sketch with conservative update, Estan and Varghese
2002), its counts are halved now and then, and a new id displaces the rarest of its set only if it was asked
for clearly more often. A scan over ids that do not come back displaces nothing.

Legend: T ids, S places (slots), D values in a vector.
"""

import torch
from torch import Tensor

WAYS = 8
"""Places in a set."""

COUNTERS = 8
"""Of a byte each, a place: enough ids are counted that some do not get in."""

PERIOD = 30
"""Counted ids a place, after which counts are halved: TinyLFU's sample."""

FACTOR, MARGIN = 2, 1
"""A new id must have been counted more than FACTOR times as often as the one that it displaces, and MARGIN
more: counts of rare ids are noise, and a change costs time."""

MAP_SHARE = 0.25
"""Most of the memory that a direct map from ids to places may take; it is faster than a search of sets."""

_LARGEST = 255

_FACTORS = (0x9E3779B97F4A7C15 - 2**64, 0xC2B2AE3D27D4EB4F - 2**64)
"""Odd, of the two hashes of the sketch (Fibonacci hashing; Knuth, volume 3, 6.4)."""


class HotVectors:
    """Vectors of hot ids in bounded memory; not safe for several threads at once.

    Args:
        ids: number of ids; each is from 0 to below it.
        dim: D.
        memory_bytes: of vectors, ids, counts and map together.
        device: of all tensors.

    Raises:
        ValueError: the memory does not hold one set; names the least.
    """

    def __init__(self, ids: int, dim: int, memory_bytes: int, device: torch.device) -> None:
        kind = torch.int32 if ids < 2**31 else torch.int64
        place_bytes = 4 * dim + kind.itemsize + COUNTERS
        map_bytes = 4 * ids if 4 * ids <= MAP_SHARE * memory_bytes else 0
        least = WAYS * place_bytes
        if memory_bytes < least:
            raise ValueError(
                f"the encoder level of a cache needs at least {least / 1e6:g} MB, not "
                f"{max(memory_bytes, 0) / 1e6:g}: raise memory_mb."
            )
        self.sets = min((memory_bytes - map_bytes) // least, -(-ids // WAYS))
        self.slots, self.ids = self.sets * WAYS, ids
        self.keys = torch.full((self.slots,), -1, dtype=kind, device=device)
        self.vectors = torch.zeros(self.slots, dim, device=device)
        self.map = torch.full((ids,), -1, dtype=torch.int32, device=device) if map_bytes else None
        cells = min(ids, self.slots * COUNTERS)
        self.counts = torch.zeros(cells, dtype=torch.uint8, device=device)
        self._one_each = cells == ids
        self._counted, self._period = 0, PERIOD * self.slots

    @property
    def memory_bytes(self) -> int:
        """Of everything that is kept."""
        kept = [self.keys, self.vectors, self.counts] + ([] if self.map is None else [self.map])
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    @property
    def holds_all(self) -> bool:
        """Whether there is a place for every id."""
        return self.slots >= self.ids

    def find(self, ids: Tensor) -> Tensor:
        """Places [T] of ids int64 [T]; -1: has none."""
        if self.map is not None:
            return self.map.index_select(0, ids)
        sets = ids % self.sets
        same = self.keys.view(-1, WAYS).index_select(0, sets) == ids[:, None]
        found, way = same.to(torch.uint8).max(1)
        return torch.where(found.bool(), sets * WAYS + way, -1)

    def count(self, ids: Tensor) -> None:
        """Take note that ids int64 [T] were asked for, hits and misses alike; equal ones count each."""
        distinct, times = torch.unique(ids, return_counts=True)
        self._add(distinct, times)
        self._counted += len(ids)
        if self._counted >= self._period:
            self.counts.bitwise_right_shift_(1)
            self._counted //= 2

    def admit(self, ids: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Which ids are to have a place now: an empty one, or that of an id asked for far less often.

        Args:
            ids: int64 [T], distinct, none of them has a place.
            most: so many, those asked for most; None: as many as there are. One a set and call in any case.

        Returns:
            Which of ``ids`` (int64 [A], the hottest first) and the place of each [A], for :meth:`put`.
        """
        times = self._times(ids)
        sets = ids % self.sets
        there = self.keys.view(-1, WAYS).index_select(0, sets).long()
        theirs = self._times(there.flatten().clamp_min(0)).view(there.shape)
        least, way = theirs.masked_fill(there < 0, -1).min(1)
        better = (times > FACTOR * least + MARGIN * (least >= 0)).nonzero().flatten()
        better = better[times[better].argsort(descending=True, stable=True)]
        rank = _ranks(sets[better])
        better = better[rank == 0][:most]
        return better, sets[better] * WAYS + way[better]

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Places for an empty cache's first ids: as :meth:`admit`, for ids [T] that are given hottest first
        and without looking at counts."""
        sets = ids % self.sets
        rank = _ranks(sets)
        kept = (rank < WAYS).nonzero().flatten()
        return kept, sets[kept] * WAYS + rank[kept]

    def put(self, ids: Tensor, places: Tensor, vectors: Tensor) -> None:
        """Store vectors float32 [A, D] of ids [A] in distinct places [A]; what was there is dropped."""
        if self.map is not None:
            before = self.keys[places].long()
            self.map[before[before >= 0]] = -1
            self.map[ids] = places.to(torch.int32)
        self.keys[places] = ids.to(self.keys.dtype)
        self.vectors[places] = vectors

    def start_counts(self, ids: Tensor, times: Tensor) -> None:
        """Begin with what was counted elsewhere: how often distinct ids [T] came, int64 [T].

        Scaled to half of the sample between two halvings, so that what is seen from now on soon weighs as
        much; at least 1 each.
        """
        total = max(int(times.sum()), 1)
        scaled = (times.double() * (self._period / 2 / total)).clamp(1, _LARGEST)
        self._add(ids, scaled.long())
        self._counted = self._period // 2

    def _times(self, ids: Tensor) -> Tensor:
        """Estimated counts int32 [T]: never below the true ones since the last halving, up to 255."""
        return self.counts[self._cells(ids)].amin(0).int()

    def _add(self, ids: Tensor, times: Tensor) -> None:
        cells = self._cells(ids)
        now = (self.counts[cells].amin(0).long() + times).clamp_max(_LARGEST).to(torch.uint8)
        # Conservative: a cell is raised to the estimate, so that an id that shares one cell adds nothing.
        self.counts.scatter_reduce_(0, cells.flatten(), now.expand(len(cells), -1).flatten(), "amax")

    def _cells(self, ids: Tensor) -> Tensor:
        """int64 [1 or 2, T]: where an id is counted."""
        if self._one_each:
            return ids[None]
        mixed = torch.stack([ids * factor for factor in _FACTORS])
        return (mixed >> 20 & (1 << 43) - 1) % len(self.counts)


def _ranks(sets: Tensor) -> Tensor:
    """How many earlier entries of ``sets`` [T] are equal to each: int64 [T]."""
    order = sets.argsort(stable=True)
    ordered = sets[order]
    at = torch.arange(len(sets), device=sets.device)
    begins = torch.ones_like(sets, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    rank = torch.empty_like(at)
    rank[order] = at - torch.where(begins, at, 0).cummax(0).values
    return rank
