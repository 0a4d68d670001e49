"""Frames that have arrived: the rest of those too large for their slot, checks, decoding, and what is said of bad ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from tightrec.compression.codebooks import ReceivedCodebooks
from tightrec.compression.codec import decode
from tightrec.compression.frames import Frames, sentence
from tightrec.compression.layout import Layout
from tightrec.compression.policy.config import Direction
from tightrec.kernels.format import FRAME_ALIGNMENT, FRAME_HEADER_BYTES, Fault
from tightrec.sharding.checksums import mismatched
from tightrec.sharding.parts import Peers
from tightrec.sharding.traffic import count
from tightrec.sharding.transport import Buffers, ExchangeError, lost

_SIZE_FIELD = 16
"""Byte of a frame's header at which its size stands, as a little-endian word of 8 bytes."""


class BadFrame(ExchangeError):
    """A peer sent what is not a frame of the expected blocks; nothing was made of it."""


@dataclass(kw_only=True)
class Arrival:
    """The others' frames in a receive buffer."""

    peers: Peers
    sizes: list[int]
    """[P - 1] bytes of each frame; before ``complete``, of its slot."""
    limits: list[int]
    """[P - 1] the most that a frame of the expected blocks can take."""
    buffer: Tensor
    what: str
    labels: list[tuple[str, ...]]
    """[P - 1][T] slots by sender, for messages."""
    direction: Direction
    offsets: list[int] | None = None
    """[P - 1] where each frame starts; None: back to back."""

    def complete(self, rests: Sequence[Tensor], buffers: Buffers) -> list[Tensor]:
        """Send what did not fit into slots, and receive the same from others; point to point.

        Args:
            rests: [P - 1] bytes for each peer that its slot did not hold; mostly none.
            buffers: to borrow from.

        Returns:
            what was borrowed.

        Raises:
            ExchangeError: a peer is gone or its header makes no sense.
        """
        peers = self.peers
        slots, starts = self.sizes, _starts(self.sizes)
        heads = torch.stack([self.buffer[at + _SIZE_FIELD : at + _SIZE_FIELD + 8] for at in starts])
        true = [int(size) for size in heads.cpu().view(torch.int64).flatten().tolist()]
        for place, peer in enumerate(peers.others):
            if true[place] % FRAME_ALIGNMENT or not FRAME_HEADER_BYTES <= true[place] <= self.limits[place]:
                raise_bad_size(peers, peer, true[place], self.limits[place], self.what)
        self.offsets, self.sizes = starts, true
        try:
            works = [
                dist.isend(rest, peers.ranks[peer], group=peers.group)
                for peer, rest in zip(peers.others, rests, strict=True)
                if rest.numel()
            ]
            count(self.direction, sum(rest.numel() for rest in rests))
            if all(size <= slot for size, slot in zip(true, slots, strict=True)):
                for work in works:
                    work.wait()
                return []
            whole, at = buffers.take(sum(true)), 0
            offsets = []
            for place, peer in enumerate(peers.others):
                fitting = min(true[place], slots[place])
                whole[at : at + fitting] = self.buffer[starts[place] : starts[place] + fitting]
                if true[place] > fitting:
                    room = whole[at + fitting : at + true[place]]
                    works.append(dist.irecv(room, peers.ranks[peer], group=peers.group))
                offsets.append(at)
                at += true[place]
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise lost(peers, self.what, error) from error
        self.buffer, self.offsets = whole, offsets
        return [whole]

    def decode(
        self, layout: Layout, target: Tensor, scratch: Tensor, books: ReceivedCodebooks, checksums: bool
    ) -> None:
        """Write the frames' values to flat ``target``.

        Raises:
            BadFrame: names peer, slot and what is wrong; the target then holds NaN where it would be.
        """
        device = self.buffer.device
        starts = self.offsets if self.offsets is not None else _starts(self.sizes)
        if checksums:
            for place in mismatched(self.buffer, starts, self.sizes):
                raise self._bad(place, None, Fault.CHECKSUM)
        frames = Frames(
            self.buffer,
            torch.tensor(self.sizes, dtype=torch.int64).to(device),
            torch.tensor(starts, dtype=torch.int64).to(device),
        )
        status = torch.zeros(1, dtype=torch.int64, device=device)
        decode(frames, layout, out=target, scratch=scratch, codebooks=books, status=status)
        found = int(status)
        if found:
            fault = Fault(found & 0xFF)
            raise self._bad(found >> 40, found >> 8 & 0xFFFFFFFF, fault)

    def _bad(self, place: int, slot: int | None, fault: Fault) -> BadFrame:
        peer = self.peers.ranks[self.peers.others[place]]
        where = "" if slot is None else f", table slot {self.labels[place][slot]}"
        return BadFrame(
            f"{self.what}: bad frame from rank {peer}{where}: {sentence(fault)}. Nothing of it is trained on. "
            "Look at that machine's memory and network; codec.checksums=true finds damage on the way."
        )


def raise_bad_size(peers: Peers, peer: int, size: int, limit: int, what: str) -> None:
    """Refuse a frame size that no frame of the expected blocks can have.

    Raises:
        BadFrame: always.
    """
    raise BadFrame(
        f"{what}: rank {peers.ranks[peer]} announces a frame of {size} bytes, but one of these tables has "
        f"{FRAME_HEADER_BYTES} to {limit} and is a multiple of {FRAME_ALIGNMENT}. Do all ranks run the same release with the same "
        "settings?"
    )


def _starts(sizes: Sequence[int]) -> list[int]:
    starts, at = [], 0
    for size in sizes:
        starts.append(at)
        at += size
    return starts
