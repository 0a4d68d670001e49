"""How the vectors of a row are combined, without torchrec: training and serving share it.

Legend: B rows, F sparse features, D embedding dim, N = F + 1 vectors a row (the first from the dense part).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DotInteraction(nn.Module):
    """All pairwise dot products of a row's N vectors, after the dense vector (Naumov et al. 2019).

    The values are those of ``torchrec.models.dlrm.InteractionArch``. The upper triangle is taken by one
    ``index_select`` on the flattened products: its backward writes each position once, where the
    backward of the two-index gather runs a serial accumulating scatter on CPU.

    Example: dense vector d and sparse vectors a, b give the columns (d, d.a, d.b, a.b).
    """

    pairs: Tensor

    def __init__(self, vectors: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.vectors = vectors
        first, second = torch.triu_indices(vectors, vectors, offset=1, device=device)
        self.register_buffer("pairs", first * vectors + second, persistent=False)

    def forward(self, dense: Tensor, sparse: Sequence[Tensor]) -> Tensor:
        """Map [B, D] and F times [B, D] to [B, D + N (N - 1) / 2], N = F + 1."""
        return self.mix(dense, side_by_side(dense, sparse))

    def mix(self, dense: Tensor, both: Tensor) -> Tensor:
        """The same of the dense vector [B, D] and all N vectors side by side [B, N * D]."""
        vectors = both.view(dense.shape[0], self.vectors, dense.shape[1])
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        return torch.cat((dense, products), dim=1)


def side_by_side(dense: Tensor, sparse: Sequence[Tensor]) -> Tensor:
    """[B, N * D]; autocast has made ``dense`` bfloat16, and cat would make it float32 again."""
    return torch.cat([dense, *(column.to(dense.dtype) for column in sparse)], dim=1)
