"""How many bytes are set aside for the next frame of a peer, the same on both ends without a word."""

from collections import deque

from tightrec.kernels.format import FRAME_ALIGNMENT, FRAME_HEADER_BYTES

_HISTORY = 8
_NEEDED = 2
_SPARE = 1.1


class FrameSlot:
    """One frame's place in a fixed-size exchange, from the sizes of the last frames on the same way.

    Sender and receiver see the same sizes in the same order, so they come to the same capacity.
    """

    def __init__(self) -> None:
        self._recent: deque[int] = deque(maxlen=_HISTORY)

    @property
    def capacity(self) -> int | None:
        """Bytes of the next slot; None until two frames have passed, whose sizes must be told."""
        if len(self._recent) < _NEEDED:
            return None
        wanted = max(FRAME_HEADER_BYTES, int(max(self._recent) * _SPARE))
        return -(-wanted // FRAME_ALIGNMENT) * FRAME_ALIGNMENT

    def record(self, size: int) -> None:
        """A frame of ``size`` bytes has passed."""
        self._recent.append(size)
