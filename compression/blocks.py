"""Blocks of float32 values that are copied as they are, beside those that are encoded.

A block is offset, rows, stride and dim in elements of a flat tensor (:mod:`tightrec.compression.layout`).
"""

import numpy as np
import torch
from torch import Tensor


def copy_blocks(source: Tensor, taken: np.ndarray, target: Tensor, given: np.ndarray) -> None:
    """Copy block i of ``source`` to block i of ``target``.

    Args:
        source: flat contiguous float32.
        taken: int64 [N, 4]: offset, rows, stride and dim of each block in it.
        target: flat contiguous float32.
        given: the same in the target; rows and dim as in ``taken``.
    """
    assert np.array_equal(taken[:, 1::2], given[:, 1::2]), "blocks of different shapes"
    if source.device.type == "cpu":
        # Imported here: it compiles, and a GPU rank never needs it.
        from tightrec.kernels.cpu.move import move_blocks

        move_blocks(source.numpy(), taken, target.numpy(), given)
        return
    for (offset, rows, stride, dim), (to, _, pace, _) in zip(taken.tolist(), given.tolist(), strict=True):
        if rows:
            view = torch.as_strided(target, (rows, dim), (pace, 1), target.storage_offset() + to)
            view.copy_(torch.as_strided(source, (rows, dim), (stride, 1), source.storage_offset() + offset))


def packed_cells(cells: np.ndarray) -> np.ndarray:
    """The same blocks back to back: int64 [N, 4] from offset 0 on, in order."""
    packed = cells.copy()
    packed[:, 2] = cells[:, 3]
    sizes = cells[:, 1] * cells[:, 3]
    packed[:, 0] = np.cumsum(sizes) - sizes
    return packed


def is_packed(cells: np.ndarray) -> bool:
    """Whether blocks [N, 4] lie back to back from offset 0 on, in order."""
    filled = cells[cells[:, 1] > 0]
    sizes = filled[:, 1] * filled[:, 3]
    return bool((filled[:, 2] == filled[:, 3]).all() and (filled[:, 0] == np.cumsum(sizes) - sizes).all())


def values_of(cells: np.ndarray) -> list[int]:
    """[P] values of each peer's blocks, of int64 [P, T, 4]."""
    counts: list[int] = (cells[..., 1] * cells[..., 3]).sum(axis=-1).tolist()
    return counts
