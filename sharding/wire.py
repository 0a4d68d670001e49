"""How the blocks of one leg travel in one direction: plain float32 or a fixed-rate format.

A :class:`Wire` serves one direction of one leg for the life of a module; a :class:`Call` is one use of it.
Error-bounded frames are a third kind, in :mod:`tightrec.sharding.framed_wire`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from tightrec.compression.blocks import copy_blocks, is_packed, packed_cells, values_of
from tightrec.compression.policy.config import Direction
from tightrec.sharding.config import CodecName
from tightrec.sharding.fixed_wire import FixedCodec
from tightrec.sharding.measures import Measures
from tightrec.sharding.parts import Peers, Side
from tightrec.sharding.transport import Buffers, all_to_all, floats


@dataclass(frozen=True, kw_only=True)
class Route:
    """What travels between whom, the same in every step."""

    peers: Peers
    direction: Direction
    sent: tuple[tuple[str, ...], ...]
    """[P][T] labels of the slots sent to each peer; one entry where all get the same (``broadcast``)."""
    sent_tables: tuple[tuple[str, ...], ...]
    """The same, by table."""
    received: tuple[tuple[str, ...], ...]
    """[P][T] labels of the slots that each peer sends."""
    broadcast: bool = False
    """Whether every peer gets the same blocks: the gradients of row-wise tables."""
    share: float = 1.0
    """Part of the error bound that this leg may use."""


class Call(Protocol):
    """One transfer on its way: ``begin`` made it, then these in order."""

    sizes: list[int] | None
    """Bytes for each peer, to be told to it before ``post``; None: it knows them."""

    def post(self, incoming: Sequence[int] | None, target: Tensor) -> None:
        """Start the all-to-all; ``incoming``: bytes from each peer, where they were told.

        ``target``: contiguous float32 of ``given.elements``, not to be read before ``finish``.
        """

    def finish(self) -> None:
        """Wait, and write the blocks of all peers, this rank's own included, to the target."""


class Wire(Protocol):
    """One direction of one leg."""

    def begin(self, source: Tensor, taken: Side, given: Side, what: str) -> Call:
        """Take the blocks out of flat ``source``.

        Args:
            source: contiguous float32 of ``taken.elements``; may change only after ``finish``.
            taken: where each peer's blocks lie; one peer where the route is a broadcast.
            given: where the blocks of each peer will be written.
            what: for messages, such as "the forward exchange of step 7".
        """


class PlainWire:
    """float32 as it is, or in one of torchrec's fixed-rate formats; sizes follow from the rows.

    Args:
        route: between whom.
        codec: ``none`` or a fixed-rate one.
        unit: values that every run is a multiple of, over which fp8 shares a scale.
        buffers: to borrow from.
        measures: to add to.
    """

    def __init__(
        self, route: Route, codec: CodecName, unit: int, buffers: Buffers, measures: Measures
    ) -> None:
        self.route = route
        self.buffers = buffers
        self.measures = measures
        self.codec = None if codec == "none" else FixedCodec(codec, route.direction, unit, buffers.device)

    def begin(self, source: Tensor, taken: Side, given: Side, what: str) -> Call:
        """See :class:`Wire`."""
        return _PlainCall(self, source, taken, given, what)


class _PlainCall:
    sizes: list[int] | None = None

    def __init__(self, wire: PlainWire, source: Tensor, taken: Side, given: Side, what: str) -> None:
        self._wire, self._given, self._what = wire, given, what
        self._borrowed: list[Tensor] = []
        peers = wire.route.peers
        cells = taken.cells
        if wire.route.broadcast:
            cells = np.repeat(cells, peers.size, axis=0)
        self._counts = values_of(cells)
        rows = cells.reshape(-1, 4)
        if is_packed(rows):
            flat = source[: sum(self._counts)]
        else:
            flat = floats(self._borrow(4 * sum(self._counts)), sum(self._counts))
            copy_blocks(source, rows, flat, packed_cells(rows))
        self._sent = flat
        if wire.codec is not None:
            room = self._borrow(sum(wire.codec.encoded_bytes(self._counts)))
            self._sent = wire.codec.encode(flat, self._counts, room)
        self._incoming = values_of(given.cells)

    def _borrow(self, size: int) -> Tensor:
        self._borrowed.append(self._wire.buffers.take(size))
        return self._borrowed[-1]

    def post(self, incoming: Sequence[int] | None, target: Tensor) -> None:
        codec, total = self._wire.codec, sum(self._incoming)
        sizes = self._counts, self._incoming
        rows = self._given.cells.reshape(-1, 4)
        self._target, self._in_place = target, is_packed(rows)
        if codec is not None:
            sizes = codec.encoded_bytes(sizes[0]), codec.encoded_bytes(sizes[1])
            self._received = self._borrow(sum(sizes[1]))[: sum(sizes[1])]
        elif self._in_place:
            self._received = target[:total]
        else:
            self._received = floats(self._borrow(4 * total), total)
        route = self._wire.route
        rank, width = route.peers.rank, self._sent.element_size()
        self._bytes = [(sum(counts) - counts[rank]) * width for counts in sizes]
        self._sending = all_to_all(
            route.peers, self._received, self._sent, sizes[1], sizes[0], route.direction, self._what
        )

    def finish(self) -> None:
        began = self._wire.measures.now()
        self._sending.wait()
        self._wire.measures.add(
            self._wire.route.direction,
            exchange_s=self._wire.measures.now() - began,
            sent_bytes=self._bytes[0],
            received_bytes=self._bytes[1],
            transfers=1,
        )
        codec, total = self._wire.codec, sum(self._incoming)
        flat = self._received
        if codec is not None:
            room = self._target if self._in_place else floats(self._borrow(4 * total), total)
            flat = codec.decode(self._received, self._incoming, room)
        if not self._in_place:
            rows = self._given.cells.reshape(-1, 4)
            copy_blocks(flat, packed_cells(rows), self._target, rows)
        self._wire.buffers.give(*self._borrowed)
