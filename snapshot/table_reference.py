"""fbgemm's lookup of low-precision tables in plain torch, bit for bit as on a CPU.

For each id of a bag in turn, the operator adds the row's bias to the sum, then code times scale, each rounded
to float32; fp16 and fp32 rows are just added. A mean multiplies the sum by the rounded 1 / size. The operator
has a fused multiply-add, but a code of 8 bits times a scale of 11 is exact in float32: fused or not is the
same. Read from fbgemm's EmbeddingSpMDM.cc, EmbeddingSpMDMNBit.cc and EmbeddingSpMDMAutovec.cc, which do the
same at every vector width.
"""

from typing import Literal

import torch
from torch import Tensor

from tightrec.snapshot.packed import check_shape, stored_floats, stored_integers


def reference_lookup(
    tables: list[tuple[str, int, Tensor]], ids: Tensor, offsets: Tensor, pooling: Literal["sum", "mean"]
) -> Tensor:
    """Looks up B bags of each of F features as Lookup does.

    Args:
        tables: (type, D, uint8 [R, row_bytes]) of every feature; id R gives zeros.
        ids: int64 [sum of sizes].
        offsets: int64 [F*B+1]; bag f*B+b is feature f of row b.
        pooling: "sum" or "mean".

    Returns:
        float32 [B, F*D].

    Raises:
        ValueError: Data that do not have their type's shape.
    """
    bags = (len(offsets) - 1) // len(tables)
    pooled = []
    for feature, (kind, dim, data) in enumerate(tables):
        check_shape(data, kind, dim)
        with_overflow = torch.cat([data, torch.zeros(1, data.shape[1], dtype=torch.uint8)])
        pooled.append(
            _one_table(
                with_overflow, kind, dim, ids, offsets[feature * bags : (feature + 1) * bags + 1], pooling
            )
        )
    return torch.cat(pooled, dim=1)


def _one_table(data: Tensor, kind: str, dim: int, ids: Tensor, offsets: Tensor, pooling: str) -> Tensor:
    sizes = offsets.diff()
    total = torch.zeros(len(sizes), dim)
    for place in range(int(sizes.max()) if len(sizes) else 0):
        bags = (sizes > place).nonzero()[:, 0]
        rows = data[ids[offsets[bags] + place]]
        if kind in ("fp32", "fp16"):
            total[bags] += stored_floats(rows, kind)
        else:
            codes, scale, bias = stored_integers(rows, kind)
            total[bags] = (total[bags] + bias) + codes.float() * scale
    if pooling == "mean":
        total *= torch.where(sizes > 0, 1.0 / sizes.float(), 0.0)[:, None]
    return total
