"""A block's absolute error bound from what its table was given (docs/FORMAT.md, section 5)."""

import torch
from torch import Tensor

from tightrec.kernels.format import MAX_BOUND, MIN_BOUND, TILE_GROUPS, TILE_VALUES, BoundKind
from tightrec.kernels.reference.bits import pad_rows


def resolve(values: Tensor, bound: Tensor, kind: BoundKind) -> Tensor:
    """The float32 bound of one block.

    Args:
        values: the block's values, flat, any of the three dtypes.
        bound: float32 scalar: the bound itself, or a share of the block's range or RMS.
        kind: what ``bound`` is measured against.

    Returns:
        float32 scalar between 2^-126 and 2^125.
    """
    resolved = bound if kind == BoundKind.ABSOLUTE else _relative(values.to(torch.float32), bound, kind)
    # A NaN (an overflowing product on both ends) compares false and becomes the smallest bound.
    if not bool(resolved >= MIN_BOUND):
        return torch.tensor(MIN_BOUND, dtype=torch.float32)
    return resolved.clamp(max=MAX_BOUND)


def _relative(x: Tensor, share: Tensor, kind: BoundKind) -> Tensor:
    """A share of the range or root mean square of the finite values."""
    finite = torch.isfinite(x)
    if not bool(finite.any()):
        return torch.zeros((), dtype=torch.float32)
    if kind == BoundKind.RANGE:
        known = x[finite]
        return share * known.max() - share * known.min()
    squares = torch.where(finite, x, torch.zeros_like(x)).to(torch.float64) ** 2
    mean = _ordered_sum(squares) / finite.sum().to(torch.float64)
    return share * mean.sqrt().to(torch.float32)


def _ordered_sum(squares: Tensor) -> Tensor:
    """Sum in the one order that every backend follows, so that all find the same bits.

    Within a tile each of 32 lanes adds its value of the 32 groups in order, then lanes are added as a
    tree; the tiles' sums are added the same way, lane l taking tiles l, l + 32, l + 64, ...
    """
    tiles = pad_rows(squares, TILE_VALUES).view(-1, TILE_GROUPS, 32)
    sums = _tree(_in_order(tiles.transpose(0, 1)))
    return _tree(_in_order(pad_rows(sums, 32)[:, None])).view(())


def _in_order(parts: Tensor) -> Tensor:
    """Sum over the first dimension, one addition after another."""
    total = torch.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return total


def _tree(lanes: Tensor) -> Tensor:
    """Sum of the last dimension of 32 by halves."""
    for distance in (16, 8, 4, 2, 1):
        lanes = lanes[..., :distance] + lanes[..., distance : 2 * distance]
    return lanes[..., 0]
