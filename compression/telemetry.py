"""What frames hold for each table, read from their headers, and how much of the bound the errors use.

For sampled steps: ``frame_tables`` reads what a rank is about to send, ``worst_error_over_bound`` compares
what came out of a decoder with what went in. P peers, T tables. Frames are not checked here: ``decode`` does
that, and these are the caller's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tightrec.compression.layout import Block, Layout
from tightrec.kernels.format import (
    BLOCK_FLAG_CODEBOOK,
    BLOCK_HEADER_BYTES,
    CODEBOOK_BYTES,
    FRAME_HEADER_BYTES,
    MAGIC,
    Mode,
)

# Both headers are 24 bytes, so that one array of them spans the head of a frame.
assert FRAME_HEADER_BYTES == BLOCK_HEADER_BYTES
_HEADER = np.dtype(
    [
        ("mode", "u1"),
        ("flags", "u1"),
        ("dim", "<u2"),
        ("rows", "<u4"),
        ("bound", "<f4"),
        ("codebook", "<u4"),
        ("size", "<u8"),
    ]
)
_MAGIC = np.frombuffer(MAGIC.to_bytes(4, "little"), dtype=np.uint8)
_WORD = np.arange(4)
_NAMES = np.array([mode.name.lower() for mode in Mode])


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameTables:
    """The block headers of P frames of T tables, and what follows from them."""

    mode: NDArray[np.uint8]
    """[P, T] ``kernels.format.Mode`` that the encoder took."""
    rows: NDArray[np.int64]
    """[P, T] rows before the codec looks for equal ones."""
    distinct: NDArray[np.int64]
    """[P, T] rows that were sent: fewer than ``rows`` only in the dedup modes."""
    values: NDArray[np.int64]
    """[P, T] rows times dim."""
    bytes: NDArray[np.int64]
    """[P, T] payload and block header."""
    bound: NDArray[np.float64]
    """[P, T] absolute error bound; 0 where the block is lossless by request or empty."""
    brings_codebook: NDArray[np.bool_]
    """[P, T] whether 128 of the payload's bytes are a codebook."""
    overhead: NDArray[np.int64]
    """[P] bytes of the frame that belong to no table: its header and its padding."""

    def table_bytes(self, peers: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        """Bytes of each table [T], each frame's overhead shared out equally: they sum to the frames' bytes.

        Args:
            peers: [P] which peers to count, for those that are reached over the network; default all.
        """
        used, overhead = self.bytes, self.overhead
        if peers is not None:
            used, overhead = used[peers], overhead[peers]
        return used.sum(0) + overhead.sum() / max(used.shape[1], 1)

    def mode_names(self) -> list[str]:
        """For each table the mode of most of its rows, [T]; ``raw`` where it has none."""
        weights = np.zeros((len(Mode), self.mode.shape[1]), dtype=np.int64)
        np.add.at(weights, (self.mode, np.arange(self.mode.shape[1])[None, :]), self.rows)
        return [str(name) for name in _NAMES[weights.argmax(0)]]


def frame_tables(buffer: Tensor, offsets: Tensor, sizes: Tensor, layout: Layout) -> FrameTables:
    """Read the headers of every peer's frame.

    Args:
        buffer: uint8, as encoded. From a device only the frames' heads and the first words of dedup payloads
            are copied; that waits for it.
        offsets: int64 [P], where each frame starts in the buffer.
        sizes: int64 [P], bytes of each frame.
        layout: which blocks there are.

    Raises:
        ValueError: there is no frame of these tables at an offset.
    """
    peers, tables = layout.totals.peers, layout.totals.tables
    start = offsets.cpu().numpy().reshape(-1)
    length = sizes.cpu().numpy().reshape(-1)
    if start.size != peers or length.size != peers:
        raise ValueError(
            f"the layout has {peers} peers, but there are {start.size} offsets and {length.size} sizes"
        )
    head = FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * tables
    outside = (start < 0) | (length < head) | (start + length > buffer.numel())
    if outside.any():
        peer = int(outside.argmax())
        raise ValueError(
            f"the frame for peer {peer} is said to be bytes {start[peer]} to {start[peer] + length[peer]} of "
            f"a buffer of {buffer.numel()}, and a frame of {tables} tables takes {head} or more"
        )
    heads = _bytes_at(buffer, start[:, None] + np.arange(head))
    known = (heads[:, :4] == _MAGIC).all(1) & (heads[:, 8:12].copy().view("<u4")[:, 0] == tables)
    if not known.all():
        raise ValueError(
            f"at the offset of peer {int(known.argmin())} there is no frame of {tables} tables; give the "
            f"buffer and offsets of one encode call and its layout"
        )
    blocks = heads.view(_HEADER)[:, 1:]
    payload = blocks["size"].astype(np.int64)
    mode, rows = blocks["mode"], blocks["rows"].astype(np.int64)
    codebook = (blocks["flags"] & BLOCK_FLAG_CODEBOOK).astype(np.bool_)
    distinct = rows.copy()
    dedup = (mode == Mode.DEDUP) | (mode == Mode.DEDUP_ENTROPY)
    if dedup.any():
        at = start[:, None] + head + payload.cumsum(1) - payload + CODEBOOK_BYTES * codebook
        distinct[dedup] = _bytes_at(buffer, at[dedup][:, None] + _WORD).view("<u4")[:, 0]
    used = payload + BLOCK_HEADER_BYTES
    return FrameTables(
        mode=mode,
        rows=rows,
        distinct=distinct,
        values=rows * blocks["dim"],
        bytes=used,
        bound=blocks["bound"].astype(np.float64),
        brings_codebook=codebook,
        overhead=length - used.sum(1),
    )


def _bytes_at(buffer: Tensor, index: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Some bytes of the buffer, on the CPU."""
    if buffer.device.type == "cpu":  # numpy gathers faster than torch
        return buffer.numpy()[index]
    return buffer[torch.from_numpy(index).to(buffer.device)].cpu().numpy()


def worst_error_over_bound(exact: Tensor, decoded: Tensor, layout: Layout, bounds_abs: Tensor) -> Tensor:
    """The largest error of each table as a share of its block's bound: at most 1 where the codec keeps it.

    Nothing waits for the device. A value that came back with the same bits has no error, NaN and Inf too;
    one that became NaN, or was NaN and is not, has an infinite one. A block of bound 0 is lossless: its share
    is 0 where every bit is the same, else infinite.

    Args:
        exact: the values that were encoded, of the layout's shape.
        decoded: what the frames decode to, of the same shape and type, on the same device.
        layout: the blocks; elements outside them are not looked at.
        bounds_abs: [P, T] absolute bounds, as in ``FrameTables.bound``; on any device.

    Returns:
        float64 [T], the largest over the peers; 0 for a table without values.

    Raises:
        ValueError: a shape, type or device that does not fit.
    """
    peers, tables = layout.totals.peers, layout.totals.tables
    for name, tensor in {"exact": exact, "decoded": decoded}.items():
        if tuple(tensor.shape) != tuple(layout.shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but the layout's is {layout.shape}")
    if exact.dtype != decoded.dtype or exact.device != decoded.device:
        raise ValueError(
            f"exact is {exact.dtype} on {exact.device} and decoded {decoded.dtype} on {decoded.device}; they "
            f"must be of one type and on one device"
        )
    if tuple(bounds_abs.shape) != (peers, tables):
        raise ValueError(f"bounds_abs has shape {tuple(bounds_abs.shape)}, but {(peers, tables)} is needed")
    bound = bounds_abs.to(device=exact.device, dtype=torch.float64)
    lengths = torch.tensor(
        [[block.rows * block.dim for block in blocks] for blocks in layout.blocks], dtype=torch.int64
    )
    lengths = lengths.to(exact.device)
    shares = []
    for peer, blocks in enumerate(layout.blocks):  # one after another: temporaries of one peer's size
        before, after = _in_order(exact, blocks), _in_order(decoded, blocks)
        bits = torch.int32 if exact.element_size() == 4 else torch.int16
        same = before.view(bits) == after.view(bits)
        error = before.double().sub_(after).abs_().nan_to_num_(nan=torch.inf, posinf=torch.inf)
        worst = _largest(error.masked_fill_(same, 0.0), lengths[peer])
        changed = _largest(error.fill_(torch.inf).masked_fill_(same, 0.0), lengths[peer])
        shares.append(torch.where(bound[peer] > 0, worst / bound[peer], changed))
    return torch.stack(shares).amax(0)


def _in_order(values: Tensor, blocks: Sequence[Block]) -> Tensor:
    """The values of blocks one after another, a view where they lie so already."""
    flat = values.reshape(-1)
    held = [block for block in blocks if block.rows]
    first = end = held[0].offset if held else 0
    for block in held:
        if block.offset != end or (block.rows > 1 and block.stride != block.dim):
            break
        end += block.rows * block.dim
    else:
        return flat[first:end]
    start = flat.storage_offset()
    views = [
        flat.as_strided((block.rows, block.dim), (block.stride, 1), start + block.offset) for block in held
    ]
    return torch.cat([view.reshape(-1) for view in views])


def _largest(values: Tensor, lengths: Tensor) -> Tensor:
    """The largest value of each run of ``lengths`` values, 0 for an empty run."""
    return torch.segment_reduce(values, "max", lengths=lengths, initial=0, unsafe=True)
