"""CRC-32 of frames in a send or receive buffer (docs/FORMAT.md, frame header), on the CPU."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from tightrec.kernels.format import FRAME_FLAG_CHECKSUM, FRAME_HEADER_BYTES

_FLAGS, _FIELD = 6, 12
_EMPTY = bytes(4)


def stamp(buffer: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> None:
    """Set the flag and the checksum of every frame in place.

    Args:
        buffer: uint8 on the CPU.
        offsets: [P] where each frame starts.
        sizes: [P] its bytes.
    """
    memory = buffer.numpy()
    for offset, size in zip(offsets, sizes, strict=True):
        frame = memory[offset : offset + size]
        frame[_FLAGS] |= FRAME_FLAG_CHECKSUM
        frame[_FIELD : _FIELD + 4] = np.frombuffer(struct.pack("<I", _crc(frame)), dtype=np.uint8)


def mismatched(buffer: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Which frames have no checksum, or one that is not that of their bytes; arguments as in ``stamp``."""
    memory = buffer.numpy()
    bad = []
    for peer, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        frame = memory[offset : offset + size]
        right = size >= FRAME_HEADER_BYTES and bool(frame[_FLAGS] & FRAME_FLAG_CHECKSUM)
        if not right or struct.unpack("<I", frame[_FIELD : _FIELD + 4].tobytes())[0] != _crc(frame):
            bad.append(peer)
    return bad


def _crc(frame: np.ndarray) -> int:
    """Of a frame whose checksum field counts as zero."""
    memory = frame.data
    head = zlib.crc32(_EMPTY, zlib.crc32(memory[:_FIELD]))
    return zlib.crc32(memory[_FIELD + 4 :], head)
