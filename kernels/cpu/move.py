"""Copying float32 blocks from one tensor to another."""

import numpy as np

from tightrec.kernels.cpu.jit import loop


@loop
def move_blocks(source: np.ndarray, taken: np.ndarray, target: np.ndarray, given: np.ndarray) -> None:
    """Copy block i of ``source`` to block i of ``target``, all flat float32.

    ``taken`` and ``given`` are int64 [N, 4]: offset, rows, stride and dim; rows and dim agree.
    """
    for block in range(taken.shape[0]):
        rows, dim = taken[block, 1], taken[block, 3]
        start, step = taken[block, 0], taken[block, 2]
        to, pace = given[block, 0], given[block, 2]
        if step == dim and pace == dim:
            target[to : to + rows * dim] = source[start : start + rows * dim]
            continue
        for row in range(rows):
            for place in range(dim):
                target[to + row * pace + place] = source[start + row * step + place]
