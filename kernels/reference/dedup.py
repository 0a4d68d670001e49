"""Rows that decode to identical bits, sent once (docs/FORMAT.md, section 4.3)."""

import torch
from torch import Tensor

from tightrec.kernels.format import Fault
from tightrec.kernels.reference.bits import (
    bytes_to_words,
    from_planes,
    pad_rows,
    to_planes,
    value_bits,
    words_to_bytes,
)
from tightrec.kernels.reference.packed import Rejected


def distinct_rows(received: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Which rows are sent, and as which of them each row is received.

    Args:
        received: what the values of a block with at least one row decode to, flat.
        dim: values in a row.

    Returns:
        (owners int64 [distinct], index int64 [rows]): the lowest row of each set of equal rows, ascending,
        and for each row the position of its owner in that list.
    """
    bits = value_bits(received).view(-1, dim)
    _, group = torch.unique(bits, dim=0, return_inverse=True)
    rows = torch.arange(bits.shape[0])
    first = torch.full_like(rows, bits.shape[0]).scatter_reduce(0, group, rows, "amin")
    owner = first[group]
    owners = rows[owner == rows]
    return owners, torch.searchsorted(owners, owner)


def index_bits(distinct: int) -> int:
    """Bits of an index into ``distinct`` rows: ceil(log2(distinct))."""
    return (distinct - 1).bit_length()


def pack_index(distinct: int, index: Tensor) -> Tensor:
    """The count of distinct rows and the index planes, uint8."""
    planes = to_planes(pad_rows(index, 32), index_bits(distinct)).flatten()
    return words_to_bytes(torch.cat([torch.tensor([distinct]), planes]))


def unpack_index(payload: Tensor, rows: int) -> tuple[Tensor, int, Tensor]:
    """(index int64 [rows], distinct, what follows in the payload).

    Raises:
        Rejected: the count or an index is out of range, or a distinct row is unused.
    """
    if payload.numel() < 4:
        raise Rejected(Fault.PAYLOAD_SIZE)
    distinct = int(bytes_to_words(payload[:4]))
    if not 1 <= distinct <= rows:
        raise Rejected(Fault.DISTINCT)
    groups, bits = -(-rows // 32), index_bits(distinct)
    end = 4 + 4 * groups * bits
    if payload.numel() < end:
        raise Rejected(Fault.PAYLOAD_SIZE)
    index = from_planes(bytes_to_words(payload[4:end]).view(groups, bits)).flatten()[:rows]
    if int(index.max()) >= distinct or index.unique().numel() != distinct:
        raise Rejected(Fault.INDEX)
    return index, distinct, payload[end:]
