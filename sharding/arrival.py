"""Frames that have arrived: the rest of those too large for their slot, checks, decoding, and refusals."""

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
from tightrec.sharding.obituary import ExchangeError, tell
from tightrec.sharding.parts import Peers
from tightrec.sharding.traffic import count
from tightrec.sharding.transport import Buffers, lost

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
                raise_bad_size(peers, peer, true[place], self.limits[place], self.what, self.labels[place])
        self.offsets, self.sizes = starts, true
        moves = [
            dist.P2POp(dist.isend, rest, peers.ranks[peer], peers.group)
            for peer, rest in zip(peers.others, rests, strict=True)
            if rest.numel()
        ]
        count(self.direction, sum(rest.numel() for rest in rests))
        borrowed = []
        if any(size > slot for size, slot in zip(true, slots, strict=True)):
            whole, at, offsets = buffers.take(sum(true)), 0, []
            borrowed = [whole]
            for place, peer in enumerate(peers.others):
                fitting = min(true[place], slots[place])
                whole[at : at + fitting] = self.buffer[starts[place] : starts[place] + fitting]
                if true[place] > fitting:
                    room = whole[at + fitting : at + true[place]]
                    moves.append(dist.P2POp(dist.irecv, room, peers.ranks[peer], peers.group))
                offsets.append(at)
                at += true[place]
            self.buffer, self.offsets = whole, offsets
        try:
            # Together: NCCL would connect pairs one by one, in another order on each rank, and never end.
            for work in dist.batch_isend_irecv(moves) if moves else ():
                work.wait()
        except RuntimeError as error:
            awaited = [
                peers.ranks[p] for p, size, slot in zip(peers.others, true, slots, strict=True) if size > slot
            ]
            what = f"{self.what}, waiting for the rest of frames from rank(s) {awaited},"
            raise lost(peers, what if awaited else self.what, error) from error
        return borrowed

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
                raise self._bad(
                    place,
                    self.labels[place],
                    f"{sentence(Fault.CHECKSUM)}, or it has none because that rank runs without "
                    "codec.checksums. Nothing of it is trained on. Look at the memory and network of both "
                    "machines.",
                )
        frames = Frames(
            self.buffer,
            torch.tensor(self.sizes, dtype=torch.int64).to(device),
            torch.tensor(starts, dtype=torch.int64).to(device),
        )
        status = torch.zeros(1, dtype=torch.int64, device=device)
        decode(frames, layout, out=target, scratch=scratch, codebooks=books, status=status)
        found = int(status)
        if found:
            place, slot, fault = found >> 40, found >> 8 & 0xFFFFFFFF, Fault(found & 0xFF)
            raise self._bad(
                place,
                self.labels[place][slot : slot + 1],
                f"{sentence(fault)}. Nothing of it is trained on. Do all ranks run the same release with the "
                "same settings? Else look at the memory and network of both machines; codec.checksums=true "
                "tells damage on the way.",
            )

    def _bad(self, place: int, slots: Sequence[str], why: str) -> BadFrame:
        peer = self.peers.ranks[self.peers.others[place]]
        return _told(f"{self.what}: bad frame from rank {peer}, table slot {_some(slots)}: {why}")


def raise_bad_size(
    peers: Peers, peer: int, size: int, limit: int, what: str, slots: Sequence[str] = ()
) -> None:
    """Refuse a frame size that no frame of the expected blocks can have.

    Args:
        peers: the group.
        peer: who announces it.
        size: what it announces.
        limit: the most that such a frame can take.
        what: of the message.
        slots: labels of the expected blocks, for the message.

    Raises:
        BadFrame: always.
    """
    expected = f"the table slots {_some(slots)}" if slots else "these tables"
    raise _told(
        f"{what}: rank {peers.ranks[peer]} announces a frame of {size} bytes, but one of {expected} has "
        f"{FRAME_HEADER_BYTES} to {limit} and is a multiple of {FRAME_ALIGNMENT}. Do all ranks run the same "
        "release with the same settings?"
    )


def _told(words: str) -> BadFrame:
    """The error, known to the other ranks."""
    tell(words)
    return BadFrame(words)


def _some(slots: Sequence[str]) -> str:
    return ", ".join(slots[:3]) + (", ..." if len(slots) > 3 else "")


def _starts(sizes: Sequence[int]) -> list[int]:
    starts, at = [], 0
    for size in sizes:
        starts.append(at)
        at += size
    return starts
