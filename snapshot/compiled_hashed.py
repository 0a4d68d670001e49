"""Deep hash embeddings that torch.export and TorchScript can write to a file, bit for bit those of hashed.py.

Which ids a feature has, and how many distinct ones, is known only from the values of a batch. A file holds no
loop over them and no slice between numbers that were read from a tensor, but it holds masks: every feature
picks its own ids out of all by comparing.

Legend: B rows, F sparse features, H of them with a deep hash embedding, D embedding dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tightrec.snapshot.hashed import HashedLookup, Tap
from tightrec.snapshot.model import Bags


class PlainBags(Bags):
    """Takes the ids and offsets of some of F features out of those of all."""

    def __init__(self, places: Sequence[int], sparse: int) -> None:
        super().__init__(places, sparse, torch.device("cpu"))
        self._sparse = sparse
        self._wanted = torch.zeros(sparse, dtype=torch.bool)
        self._wanted[list(places)] = True

    def __call__(self, ids: Tensor, offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """As :class:`Bags`."""
        if self.all:
            return ids, offsets
        owners = owners_of(ids, offsets, self._sparse, rows)
        sizes = offsets.diff().view(self._sparse, rows).index_select(0, self.index).flatten()
        return ids[self._wanted[owners]], functional.pad(sizes.cumsum(0), (1, 0))


class PlainHashes(HashedLookup):
    """Pooled deep hash embeddings of plain operators; never asks ``vectors``."""

    def forward(self, ids: Tensor, offsets: Tensor, rows: int, tap: Tap | None = None) -> Tensor:
        """As :meth:`HashedLookup.forward`; ``tap`` is not called."""
        count = len(self.names)
        every = self.pairs(ids, owners_of(ids, offsets, count, rows))
        pairs, numbers = torch.unique(every, return_inverse=True)
        vectors = torch.zeros(pairs.shape[0], self.dim)
        for feature in range(count):
            start, stop = self.limits[2 * feature], self.limits[2 * feature + 1]
            # The overflow id, at `stop`, keeps its zeros.
            mine = (pairs >= start) & (pairs < stop)
            # Not forward(): it works in pieces, of which a file would keep the number.
            codes = self.hashes[feature].codes_at_once(pairs[mine] - start)
            vectors = vectors.masked_scatter(mine[:, None], self.decode(feature, codes))
        return self.pooled(numbers, vectors, offsets, rows)


def owners_of(ids: Tensor, offsets: Tensor, count: int, rows: int) -> Tensor:
    """Number of the feature, of ``count``, that each of ``ids`` is of."""
    ends = offsets[torch.arange(1, count + 1) * rows]
    return torch.bucketize(torch.arange(ids.shape[0]), ends, right=True)
