"""A small layout with an empty and a single-row peer, and values whose rows repeat."""

import torch

from tightrec.compression.frames import Frames
from tightrec.compression.layout import Layout
from tightrec.kernels.format import BLOCK_HEADER_BYTES, FRAME_HEADER_BYTES
from tightrec.kernels.format import Mode as BlockMode

TABLES = ("user", "item", "genre")
LAYOUT = Layout.columns([5, 0, 70, 1], [1, 33, 64], TABLES)
BACKENDS = ("reference", "cpu")


def rows(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A matrix of LAYOUT's shape in which rows repeat."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(20, LAYOUT.shape[1], generator=generator)
    return few[torch.randint(0, 20, (LAYOUT.shape[0],), generator=generator)].to(dtype)


def modes_of(frames: Frames, peer: int) -> list[BlockMode]:
    """The modes of a peer's blocks, read from its frame."""
    frame = frames.frame(peer)
    return [BlockMode(int(frame[FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * t])) for t in range(len(TABLES))]
