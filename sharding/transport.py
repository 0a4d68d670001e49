"""All-to-alls between the members of a group, buffers that are used again, and what is said of failures."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from tightrec.sharding.parts import Peers
from tightrec.sharding.traffic import Purpose, count

_SPARE = 1.25
"""Room for later steps whose batches repeat less."""


class ExchangeError(RuntimeError):
    """An exchange of embeddings or gradients cannot be completed; the message names peers and step."""


class Buffers:
    """Bytes that steps borrow and give back: after the first steps nothing is allocated."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """At least ``size`` bytes, uint8, of any content; to be given back."""
        fitting = [buffer for buffer in self._free if buffer.numel() >= size]
        if fitting:
            chosen = min(fitting, key=Tensor.numel)
            self._free = [buffer for buffer in self._free if buffer is not chosen]
            return chosen
        if self._free:
            # The largest is too small by now: let it go, so that outgrown buffers do not pile up.
            largest = max(self._free, key=Tensor.numel)
            self._free = [buffer for buffer in self._free if buffer is not largest]
        room = -(-int(size * _SPARE) // 64) * 64 + 64
        return torch.empty(room, dtype=torch.uint8, device=self.device)

    def give(self, *buffers: Tensor) -> None:
        """Hand back what :meth:`take` returned."""
        self._free.extend(buffers)


def floats(buffer: Tensor, count: int) -> Tensor:
    """The first ``count`` float32 of a buffer."""
    return buffer[: 4 * count].view(torch.float32)


class Sending:
    """An all-to-all under way; keeps its buffers alive."""

    def __init__(self, work: dist.Work | None, peers: Peers, what: str) -> None:
        self._work = work
        self._peers = peers
        self._what = what

    def wait(self) -> None:
        """Until everything has been received and may be overwritten here.

        Raises:
            ExchangeError: a peer is gone or did not answer within the group's time-out.
        """
        if self._work is None:
            return
        work, self._work = self._work, None
        try:
            work.wait()
        except RuntimeError as error:
            raise lost(self._peers, self._what, error) from error


def all_to_all(
    peers: Peers,
    received: Tensor,
    sent: Tensor,
    received_counts: Sequence[int],
    sent_counts: Sequence[int],
    purpose: Purpose,
    what: str,
) -> Sending:
    """Start sending runs of flat ``sent`` to the members in order, and receiving theirs, one's own included.

    Args:
        peers: the group.
        received: flat, at least as long as the sum of its counts.
        sent: likewise.
        received_counts: elements from each member.
        sent_counts: elements to each member.
        purpose: for the count of traffic.
        what: of the messages, such as "the forward exchange of step 7".
    """
    count(purpose, (sum(sent_counts) - sent_counts[peers.rank]) * sent.element_size())
    try:
        work = dist.all_to_all_single(
            received[: sum(received_counts)],
            sent[: sum(sent_counts)],
            list(received_counts),
            list(sent_counts),
            group=peers.group,
            async_op=True,
        )
    except RuntimeError as error:
        raise lost(peers, what, error) from error
    return Sending(work, peers, what)


def lost(peers: Peers, what: str, error: BaseException) -> ExchangeError:
    """What to say when a collective has failed: who answers no more, as far as the store can tell."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ExchangeError(f"{what} failed on rank {peers.ranks[peers.rank]}: {first}")
