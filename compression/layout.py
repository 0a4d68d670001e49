"""Where the blocks of a call lie in one tensor.

A block is what one peer gets of one table: rows of ``dim`` values, ``stride`` elements apart. P peers,
T tables, P*T blocks in order of peer, then table; any of them may be empty.
"""

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tightrec.kernels.format import MAX_BLOCK_VALUES, MAX_DIM, STRIP_VALUES, TILE_VALUES
from tightrec.kernels.job import Totals


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block: ``rows`` rows of ``dim`` values in a tensor."""

    offset: int
    """Element at which the first row starts."""
    rows: int
    """Number of rows; 0 for an empty block."""
    stride: int
    """Elements from one row to the next."""
    dim: int
    """Values in a row, 1 to 2,048."""

    def __post_init__(self) -> None:
        for name in ("offset", "rows", "stride", "dim"):
            # Tensors and numpy integers become Python's: sums over blocks must not change them in place.
            object.__setattr__(self, name, _integer(getattr(self, name), f"a block's {name}"))


class Layout:
    """The blocks of an encode or decode call; immutable.

    ``Layout.flat`` and ``Layout.columns`` build the usual ones, ``Layout.of_cells`` one of arrays, as an
    exchange does in every step; the constructor takes any blocks, which must not overlap in a tensor that is
    decoded into.

    Args:
        shape: of the values tensor, which must be contiguous.
        blocks: for each of P peers its T blocks.
        tables: the tables' names, for messages; default "0", "1", ...

    Raises:
        ValueError: a block does not fit the tensor or the format's limits.
    """

    shape: tuple[int, ...]
    tables: tuple[str, ...]
    totals: Totals
    """Sums over the blocks."""

    def __init__(
        self, shape: Sequence[int], blocks: Sequence[Sequence[Block]], tables: Sequence[str] = ()
    ) -> None:
        counts = {len(row) for row in blocks}
        if len(counts) != 1:
            raise ValueError(
                f"a layout needs at least one peer and the same number of tables for each, not "
                f"{[len(row) for row in blocks]}"
            )
        names = _names(tables, counts.pop())
        elements = torch.Size(shape).numel()
        for peer, row in enumerate(blocks):
            for name, block in zip(names, row, strict=True):
                _check(block, elements, f"block of table {name!r} for peer {peer}")
        cells = [[(b.offset, b.rows, b.stride, b.dim) for b in row] for row in blocks]
        self._fill(shape, np.array(cells, dtype=np.int64).reshape(len(blocks), len(names), 4), names)

    @classmethod
    def of_cells(cls, shape: Sequence[int], cells: np.ndarray, tables: Sequence[str] = ()) -> "Layout":
        """A layout of int64 [P, T, 4]: offset, rows, stride and dim of every block.

        Costs tens of microseconds where as many ``Block`` cost a millisecond.

        Raises:
            ValueError: as the constructor.
        """
        names = _names(tables, cells.shape[1])
        elements = torch.Size(shape).numel()
        offset, rows, stride, dim = np.moveaxis(cells, -1, 0)
        end = offset + (rows - 1) * stride + dim
        bad = (dim < 1) | (dim > MAX_DIM) | (rows < 0) | (rows * dim > MAX_BLOCK_VALUES)
        bad |= ((rows > 1) & (stride < dim)) | ((rows > 0) & ((offset < 0) | (end > elements)))
        if bad.any():
            peer, table = (int(place) for place in np.argwhere(bad)[0])
            values = dict(zip(("offset", "rows", "stride", "dim"), cells[peer, table].tolist(), strict=True))
            _check(Block(**values), elements, f"block of table {names[table]!r} for peer {peer}")
        layout = cls.__new__(cls)
        layout._fill(shape, cells, names)
        return layout

    def _fill(self, shape: Sequence[int], cells: np.ndarray, tables: tuple[str, ...]) -> None:
        self.shape, self.tables, self.cells = tuple(shape), tables, cells
        self._kept: dict[Hashable, Any] = {}
        last = self._table[-1].tolist()
        self.totals = Totals(
            peers=cells.shape[0],
            tables=cells.shape[1],
            tiles=last[4],
            strips=last[5],
            rows=last[6],
            values=last[7],
        )

    @classmethod
    def flat(cls, rows: Sequence[Sequence[int]], dims: Sequence[int], tables: Sequence[str] = ()) -> "Layout":
        """Blocks back to back in a flat tensor, peer after peer.

        Args:
            rows: [P][T] rows of every block.
            dims: [T] values in a row of every table.
            tables: their names.
        """
        offset = 0
        peers = []
        dims = [_integer(dim, "a table's dim") for dim in dims]
        for peer, row in enumerate(rows):
            counts = [_integer(count, f"a number of rows of peer {peer}") for count in row]
            if len(counts) != len(dims):
                raise ValueError(
                    f"peer {peer} has rows for {len(counts)} tables, but there are {len(dims)} dims"
                )
            blocks = []
            for count, dim in zip(counts, dims, strict=True):
                blocks.append(Block(offset=offset, rows=count, stride=dim, dim=dim))
                offset += count * dim
            peers.append(tuple(blocks))
        return cls((offset,), peers, tables)

    @classmethod
    def columns(cls, rows: Sequence[int], dims: Sequence[int], tables: Sequence[str] = ()) -> "Layout":
        """Runs of rows and columns of a matrix [sum(rows), sum(dims)].

        Args:
            rows: [P] rows of every peer, one run after another.
            dims: [T] columns of every table, side by side.
            tables: their names.
        """
        dims = [_integer(dim, "a table's dim") for dim in dims]
        rows = [_integer(count, "a number of rows") for count in rows]
        width = sum(dims)
        starts = [sum(dims[:table]) for table in range(len(dims))]
        peers, first = [], 0
        for count in rows:
            row = tuple(
                Block(offset=first * width + start, rows=count, stride=width, dim=dim)
                for start, dim in zip(starts, dims, strict=True)
            )
            peers.append(row)
            first += count
        return cls((first, width), peers, tables)

    def on(self, device: torch.device) -> Tensor:
        """The block table that kernels read, int64 [P*T + 1, 8], on a device; copied there once."""
        return self.kept(("blocks", device), lambda: torch.from_numpy(self._table).to(device))

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returned the first time this key was asked for: lives as long as the layout."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @cached_property
    def blocks(self) -> tuple[tuple[Block, ...], ...]:
        """[P][T] the blocks."""
        return tuple(
            tuple(Block(offset=o, rows=r, stride=s, dim=d) for o, r, s, d in row)
            for row in self.cells.tolist()
        )

    @cached_property
    def _table(self) -> np.ndarray:
        """int64 [P*T + 1, 8]: rows of ``kernels.format.Column``, then the totals."""
        cells = self.cells.reshape(-1, 4)
        rows = cells[:, 1]
        values = rows * cells[:, 3]
        table = np.zeros((len(cells) + 1, 8), dtype=np.int64)
        table[:-1, :4] = cells
        for column, counts in enumerate(
            (-(-values // TILE_VALUES), -(-values // STRIP_VALUES), rows, values)
        ):
            np.cumsum(counts, out=table[1:, 4 + column])
        return table


def _names(tables: Sequence[str], count: int) -> tuple[str, ...]:
    names = tuple(tables) or tuple(str(table) for table in range(count))
    if len(names) != count:
        raise ValueError(f"{len(names)} table names for {count} tables of each peer")
    if len(set(names)) < count:
        raise ValueError(f"two tables have the same name: {', '.join(names)}")
    return names


def _integer(number: object, what: str) -> int:
    try:
        return operator.index(number)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{what} is {number!r}; give an integer") from None


def _check(block: Block, elements: int, where: str) -> None:
    """Refuse a block outside the tensor or the format's limits."""
    if not 1 <= block.dim <= MAX_DIM:
        raise ValueError(f"{where}: rows of {block.dim} values; a row holds 1 to {MAX_DIM}")
    if block.rows < 0 or block.rows * block.dim > MAX_BLOCK_VALUES:
        raise ValueError(f"{where}: {block.rows} rows of {block.dim}; a block holds 0 to 2^31 - 1 values")
    if block.rows > 1 and block.stride < block.dim:
        raise ValueError(
            f"{where}: rows of {block.dim} values overlap, they start {block.stride} elements apart"
        )
    end = block.offset + (block.rows - 1) * block.stride + block.dim
    if block.rows and not 0 <= block.offset <= end <= elements:
        raise ValueError(f"{where}: elements {block.offset} to {end} of a tensor of {elements}")
