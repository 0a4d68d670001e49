"""Frames as tensors, and what is said of a bad one."""

import struct
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from tightrec.compression.layout import Layout
from tightrec.kernels.format import (
    BLOCK_HEADER_BYTES,
    FRAME_ALIGNMENT,
    FRAME_FLAG_CHECKSUM,
    FRAME_HEADER_BYTES,
    Fault,
)

_SENTENCES = {
    Fault.TRUNCATED: "fewer bytes than its headers take, or outside the receive buffer",
    Fault.MAGIC: "it does not start with the magic bytes TREC: not a frame, or written at another place",
    Fault.VERSION: "its format version is not 1: sender and receiver run different releases",
    Fault.DTYPE: "its values have another type than expected",
    Fault.RESERVED: "a reserved field is not zero",
    Fault.BLOCKS: "it has another number of blocks than tables are expected",
    Fault.FRAME_SIZE: "its size field does not agree with the bytes received or with its blocks",
    Fault.MODE: "the block's mode is unknown or not possible here",
    Fault.ROWS: "the block has another number of rows than expected",
    Fault.DIM: "the block's rows have another dimension than expected",
    Fault.BOUND: "the block's error bound is not a normal float32 from 2^-126 to 2^125",
    Fault.PAYLOAD_SIZE: "the block's payload has a wrong size",
    Fault.DIRECTORY: "the block's directory of tiles or strips does not agree with its data",
    Fault.GROUP_KIND: "a group of 32 values has an unknown kind",
    Fault.MIXED_GROUP: "a group with exceptions has a mask that does not agree with its size",
    Fault.DISTINCT: "the number of distinct rows is not from 1 to the number of rows",
    Fault.INDEX: "a row refers to a distinct row that is not there, or a distinct row is not used",
    Fault.CODEBOOK: "the codebook is not a complete prefix code of at most 12 bits with both escapes",
    Fault.CODEBOOK_MISSING: "it uses a codebook that has not been received from this peer",
    Fault.STREAM: "a chunk's symbols do not use exactly its bytes",
    Fault.PADDING: "the padding at its end is not zero",
    Fault.CHECKSUM: "its checksum does not match its bytes",
}


def sentence(fault: Fault) -> str:
    """What is wrong with a frame, in words."""
    return _SENTENCES[fault]


_WHOLE_FRAME = frozenset(
    {
        Fault.TRUNCATED,
        Fault.MAGIC,
        Fault.VERSION,
        Fault.DTYPE,
        Fault.BLOCKS,
        Fault.FRAME_SIZE,
        Fault.PADDING,
        Fault.CHECKSUM,
    }
)


class FrameError(ValueError):
    """A frame breaks the format; nothing outside it was read and the blocks concerned are NaN.

    ``fault`` says what, ``peer`` and ``table`` where; the first table where the frame as a whole is bad.
    """

    def __init__(self, fault: Fault, peer: int, table: str) -> None:
        where = f"peer {peer}" if fault in _WHOLE_FRAME else f"peer {peer}, table {table!r}"
        super().__init__(f"bad frame from {where}: {sentence(fault)}")
        self.fault = fault
        self.peer = peer
        self.table = table


def raise_for_status(status: Tensor, layout: Layout) -> None:
    """Raise what ``decode`` wrote in its status, int64 [1]; reads it, so it waits for the device.

    Raises:
        FrameError: some frame was bad; names the first peer and table.
    """
    value = int(status.item())
    if value:
        raise FrameError(Fault(value & 0xFF), value >> 40, layout.tables[value >> 8 & 0xFFFFFFFF])


@dataclass(frozen=True)
class Frames:
    """One frame for each of P peers in one buffer; nothing is known on the host until it is asked for."""

    buffer: Tensor
    """uint8, 16-byte aligned."""
    sizes: Tensor
    """int64 [P], bytes of each frame, on the buffer's device."""
    offsets: Tensor
    """int64 [P], where each frame starts in the buffer. ``encode`` writes them back to back."""

    @classmethod
    def empty(cls, layout: Layout, dtype: torch.dtype, device: torch.device | str = "cpu") -> "Frames":
        """Room for whatever ``encode`` may write."""
        buffer = torch.empty(max_frame_bytes(layout, dtype), dtype=torch.uint8, device=device)
        sizes = torch.zeros(layout.totals.peers, dtype=torch.int64, device=device)
        return cls(buffer, sizes, torch.zeros_like(sizes))

    @classmethod
    def received(cls, buffer: Tensor, sizes: Tensor) -> "Frames":
        """Frames that lie back to back in a receive buffer; sizes int64 [P] on its device."""
        return cls(buffer, sizes, sizes.cumsum(0) - sizes)

    def frame(self, peer: int) -> Tensor:
        """One peer's frame, a view, uint8; waits for the device."""
        offset, size = int(self.offsets[peer]), int(self.sizes[peer])
        return self.buffer[offset : offset + size]


def frame_bytes_limits(layout: Layout, dtype: torch.dtype) -> list[int]:
    """The most bytes that each peer's frame can take: every block raw."""
    return layout.kept(("frame bytes", dtype), lambda: _limits(layout, dtype.itemsize))


def _limits(layout: Layout, value_bytes: int) -> list[int]:
    words = -(-layout.cells[:, :, 1] * layout.cells[:, :, 3] * value_bytes // 4)
    sizes = FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * layout.totals.tables + 4 * words.sum(axis=1)
    return (-(-sizes // FRAME_ALIGNMENT) * FRAME_ALIGNMENT).tolist()


def max_frame_bytes(layout: Layout, dtype: torch.dtype) -> int:
    """The most bytes that all frames of a call can take together: the size of an output buffer."""
    return sum(frame_bytes_limits(layout, dtype))


def checksummed(frame: bytes) -> bytes:
    """The frame with its checksum, for storing."""
    head = bytearray(frame)
    head[6] |= FRAME_FLAG_CHECKSUM
    head[12:16] = bytes(4)
    head[12:16] = struct.pack("<I", zlib.crc32(head))
    return bytes(head)


def checksum_matches(frame: bytes) -> bool:
    """Whether a frame has a checksum and it is that of its bytes."""
    if len(frame) < FRAME_HEADER_BYTES or not frame[6] & FRAME_FLAG_CHECKSUM:
        return False
    cleared = frame[:12] + bytes(4) + frame[16:]
    return zlib.crc32(cleared) == struct.unpack_from("<I", frame, 12)[0]
