"""Which columns of which feature each rank looks up and sends, and where they lie in a step's tensors.

A *part* is all tables of one sharding type. A *slot* is the columns of one feature that one source holds.
A *side* of a transfer says where each peer's block of each slot lies in a flat tensor, as int64 cells
(offset, rows, stride, dim). P peers, T slots of a source; sources with fewer slots than others get empty
ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tightrec.compression.blocks import packed_cells

Kind = Literal["local", "spread", "sum", "two_level"]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The columns of one feature that one source holds."""

    name: str
    """In the pooled output: the feature, or FEATURE@TABLE where several tables have it."""
    feature: str
    table: str
    dim: int
    """Number of columns."""
    column: int
    """First of them in the table."""
    mean: bool
    """Whether the sums must be divided by the size of the bag after they have arrived."""

    @property
    def label(self) -> str:
        """A name that no other slot of its source has."""
        return f"{self.name}:{self.column}"


@dataclass(frozen=True, kw_only=True)
class Peers:
    """The ranks of a process group, from the view of one of them."""

    group: Any
    rank: int
    """Of this process in the group."""
    size: int
    ranks: tuple[int, ...]
    """Their ranks in the job, for messages."""

    @property
    def others(self) -> list[int]:
        """Every member but this one."""
        return [peer for peer in range(self.size) if peer != self.rank]


@dataclass(frozen=True, kw_only=True)
class Part:
    """All tables of one sharding type.

    ``spread`` (table- and column-wise): each source sends its columns of everybody's rows to everybody.
    ``sum`` (row-wise): every rank has partial sums of all slots. ``two_level`` (table-row-wise, grid): sums
    inside a machine, then spread over machines. ``local`` (data-parallel): nothing travels.
    """

    sharding_type: str
    kind: Kind
    sources: tuple[tuple[Slot, ...], ...]
    """Slots by rank (spread), by machine (two_level), or one entry (sum, local)."""
    source: int
    """Which source this rank belongs to."""
    peers: tuple[Peers, ...]
    """Members of each leg: none, one, or first inside the machine and then across machines."""

    @property
    def held(self) -> tuple[Slot, ...]:
        """Slots that this rank looks up, in the order of its columns."""
        return self.sources[self.source]

    @property
    def received(self) -> list[Slot]:
        """Slots of this rank's own rows, in the order in which they lie once they have arrived."""
        return [slot for slots in self.sources for slot in slots]


@dataclass(frozen=True, kw_only=True)
class Side:
    """Where the blocks of a transfer lie in a flat tensor."""

    cells: np.ndarray
    """int64 [P, T, 4]: offset, rows, stride, dim."""
    elements: int
    """Length of the tensor."""


@dataclass(frozen=True, kw_only=True)
class LegStep:
    """One leg's geometry in one step; backward goes the other way round.

    ``sum`` legs: ``near`` holds the partial sums of all peers, one after another; ``total`` elements each.
    """

    far: Side
    """In the lookup's output (or, in the second leg, in the sums of the first)."""
    near: Side
    """Where the blocks arrive."""
    combine: Literal["spread", "sum"]
    total: int
    """Elements of the leg's result."""


def widest(part: Part) -> int:
    """T: slots of the source that has most of them."""
    return max(len(slots) for slots in part.sources)


def held_cells(part: Part, held_rows: np.ndarray) -> np.ndarray:
    """int64 [P, T, 4]: where each rank's rows of the held slots lie in the lookup's output."""
    return _matrix(part, held_rows)[0].cells


def leg_steps(part: Part, held_rows: np.ndarray, own_rows: Sequence[int]) -> list[LegStep]:
    """The legs of a part in a step.

    Args:
        part: other than ``local``.
        held_rows: int64 [ranks of the job, slots held]: rows of the lookup's output for each rank, in the
            order in which they lie there (two_level: by place in the machine, then machine).
        own_rows: rows of this rank in each received slot.
    """
    far, width, height = _matrix(part, held_rows)
    if part.kind == "spread":
        near, total = _arrived(part, own_rows)
        return [LegStep(far=far, near=near, combine="spread", total=total)]
    if part.kind == "sum":
        return [_summed(far, part.peers[0].rank, part.peers[0].size)]
    inner, outer = part.peers
    # Rows for one place in the machines lie together: each inner peer adds up those of its place everywhere.
    grouped = held_rows.reshape(inner.size, outer.size, -1).sum(axis=1)
    sums = _summed(_blocks(grouped, _dims(part.held), width, height), inner.rank, inner.size)
    mine = held_rows.reshape(inner.size, outer.size, -1)[inner.rank]
    dims = np.array(_dims(part.held), dtype=np.int64).reshape(-1)
    cells = np.zeros((outer.size, widest(part), 4), dtype=np.int64)
    cells[:, :, 3] = cells[:, :, 2] = 1
    if len(dims):
        starts = sums.near.cells[0, :, 0]
        before = np.cumsum(mine, axis=0) - mine
        cells[:, : len(dims), 0] = starts + before * dims
        cells[:, : len(dims), 1] = mine
        cells[:, : len(dims), 2] = cells[:, : len(dims), 3] = dims
    near, total = _arrived(part, own_rows)
    cross = LegStep(far=Side(cells=cells, elements=sums.total), near=near, combine="spread", total=total)
    return [sums, cross]


def _dims(slots: Sequence[Slot]) -> list[int]:
    return [slot.dim for slot in slots]


def _matrix(part: Part, held_rows: np.ndarray) -> tuple[Side, int, int]:
    """Blocks of the lookup's output [height, width]; padded to T slots in spread parts."""
    dims = _dims(part.held)
    width = sum(dims)
    height = int(held_rows.sum(axis=0).max(initial=0))
    pad = widest(part) if part.kind == "spread" else len(dims)
    return _blocks(held_rows, dims, width, height, pad), width, height


def _blocks(rows: np.ndarray, dims: Sequence[int], width: int, height: int, pad: int = 0) -> Side:
    """Runs of rows [P, T] and of columns in a matrix."""
    count = len(dims)
    cells = np.zeros((rows.shape[0], max(pad, count), 4), dtype=np.int64)
    cells[:, :, 2:] = 1
    if count:
        sizes = np.array(dims, dtype=np.int64)
        before = np.cumsum(rows, axis=0) - rows
        cells[:, :count, 0] = before * width + (np.cumsum(sizes) - sizes)
        cells[:, :count, 1] = rows
        cells[:, :count, 2] = width
        cells[:, :count, 3] = sizes
    return Side(cells=cells, elements=height * width)


def _arrived(part: Part, own_rows: Sequence[int]) -> tuple[Side, int]:
    """Own rows of every source's slots back to back."""
    pad = widest(part)
    cells = np.zeros((len(part.sources), pad, 4), dtype=np.int64)
    cells[:, :, 2:] = 1
    rows = iter(own_rows)
    offset = 0
    for source, slots in enumerate(part.sources):
        for place, slot in enumerate(slots):
            count = next(rows)
            cells[source, place] = (offset, count, slot.dim, slot.dim)
            offset += count * slot.dim
    return Side(cells=cells, elements=offset), offset


def _summed(far: Side, own: int, peers: int) -> LegStep:
    """Every peer's partial sums of the own rows, one copy after another."""
    cells = np.repeat(packed_cells(far.cells[own])[None], peers, axis=0)
    total = int((cells[0, :, 1] * cells[0, :, 3]).sum())
    cells[:, :, 0] += total * np.arange(peers, dtype=np.int64)[:, None]
    near = Side(cells=cells, elements=total * peers)
    return LegStep(far=far, near=near, combine="sum", total=total)
