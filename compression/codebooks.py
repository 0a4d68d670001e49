"""Codebooks of the entropy mode: built by the sender from the symbols of earlier frames, kept by receivers.

A static book is nearly as good as one built for each frame (arXiv 2601.10673), costs nothing in the step, and
its escapes keep it correct on data it has not seen.
"""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from tightrec.kernels.format import (
    MAX_CODE_LENGTH,
    SYMBOL_ESCAPE_CODE,
    SYMBOL_ESCAPE_RAW,
    SYMBOLS,
)


def code_lengths(histogram: Sequence[int]) -> list[int]:
    """Optimal prefix code lengths of at most 12 bits (package-merge, Larmore and Hirschberg 1990).

    Args:
        histogram: 256 counts of symbols.

    Returns:
        256 lengths. Every symbol up to the largest one seen gets a code, as later frames may hold it, and so
        do both escapes; other symbols get none (0).
    """
    counts = [int(count) for count in histogram]
    assert len(counts) == SYMBOLS
    seen = [symbol for symbol in range(SYMBOL_ESCAPE_CODE) if counts[symbol]]
    coded = [*range(max(seen, default=0) + 1), SYMBOL_ESCAPE_CODE, SYMBOL_ESCAPE_RAW]
    items = sorted((max(counts[symbol], 1), (symbol,)) for symbol in coded)
    packages: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(MAX_CODE_LENGTH):
        pairs = zip(packages[::2], packages[1::2], strict=False)
        merged = [(a[0] + b[0], a[1] + b[1]) for a, b in pairs]
        packages = list(heapq.merge(items, merged))
    lengths = [0] * SYMBOLS
    for _, symbols in packages[: 2 * len(coded) - 2]:
        for symbol in symbols:
            lengths[symbol] += 1
    return lengths


class Codebooks:
    """A sender's codebooks: one for each of T tables, and which of P peers has it already.

    Pass it to ``encode``; call ``refresh`` from time to time. Nothing is read back to the host but there.
    """

    def __init__(self, peers: int, tables: int, device: torch.device | str = "cpu") -> None:
        self.lengths = torch.zeros(tables, SYMBOLS, dtype=torch.uint8, device=device)
        self.ids = torch.zeros(tables, dtype=torch.int32, device=device)
        self.sent = torch.zeros(peers, tables, dtype=torch.int32, device=device)
        self.histogram = torch.zeros(tables, SYMBOLS, dtype=torch.int64, device=device)

    def refresh(self) -> None:
        """New codebooks for the tables that have sent something since the last refresh.

        Waits for the device: the counts are read and the books are built on the host. The next frames that
        use a book carry it.
        """
        counts = self.histogram.cpu()
        used = counts.any(1)
        lengths, ids = self.lengths.cpu(), self.ids.cpu()
        for table in used.nonzero().flatten().tolist():
            lengths[table] = torch.tensor(code_lengths(counts[table].tolist()), dtype=torch.uint8)
        ids[used] = ids[used] % (2**31 - 1) + 1  # positive, and never 0: that is "no codebook"
        self.lengths.copy_(lengths)
        self.ids.copy_(ids)
        self.histogram.zero_()

    def forget_receivers(self) -> None:
        """Send every book again: receivers have restarted, or frames must be readable alone."""
        self.sent.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps. Receivers are not in it: they may be others after a restart."""
        return {"lengths": self.lengths, "ids": self.ids, "histogram": self.histogram}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the books of a checkpoint; every peer gets them again."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
        self.forget_receivers()


class ReceivedCodebooks:
    """A receiver's codebooks, one for each (sender, table), as they have come along with frames."""

    def __init__(self, peers: int, tables: int, device: torch.device | str = "cpu") -> None:
        self.lengths = torch.zeros(peers, tables, SYMBOLS, dtype=torch.uint8, device=device)
        self.ids = torch.zeros(peers, tables, dtype=torch.int32, device=device)

    @classmethod
    def within(cls, memory: Tensor, peers: int, tables: int) -> "ReceivedCodebooks":
        """None received so far, in ``bytes_for(peers, tables)`` bytes of someone else's memory."""
        books = cls.__new__(cls)
        split = peers * tables * SYMBOLS
        books.lengths = memory[:split].view(peers, tables, SYMBOLS)
        books.ids = memory[split:][: 4 * peers * tables].view(torch.int32).view(peers, tables)
        books.ids.zero_()
        return books

    @staticmethod
    def bytes_for(peers: int, tables: int) -> int:
        """Bytes that ``within`` needs, a multiple of 16."""
        return -(-peers * tables * (SYMBOLS + 4) // 16) * 16
