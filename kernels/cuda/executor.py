"""The seam between the host side of the kernels and whatever runs them."""

from collections.abc import Sequence
from typing import Protocol, TypeAlias

from torch import Tensor

Argument: TypeAlias = Tensor | int
"""A tensor is passed as its data pointer, an int as a ``long long`` (0 also as a null pointer)."""


class Executor(Protocol):
    """Runs kernels by name: CuPy on a GPU, a test-only shim on the CPU."""

    def launch(
        self, kernel_name: str, grid: int, block: int, args: Sequence[Argument], shared_bytes: int = 0
    ) -> None:
        """Queue one launch on the current stream, without waiting for it.

        Launches of one executor run one after another. Consecutive launches may be given the identical
        ``args`` object, so that an executor can keep the packed arguments.

        Args:
            kernel_name: the ``extern "C"`` name, with the dtype's suffix where the kernel has one.
            grid: thread blocks, at least 1.
            block: threads in a block.
            args: the kernel's parameters, in order.
            shared_bytes: dynamic shared memory of a block.
        """
