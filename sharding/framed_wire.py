"""Error-bounded frames of variable size, on one direction of one leg.

What a rank sends to itself is copied as it is; every other peer gets one frame. Where all peers get the same
slots, one call of the codec writes all frames. Gradients of table-wise tables go back to their owners, so
each peer gets slots of its own: then one call for each, as bounds and modes are by table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from tightrec.compression.blocks import copy_blocks
from tightrec.compression.codebooks import Codebooks, ReceivedCodebooks
from tightrec.compression.codec import decode, decode_scratch_bytes, encode, encode_scratch_bytes
from tightrec.compression.frames import Frames, frame_bytes_limits, max_frame_bytes
from tightrec.compression.layout import Layout
from tightrec.compression.telemetry import frame_tables, worst_error_over_bound
from tightrec.kernels.format import FRAME_ALIGNMENT, FRAME_HEADER_BYTES
from tightrec.sharding.arrival import Arrival, raise_bad_size
from tightrec.sharding.checksums import stamp
from tightrec.sharding.parts import Side
from tightrec.sharding.pilot import Pilot
from tightrec.sharding.slots import FrameSlot
from tightrec.sharding.transport import Buffers, all_to_all
from tightrec.sharding.wire import Call, Route

_FIRST_REFRESH = 10
"""Uses of a wire before its first codebooks: enough to count symbols."""


@dataclass
class _Encoder:
    """Writes the frames of peers that get the same slots."""

    places: list[int]
    """Of its peers among the others."""
    labels: tuple[str, ...]
    tables: tuple[str, ...]
    books: Codebooks


class FramedWire:
    """See :class:`tightrec.sharding.wire.Wire`.

    Args:
        route: between whom.
        pilot: bounds, modes and what to measure.
        buffers: to borrow from.
    """

    def __init__(self, route: Route, pilot: Pilot, buffers: Buffers) -> None:
        self.route, self.pilot, self.buffers = route, pilot, buffers
        others = route.peers.others
        slots = len(route.received[0])
        self.encoders: list[_Encoder] = []
        groups = [[peer] for peer in others]
        if route.broadcast:
            groups = [others[:1]]
        elif len(set(route.sent)) == 1:
            groups = [others]
        for peers in groups:
            place = 0 if route.broadcast else peers[0]
            labels, tables = route.sent[place], route.sent_tables[place]
            books = Codebooks(len(peers), len(labels), buffers.device)
            self.encoders.append(_Encoder([others.index(p) for p in peers], labels, tables, books))
        self.received_books = ReceivedCodebooks(len(others), slots, buffers.device)
        self.uses = 0
        fixed = pilot.config.transport == "capacity"
        self.sent_slots = [FrameSlot() for _ in others] if fixed else []
        self.received_slots = [FrameSlot() for _ in others] if fixed else []

    def begin(self, source: Tensor, taken: Side, given: Side, what: str) -> Call:
        """See :class:`tightrec.sharding.wire.Wire`."""
        self.uses += 1
        every = self.pilot.config.refresh_every
        if self.uses == _FIRST_REFRESH or self.uses % every == 0:
            for encoder in self.encoders:
                encoder.books.refresh()
        return _FramedCall(self, source, taken, given, what)

    def incoming_layout(self, given: Side) -> Layout:
        """Blocks of the others' frames."""
        labels = [str(place) for place in range(given.cells.shape[1])]
        return Layout.of_cells((given.elements,), given.cells[self.route.peers.others], labels)


class _FramedCall:
    def __init__(self, wire: FramedWire, source: Tensor, taken: Side, given: Side, what: str) -> None:
        self._wire, self._source, self._taken, self._given, self._what = wire, source, taken, given, what
        self._borrowed: list[Tensor] = []
        clock = wire.pilot.measures.now
        began = clock()
        with record_function("exchange: encode"):
            self._frames = self._encode()
        self._lengths = [int(size) for size in torch.cat([f.sizes for f in self._frames]).tolist()]
        if wire.pilot.config.checksums:
            for frames in self._frames:
                stamp(frames.buffer, frames.offsets.tolist(), frames.sizes.tolist())
        wire.pilot.measures.add(wire.route.direction, encode_s=clock() - began)
        self._inspect()
        self._fixed = [slot.capacity for slot in wire.sent_slots]
        self.sizes = None if self._uses_slots else self._for_everybody(self._lengths)

    @property
    def _uses_slots(self) -> bool:
        return bool(self._fixed) and None not in self._fixed

    def _borrow(self, size: int) -> Tensor:
        self._borrowed.append(self._wire.buffers.take(size))
        return self._borrowed[-1]

    def _for_everybody(self, of_others: Sequence[int]) -> list[int]:
        """One number for each member of the group; 0 for this rank."""
        peers = self._wire.route.peers
        own = [of_others[0]] * len(peers.others) if self._wire.route.broadcast else list(of_others)
        return [*own[: peers.rank], 0, *own[peers.rank :]]

    def _encode(self) -> list[Frames]:
        """One entry for each encoder, frames back to back in one buffer where sizes are known here."""
        wire = self._wire
        route, pilot, device = wire.route, wire.pilot, wire.buffers.device
        others = route.peers.others
        self._layouts = []
        for encoder in wire.encoders:
            peers = [0] if route.broadcast else [others[place] for place in encoder.places]
            cells = self._taken.cells[peers]
            self._layouts.append(Layout.of_cells((self._taken.elements,), cells, encoder.labels))
        self._buffer = self._borrow(sum(max_frame_bytes(layout, torch.float32) for layout in self._layouts))
        source = self._source.view(-1)
        written, made = 0, []
        for encoder, layout in zip(wire.encoders, self._layouts, strict=True):
            bounds = pilot.bounds(route.direction, encoder.tables, encoder.labels, route.share)
            modes = pilot.modes(route.direction, encoder.tables, encoder.labels)
            needed = encode_scratch_bytes(layout, torch.float32, bounds, modes, codebooks=True, device=device)
            sizes = torch.zeros(layout.totals.peers, dtype=torch.int64, device=device)
            frames = Frames(self._buffer[written:], sizes, torch.zeros_like(sizes))
            scratch = wire.buffers.take(needed)
            encode(source, layout, bounds, modes, out=frames, scratch=scratch, codebooks=encoder.books)
            wire.buffers.give(scratch)
            made.append(frames)
            # Where the device must not be waited for, every encoder keeps the room that it might need.
            closed = int(sizes.sum()) if device.type == "cpu" else max_frame_bytes(layout, torch.float32)
            written += closed
        return made

    def _inspect(self) -> None:
        """What samples, shadow checks and trials of modes want to know; not in the encoding's time."""
        wire, pilot = self._wire, self._wire.pilot
        if pilot.trial is not None or (pilot.sampling_rows and wire.route.direction == "forward"):
            self._show_rows()
        if pilot.sampled or pilot.shadowed:
            copies = len(wire.route.peers.others) if wire.route.broadcast else 1
            for encoder, layout, frames in zip(wire.encoders, self._layouts, self._frames, strict=True):
                self._look(encoder, layout, frames, copies)

    def _show_rows(self) -> None:
        """Show the rows of every table for one peer to those who compare modes or sample rows."""
        pilot, source, direction = self._wire.pilot, self._source.view(-1), self._wire.route.direction
        for encoder, layout in zip(self._wire.encoders, self._layouts, strict=True):
            for table, cell in zip(encoder.tables, layout.cells[0].tolist(), strict=True):
                offset, rows, stride, dim = cell
                if rows:
                    start = source.storage_offset() + offset
                    block = torch.as_strided(source, (rows, dim), (stride, 1), start)
                    if pilot.trial is not None:
                        pilot.trial(direction, table, block)
                    if pilot.sampling_rows and direction == "forward":
                        pilot.policy.observe_rows(table, block)

    def _look(self, encoder: _Encoder, layout: Layout, frames: Frames, copies: int) -> None:
        pilot, direction = self._wire.pilot, self._wire.route.direction
        buffer, offsets, sizes = frames.buffer.cpu(), frames.offsets.cpu(), frames.sizes.cpu()
        found = frame_tables(buffer, offsets, sizes, layout)
        if pilot.sampled:
            tables = [encoder.tables] * layout.totals.peers
            pilot.measures.frames(direction, tables, found, copies)
        if pilot.shadowed:
            books = ReceivedCodebooks(layout.totals.peers, layout.totals.tables, frames.buffer.device)
            books.lengths[:] = encoder.books.lengths
            books.ids[:] = encoder.books.ids
            source = self._source.view(-1)
            back = decode(frames, layout, out=source.clone(), codebooks=books)
            worst = worst_error_over_bound(source, back, layout, torch.from_numpy(found.bound))
            held = found.values.sum(0) > 0
            pilot.measures.worst(
                direction,
                [table for table, some in zip(encoder.tables, held, strict=True) if some],
                worst[torch.from_numpy(held)].tolist(),
            )

    def post(self, incoming: Sequence[int] | None, target: Tensor) -> None:
        """See :class:`tightrec.sharding.wire.Call`."""
        wire, peers = self._wire, self._wire.route.peers
        self._target = target
        self._layout = wire.incoming_layout(self._given)
        limits = frame_bytes_limits(self._layout, torch.float32)
        if self._uses_slots:
            capacities = [slot.capacity or 0 for slot in wire.received_slots]
            received = self._for_others(capacities)
            sent = self._for_everybody([c or 0 for c in self._fixed])
            buffer = self._in_slots()
        else:
            assert incoming is not None
            received, sent, buffer = list(incoming), self._for_everybody(self._lengths), self._packed()
            for place, peer in enumerate(peers.others):
                size = received[peer]
                if size % FRAME_ALIGNMENT or not FRAME_HEADER_BYTES <= size <= limits[place]:
                    slots = wire.route.received[peer]
                    raise_bad_size(peers, peer, size, limits[place], self._what, slots)
        self._arrival = Arrival(
            peers=peers,
            sizes=[received[peer] for peer in peers.others],
            limits=limits,
            buffer=self._borrow(sum(received)),
            what=self._what,
            labels=[wire.route.received[peer] for peer in peers.others],
            direction=wire.route.direction,
        )
        self._sending = all_to_all(
            peers, self._arrival.buffer, buffer, received, sent, wire.route.direction, self._what
        )

    def _for_others(self, sizes: Sequence[int]) -> list[int]:
        rank = self._wire.route.peers.rank
        return [*sizes[:rank], 0, *sizes[rank:]]

    def _frame(self, place: int) -> tuple[Tensor, int, int]:
        """Buffer, offset and size of the frame for the others' ``place``."""
        if self._wire.route.broadcast:
            return self._frames[0].buffer, 0, self._lengths[0]
        for encoder, frames in zip(self._wire.encoders, self._frames, strict=True):
            if place in encoder.places:
                at = encoder.places.index(place)
                first = self._lengths[place - at : place]
                return frames.buffer, sum(first), self._lengths[place]
        raise AssertionError(f"no encoder writes to place {place}")

    def _packed(self) -> Tensor:
        """The frames of all others back to back."""
        if not self._wire.route.broadcast and (len(self._frames) == 1 or self._buffer.device.type == "cpu"):
            return self._buffer
        places = range(len(self._wire.route.peers.others))
        total = sum(self._frame(place)[2] for place in places)
        packed, written = self._borrow(total), 0
        for place in places:
            buffer, offset, size = self._frame(place)
            packed[written : written + size] = buffer[offset : offset + size]
            written += size
        return packed

    def _in_slots(self) -> Tensor:
        """The first bytes of every frame, each in a slot of the agreed capacity."""
        places = range(len(self._wire.route.peers.others))
        capacities = [self._capacity(place) for place in places]
        packed, written = self._borrow(sum(capacities)), 0
        for place, capacity in zip(places, capacities, strict=True):
            buffer, offset, size = self._frame(place)
            fitting = min(size, capacity)
            packed[written : written + fitting] = buffer[offset : offset + fitting]
            written += capacity
        return packed

    def _capacity(self, place: int) -> int:
        return self._fixed[0 if self._wire.route.broadcast else place] or 0

    def finish(self) -> None:
        """See :class:`tightrec.sharding.wire.Call`."""
        wire, route, pilot = self._wire, self._wire.route, self._wire.pilot
        began = pilot.measures.now()
        self._sending.wait()
        if self._uses_slots:
            rests = []
            for place in range(len(route.peers.others)):
                buffer, offset, size = self._frame(place)
                rests.append(buffer[offset + min(size, self._capacity(place)) : offset + size])
            self._borrowed += self._arrival.complete(rests, wire.buffers)
        if wire.sent_slots:
            for slots, sizes in (
                (wire.sent_slots, self._others_lengths()),
                (wire.received_slots, self._arrival.sizes),
            ):
                for slot, size in zip(slots, sizes, strict=True):
                    slot.record(size)
        arrived = pilot.measures.now()
        with record_function("exchange: decode"):
            scratch = self._borrow(
                decode_scratch_bytes(self._layout, torch.float32, device=wire.buffers.device)
            )
            self._arrival.decode(
                self._layout, self._target, scratch, wire.received_books, pilot.config.checksums
            )
            own = self._taken.cells[0 if route.broadcast else route.peers.rank]
            copy_blocks(self._source.view(-1), own, self._target, self._given.cells[route.peers.rank])
        pilot.measures.add(
            route.direction,
            exchange_s=arrived - began,
            decode_s=pilot.measures.now() - arrived,
            sent_bytes=sum(self._others_lengths()),
            received_bytes=sum(self._arrival.sizes),
            transfers=1,
            framed=1,
        )
        wire.buffers.give(*self._borrowed)

    def _others_lengths(self) -> list[int]:
        peers = self._wire.route.peers
        return self._lengths * len(peers.others) if self._wire.route.broadcast else self._lengths
