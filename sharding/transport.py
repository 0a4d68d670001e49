"""All-to-alls between the members of a group, buffers that are used again, and what is said of failures."""

from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from tightrec.sharding.obituary import ExchangeError, glance, shortened, survey, tell
from tightrec.sharding.parts import Peers
from tightrec.sharding.traffic import Purpose, count

_SPARE = 1.25
"""Room for later steps whose batches repeat less."""

_SIZE_BITS = 40
"""Of a word that announces a size; those above them must agree with it."""

_GLANCE = timedelta(seconds=1)
"""A rank that waits for longer looks whether another one has ended the job."""


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
        # One made in inference mode could not be written to in a training step.
        with torch.inference_mode(False):
            return torch.empty(room, dtype=torch.uint8, device=self.device)

    def give(self, *buffers: Tensor) -> None:
        """Hand back what :meth:`take` returned."""
        self._free.extend(buffers)


def floats(buffer: Tensor, count: int) -> Tensor:
    """The first ``count`` float32 of a buffer."""
    return buffer[: 4 * count].view(torch.float32)


class Sending:
    """An all-to-all under way; keeps its buffers alive."""

    def __init__(self, work: dist.Work | None, peers: Peers, what: str, device: torch.device) -> None:
        self._work = work
        self._peers = peers
        self._what = what
        self._device = device

    def wait(self) -> None:
        """Until everything has been received and may be overwritten here.

        Raises:
            ExchangeError: a peer is gone or did not answer within the group's time-out.
        """
        if self._work is None:
            return
        work, self._work = self._work, None
        await_work(work, self._peers, self._what, self._device)


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
    return Sending(work, peers, what, sent.device)


def tell_sizes(
    peers: Peers, mine: Sequence[Sequence[int]], purpose: Purpose, what: str, device: torch.device
) -> list[list[int]]:
    """Tell every member how many bytes it is to get, and hear the same from all.

    A size that arrives changed would have a rank receive more or less than is sent, which ends gloo's process
    without a word: each travels with bits that must agree with it.

    Args:
        peers: the group.
        mine: [calls][P] bytes for each member.
        purpose: for the count of traffic.
        what: of messages, such as "the forward exchange of step 7".
        device: that the group sends from.

    Returns:
        [calls][P] bytes from each member.

    Raises:
        ExchangeError: a peer is gone, or a size was changed on its way.
    """
    words = torch.tensor([[_sealed(size) for size in sizes] for sizes in mine], dtype=torch.int64)
    sent = words.t().contiguous().to(device)
    received = torch.empty_like(sent)
    try:
        work = dist.all_to_all_single(received, sent, group=peers.group, async_op=True)
    except RuntimeError as error:
        raise lost(peers, what, error) from error
    await_work(work, peers, what, device)
    count(purpose, 8 * len(mine) * (peers.size - 1))
    theirs: list[list[int]] = received.t().tolist()
    for sizes in theirs:
        for peer, word in enumerate(sizes):
            sizes[peer] = word & (1 << _SIZE_BITS) - 1
            if _sealed(sizes[peer]) != word:
                sentence = (
                    f"{what}: the frame sizes from rank {peers.ranks[peer]} were damaged on the way. Nothing "
                    "is trained on them. Look at the memory and network of both machines."
                )
                tell(sentence)
                raise ExchangeError(sentence)
    return theirs


def _sealed(size: int) -> int:
    """The size with bits above it that change with it."""
    size &= (1 << _SIZE_BITS) - 1
    return size | (size * 0x9E3779B97F4A7C15 >> 41 & 0x3FFFFF) << _SIZE_BITS


def await_work(work: dist.Work, peers: Peers, what: str, device: torch.device) -> None:
    """Wait for an asynchronous collective, and look now and then whether another rank has ended the job.

    Args:
        work: of a collective; not of a send or receive, which a wait with a limit would break off.
        peers: the group.
        what: of messages, such as "the forward exchange of step 7".
        device: of the tensors.

    Raises:
        ExchangeError: a peer is gone, did not answer within the group's time-out, or has ended the job.
    """
    in_pieces = device.type == "cpu"
    while True:
        try:
            if in_pieces:
                work.wait(_GLANCE)
            else:
                work.wait()
            return
        except RuntimeError as error:
            if not in_pieces:
                raise lost(peers, what, error) from error
            if work.is_completed():
                # Done since the limit of this wait: it says now whether it succeeded.
                try:
                    work.wait()
                except RuntimeError as late:
                    raise lost(peers, what, late) from late
                return
        reason = glance()
        if reason is not None:
            raise ExchangeError(f"{what} stops on rank {peers.ranks[peers.rank]}: {reason}")


def lost(peers: Peers, what: str, error: BaseException) -> ExchangeError:
    """What to say when a collective has failed: why another rank has ended, or who answers no more."""
    return ExchangeError(f"{what} failed on rank {peers.ranks[peers.rank]}: {survey()} ({shortened(error)})")
