"""The exchange of one sharded module: wires for every leg in both directions, and a step through them.

Forward: lookups' outputs -> first legs of all parts, their sizes told in one go -> (two-level parts: second
leg) -> flat distinct rows of this rank's batch. Backward: the same legs the other way round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd

import torch
from torch import Tensor
from torch.profiler import record_function

from tightrec.compression.policy.config import Direction
from tightrec.sharding.config import FRAMED, CodecName
from tightrec.sharding.framed_wire import FramedWire
from tightrec.sharding.parts import LegStep, Part, Peers, Side, widest
from tightrec.sharding.pilot import Pilot
from tightrec.sharding.transport import Buffers, floats, tell_sizes
from tightrec.sharding.wire import Call, PlainWire, Route, Wire


@dataclass
class _Leg:
    """The wires of one leg of one part."""

    peers: Peers
    routes: dict[Direction, Route]
    wires: dict[tuple[Direction, CodecName], Wire] = field(default_factory=dict)


class Exchange:
    """Moves rows and gradients for the parts of a module.

    Args:
        parts: of the module, in the order of its lookups.
        pilot: settings of the step.
        device: of the tensors.
    """

    def __init__(self, parts: Sequence[Part], pilot: Pilot, device: torch.device) -> None:
        self.parts, self.pilot, self.device = list(parts), pilot, device
        self.buffers = Buffers(device)
        self._legs = {number: self._make_legs(part) for number, part in enumerate(parts) if part.peers}

    def _make_legs(self, part: Part) -> list[_Leg]:
        if part.kind == "spread":
            return [_Leg(part.peers[0], _spread_routes(part, part.peers[0], share=1.0))]
        if part.kind == "sum":
            return [_Leg(part.peers[0], _sum_routes(part, part.peers[0], share=1.0))]
        inner, outer = part.peers
        # Each of the two legs adds an error: they share the bound where both quantise.
        half = 0.5 if inner.size > 1 and outer.size > 1 else 1.0
        return [
            _Leg(inner, _sum_routes(part, inner, share=half)),
            _Leg(outer, _spread_routes(part, outer, share=half)),
        ]

    def wire(self, part: int, leg: int, direction: Direction) -> Wire:
        """The wire for the codec in use at present."""
        of = self._legs[part][leg]
        codec: CodecName = getattr(self.pilot.config, direction)
        exact = self.pilot.config.exact_evaluation and not self.pilot.training
        if of.peers.size == 1 or exact:
            codec = "none"
        elif codec in FRAMED:
            # Frames of nothing are left out: inside a machine no rank has any, while other machines may.
            inside = self.parts[part].kind == "two_level" and leg == 0
            idle = inside and not self.parts[part].held
            plain = codec == "auto" and self.pilot.sends_plain(direction)
            codec = "none" if idle or plain else "lossy"
        key = (direction, codec)
        if key not in of.wires:
            route = of.routes[direction]
            if codec == "lossy":
                of.wires[key] = FramedWire(route, self.pilot, self.buffers)
            else:
                dims = [slot.dim for slots in self.parts[part].sources for slot in slots]
                of.wires[key] = PlainWire(
                    route, codec, gcd(*dims) if dims else 1, self.buffers, self.pilot.measures
                )
        return of.wires[key]

    def peers(self, part: int, leg: int) -> Peers:
        """Members of a leg."""
        return self._legs[part][leg].peers

    def step(self, legs: dict[int, list[LegStep]], what: str) -> "ExchangeStep":
        """A step with the given geometry, by part."""
        return ExchangeStep(self, legs, what)


class ExchangeStep:
    """One forward, and its backward where there is one; flat tensors by part."""

    def __init__(self, exchange: Exchange, legs: dict[int, list[LegStep]], what: str) -> None:
        self._exchange, self._legs, self._what = exchange, legs, what
        self._calls: dict[int, Call] = {}
        self._sums: dict[int, Tensor] = {}
        self._targets: dict[int, Tensor] = {}
        self._sources: list[Tensor] = []
        self._borrowed: list[Tensor] = []

    def send_forward(self, outputs: dict[int, Tensor], results: dict[int, Tensor]) -> None:
        """Send the lookups' outputs; ``results`` are filled with this rank's rows by ``receive_forward``."""
        self._results = results
        self._launch("forward", 0, outputs)

    def receive_forward(self) -> None:
        """Wait until ``results`` hold this rank's rows."""
        sums = self._arrive()
        self._launch("forward", 1, {part: sums[part] for part in sums if len(self._legs[part]) == 2})
        self._arrive()
        self._release()

    def send_backward(self, grads: dict[int, Tensor]) -> None:
        """Send gradients of this rank's rows back towards the lookups."""
        self._launch("backward", 1, {p: grad for p, grad in grads.items() if len(self._legs[p]) == 2})
        self._waiting = {p: grad for p, grad in grads.items() if len(self._legs[p]) == 1}
        if not self._calls:
            self._launch("backward", 0, self._waiting)
            self._waiting = {}

    def receive_backward(self) -> dict[int, Tensor]:
        """Gradients of the lookups' outputs; rows that nobody sent are 0."""
        arrived = self._arrive()
        outer = {p: grad for p, grad in arrived.items() if len(self._legs[p]) == 2}
        if outer or self._waiting:
            inner = dict(sorted({**outer, **self._waiting}.items()))
            arrived = {p: grad for p, grad in arrived.items() if p not in outer}
            self._launch("backward", 0, inner)
            arrived |= self._arrive()
        self._release()
        return arrived

    def _launch(self, direction: Direction, leg: int, sources: dict[int, Tensor]) -> None:
        """Encode and start sending; sizes of all parts are told in one exchange for each group."""
        exchange = self._exchange
        self._direction = direction
        what = f"the {direction} exchange of {self._what}"
        calls: dict[int, Call] = {}
        for part, source in sources.items():
            geometry = self._legs[part][leg]
            taken, given, target = self._sides(direction, part, leg, geometry)
            wire = exchange.wire(part, leg, direction)
            calls[part] = wire.begin(source, taken, given, what)
            self._targets[part] = target
            self._sources.append(source)
        told = self._tell_sizes(calls, {part: exchange.peers(part, leg) for part in calls}, what)
        for part, call in calls.items():
            call.post(told.get(part), self._targets[part])
        self._calls = calls
        self._combined = {
            part: (self._legs[part][leg], leg)
            for part in calls
            if direction == "forward" and self._legs[part][leg].combine == "sum"
        }

    def _sides(
        self, direction: Direction, part: int, leg: int, geometry: LegStep
    ) -> tuple[Side, Side, Tensor]:
        """Where blocks are taken from and given to, and the flat tensor that receives them."""
        device = self._exchange.device
        last = leg == len(self._legs[part]) - 1
        if direction == "forward":
            if geometry.combine == "spread":
                return geometry.far, geometry.near, self._results[part]
            partial = self._borrow(geometry.near.elements)
            self._sums[part] = self._results[part] if last else self._borrow(geometry.total)
            return geometry.far, geometry.near, partial
        target = torch.zeros(geometry.far.elements, dtype=torch.float32, device=device)
        taken = geometry.near
        if geometry.combine == "sum":
            taken = Side(cells=geometry.near.cells[:1], elements=geometry.total)
        return taken, geometry.far, target

    def _tell_sizes(self, calls: dict[int, Call], peers: dict[int, Peers], what: str) -> dict[int, list[int]]:
        """Bytes from each member, by part, of the calls that must be told."""
        told: dict[int, list[int]] = {}
        asking = [part for part in calls if calls[part].sizes is not None]
        for group in {id(peers[part].group): peers[part] for part in asking}.values():
            parts = [part for part in asking if peers[part].group is group.group]
            mine = [calls[part].sizes or [] for part in parts]
            measures = self._exchange.pilot.measures
            began = measures.now()
            with record_function("exchange: sizes"):
                theirs = tell_sizes(group, mine, self._direction, what, self._exchange.device)
            told_s, told_bytes = measures.now() - began, 8 * len(parts) * (group.size - 1)
            measures.add(
                self._direction,
                exchange_s=told_s,
                sizes_s=told_s,
                sent_bytes=told_bytes,
                received_bytes=told_bytes,
            )
            told.update({part: theirs[place] for place, part in enumerate(parts)})
        return told

    def _arrive(self) -> dict[int, Tensor]:
        """Wait for the calls under way; their results by part, partial sums added up."""
        arrived = {}
        for part, call in self._calls.items():
            call.finish()
            arrived[part] = self._targets.pop(part)
            if part in self._combined:
                geometry, _ = self._combined[part]
                parts = arrived[part].view(-1, geometry.total) if geometry.total else arrived[part].view(0, 0)
                torch.sum(parts, dim=0, out=self._sums[part])
                arrived[part] = self._sums.pop(part)
        self._calls, self._sources = {}, []
        return arrived

    def _borrow(self, count_: int) -> Tensor:
        self._borrowed.append(self._exchange.buffers.take(4 * count_))
        return floats(self._borrowed[-1], count_)

    def _release(self) -> None:
        self._exchange.buffers.give(*self._borrowed)
        self._borrowed = []


def _padded(part: Part, source: int, name: str) -> tuple[str, ...]:
    """An attribute of a source's slots; what fills up to the widest source gets a name of its own."""
    found = [getattr(slot, name) for slot in part.sources[source]]
    spare = part.sources[source][0].table if part.sources[source] else _any_table(part)
    while len(found) < widest(part):
        found.append(spare if name == "table" else f"(none {len(found)})")
    return tuple(found)


def _any_table(part: Part) -> str:
    return next(slot.table for slots in part.sources for slot in slots)


def _spread_routes(part: Part, peers: Peers, share: float) -> dict[Direction, Route]:
    own, all_sources = part.source, range(len(part.sources))
    labels = tuple(_padded(part, source, "label") for source in all_sources)
    tables = tuple(_padded(part, source, "table") for source in all_sources)
    size = peers.size
    return {
        "forward": Route(
            peers=peers,
            direction="forward",
            sent=(labels[own],) * size,
            sent_tables=(tables[own],) * size,
            received=labels,
            share=share,
        ),
        "backward": Route(
            peers=peers,
            direction="backward",
            sent=labels,
            sent_tables=tables,
            received=(labels[own],) * size,
            share=share,
        ),
    }


def _sum_routes(part: Part, peers: Peers, share: float) -> dict[Direction, Route]:
    labels = tuple(slot.label for slot in part.held)
    tables = tuple(slot.table for slot in part.held)
    size = peers.size
    return {
        # As many errors are added up as there are peers, so each may be that part of the bound.
        "forward": Route(
            peers=peers,
            direction="forward",
            sent=(labels,) * size,
            sent_tables=(tables,) * size,
            received=(labels,) * size,
            share=share / size,
        ),
        "backward": Route(
            peers=peers,
            direction="backward",
            sent=(labels,),
            sent_tables=(tables,),
            received=(labels,) * size,
            broadcast=True,
            share=share,
        ),
    }
