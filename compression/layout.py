"""Where the blocks of a call lie in one tensor.

A block is what one peer gets of one table: rows of ``dim`` values, ``stride`` elements apart. P peers,
T tables, P*T blocks in order of peer, then table; any of them may be empty.
"""

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

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


@dataclass(frozen=True, eq=False)
class Layout:
    """The blocks of an encode or decode call.

    ``Layout.flat`` and ``Layout.columns`` build the usual ones; the constructor takes any blocks, which must
    not overlap in a tensor that is decoded into.

    Args:
        shape: of the values tensor, which must be contiguous.
        blocks: for each of P peers its T blocks.
        tables: the tables' names, for messages; default "0", "1", ...

    Raises:
        ValueError: a block does not fit the tensor or the format's limits.
    """

    shape: tuple[int, ...]
    blocks: tuple[tuple[Block, ...], ...]
    tables: tuple[str, ...] = ()
    totals: Totals = field(init=False)
    """Sums over the blocks."""
    _kept: dict[Hashable, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        counts = {len(blocks) for blocks in self.blocks}
        if len(counts) != 1:
            raise ValueError(
                f"a layout needs at least one peer and the same number of tables for each, not "
                f"{[len(blocks) for blocks in self.blocks]}"
            )
        if not self.tables:
            object.__setattr__(self, "tables", tuple(str(table) for table in range(counts.pop())))
        elif counts != {len(self.tables)}:
            raise ValueError(f"{len(self.tables)} table names for {counts.pop()} tables of each peer")
        if len(set(self.tables)) < len(self.tables):
            raise ValueError(f"two tables have the same name: {', '.join(self.tables)}")
        elements = torch.Size(self.shape).numel()
        for peer, blocks in enumerate(self.blocks):
            for name, block in zip(self.tables, blocks, strict=True):
                _check(block, elements, f"block of table {name!r} for peer {peer}")
        last = self._table[-1]
        totals = Totals(
            peers=len(self.blocks),
            tables=len(self.tables),
            tiles=last[4],
            strips=last[5],
            rows=last[6],
            values=last[7],
        )
        object.__setattr__(self, "totals", totals)

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
        return cls((offset,), tuple(peers), tuple(tables))

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
        return cls((first, width), tuple(peers), tuple(tables))

    def on(self, device: torch.device) -> Tensor:
        """The block table that kernels read, int64 [P*T + 1, 8], on a device; copied there once."""
        return self.kept(("blocks", device), lambda: torch.tensor(self._table, dtype=torch.int64).to(device))

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returned the first time this key was asked for: lives as long as the layout."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @cached_property
    def _table(self) -> list[list[int]]:
        """Rows of ``kernels.format.Column``, then the totals."""
        table = []
        tiles = strips = rows = values = 0
        for block in (block for blocks in self.blocks for block in blocks):
            table.append([block.offset, block.rows, block.stride, block.dim, tiles, strips, rows, values])
            count = block.rows * block.dim
            tiles += -(-count // TILE_VALUES)
            strips += -(-count // STRIP_VALUES)
            rows += block.rows
            values += count
        return [*table, [0, 0, 0, 0, tiles, strips, rows, values]]


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
