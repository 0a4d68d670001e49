"""Tensors in a file: ``save``, ``load`` and ``read_index`` of the stored files of docs/FORMAT.md, section 6.

    save("model.trec", {"users": users, "items": items}, Bound(value=0.03, of="range"))
    again = load("model.trec")            # {"users": ..., "items": ...}, each value within its bound

A file is whole or absent: it is written beside its place and renamed. Reading trusts nothing in it.
"""

import os
import secrets
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from tightrec.compression.bounds import BoundLike, Bounds
from tightrec.compression.codebooks import Codebooks
from tightrec.compression.codec import Mode, Modes, decode, encode
from tightrec.compression.frames import FrameError, Frames, checksummed
from tightrec.compression.index import (
    DTYPE_NAMES,
    HEAD,
    MAX_DIMENSIONS,
    SPARSE_VALUES,
    DamagedFrame,
    Entry,
    Index,
    PathLike,
    aligned,
    file_head,
    index_of,
    index_text,
    open_regular,
    read_index,
    sparse_values,
)
from tightrec.compression.layout import Layout
from tightrec.kernels.format import (
    FRAME_FLAG_CHECKSUM,
    FRAME_HEADER_BYTES,
    MAX_BLOCK_VALUES,
    MAX_DIM,
    Fault,
)

__all__ = ["checksum_matches_in", "load", "read_index", "save", "split_shape", "stream"]

_NAMES = {dtype: name for name, dtype in DTYPE_NAMES.items()}
_PIECE_BYTES = 1 << 22


def save(
    path: PathLike,
    tensors: Mapping[str, Tensor],
    bounds: "Bounds | BoundLike | Sequence[BoundLike] | Mapping[str, BoundLike]",
    modes: "Modes | Mode | Sequence[Mode]" = "auto",
    *,
    backend: str = "",
) -> Index:
    """Write tensors to a stored file, which replaces what stood there; nothing is left behind on an error.

    Each tensor gets a codebook of its own symbols, and keeps it where it makes the frame smaller. A tensor of
    which so little is left that ``load`` would refuse it (see ``index``) is packed instead.

    Args:
        path: of the file.
        tensors: float32, float16 or bfloat16, of any shape, on the CPU or a GPU, by name.
        bounds: of each tensor, in their order or by name; floats are absolute.
        modes: of each tensor.
        backend: as in ``encode``.

    Returns:
        The index of what was written.

    Raises:
        ValueError: a tensor, bound or mode that cannot be stored, by name.
        OSError: the file cannot be written.
    """
    path = Path(path)
    names = tuple(tensors)
    if not isinstance(bounds, Bounds):
        bounds = Bounds.of(bounds, names)
    if not isinstance(modes, Modes):
        modes = Modes.of(modes, names)
    if len(bounds.bounds) != len(names) or len(modes.modes) != len(names):
        raise ValueError(f"{len(bounds.bounds)} bounds and {len(modes.modes)} modes for {len(names)} tensors")
    widest = [_entry(name, tensor, 2**63, 2**63) for name, tensor in tensors.items()]
    # Sizes are known when the frames are written, so the index gets the room that it takes at most.
    room = len(index_text(widest))
    partial = path.with_name(f".tightrec-{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(bytes(aligned(HEAD.size + room)))
            entries: list[Entry] = []
            end = sparse = 0
            for name, bound, mode in zip(names, bounds.bounds, modes.modes, strict=True):
                frame = _frame(name, tensors[name], bound, mode, backend)
                values = tensors[name].numel()
                if sparse + sparse_values(values, len(frame)) > SPARSE_VALUES:
                    frame = _frame(name, tensors[name], bound, "packed", backend)
                sparse += sparse_values(values, len(frame))
                file.write(frame)
                entries.append(_entry(name, tensors[name], end, len(frame)))
                end += len(frame)
            file.seek(0)
            # JSON may end in spaces: they fill the room that the sizes did not take.
            file.write(file_head(index_text(entries).ljust(room)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    start = aligned(HEAD.size + room)
    return Index(entries=tuple(entries), start=start, file_bytes=start + end)


def load(path: PathLike, *, backend: str = "") -> dict[str, Tensor]:
    """The tensors of a stored file by name, on the CPU.

    Args:
        path: of the file.
        backend: as in ``decode``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no stored file, is cut short, or its index is wrong; says how.
        FrameError: a frame is damaged; ``fault`` is ``Fault.CHECKSUM`` where its checksum does not match.
        MemoryError: the tensors do not fit in memory.
    """
    return {entry.name: values for entry, values in stream(path, backend=backend)}


def stream(path: PathLike, *, backend: str = "") -> Iterator[tuple[Entry, Tensor]]:
    """The tensors of a stored file one after another, each with its entry; raises what ``load`` does."""
    with open_regular(path) as file:
        index = index_of(file, os.fspath(path))
        for entry in index.entries:
            where = f"{os.fspath(path)}: tensor {entry.name!r}"
            buffer = _read_frame(file, index.start + entry.offset, entry.size, where)
            layout = Layout.flat([[entry.rows]], [entry.dim])
            try:
                out = torch.empty(entry.values, dtype=entry.torch_dtype)
            except RuntimeError:
                raise MemoryError(f"{where}: {entry.values} values do not fit in memory") from None
            try:
                decode(Frames.received(buffer, torch.tensor([entry.size])), layout, out, backend=backend)
            except FrameError as error:
                raise DamagedFrame(where, error.fault) from None
            yield entry, out.view(entry.shape)


def checksum_matches_in(file: BufferedReader, offset: int, size: int) -> bool:
    """``frames.checksum_matches`` for a frame in a file, which is read in pieces of 4 MiB."""
    file.seek(offset)
    head = file.read(FRAME_HEADER_BYTES)
    if len(head) < FRAME_HEADER_BYTES or not head[6] & FRAME_FLAG_CHECKSUM:
        return False
    crc = zlib.crc32(head[:12] + bytes(4) + head[16:])
    left = size - len(head)
    while left > 0:
        piece = file.read(min(left, _PIECE_BYTES))
        if not piece:
            return False
        crc = zlib.crc32(piece, crc)
        left -= len(piece)
    return crc == struct.unpack_from("<I", head, 12)[0]


def split_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, dim) of the block that carries a tensor of this shape; rows x dim is its number of elements.

    Rows are the last dimension where it fits a row of 2,048 values, so that equal rows are found; else as
    many values as divide it, or the number of elements, without rest.
    """
    count = 1
    for size in shape:
        count *= size
    last = shape[-1] if len(shape) > 1 else count
    if count == 0:
        return 0, last if 1 <= last <= MAX_DIM else 1
    dim = _divisor(last)
    # A last dimension without useful divisors (a prime) would leave rows of a value each.
    if dim < 32 and last > MAX_DIM:
        dim = max(dim, _divisor(count))
    return count // dim, dim


def _divisor(count: int) -> int:
    """The largest divisor that fits a row."""
    return next(dim for dim in range(min(count, MAX_DIM), 0, -1) if count % dim == 0)


def _entry(name: str, tensor: Tensor, offset: int, size: int) -> Entry:
    """What the index says of a tensor.

    Raises:
        ValueError: the tensor has a type or shape that cannot be stored.
    """
    if tensor.dtype not in _NAMES:
        raise ValueError(f"tensor {name!r} is {tensor.dtype}; float32, float16 and bfloat16 can be stored")
    if tensor.numel() > MAX_BLOCK_VALUES:
        raise ValueError(
            f"tensor {name!r} has {tensor.numel()} values; at most 2^31 - 1 can be stored: split it"
        )
    if tensor.dim() > MAX_DIMENSIONS:
        raise ValueError(
            f"tensor {name!r} has {tensor.dim()} dimensions; at most {MAX_DIMENSIONS} can be stored"
        )
    shape = tuple(tensor.shape)
    rows, dim = split_shape(shape)
    return Entry(
        name=name, dtype=_NAMES[tensor.dtype], shape=shape, rows=rows, dim=dim, offset=offset, size=size
    )


def _frame(name: str, tensor: Tensor, bound: BoundLike, mode: Mode, backend: str) -> bytes:
    """A tensor as one frame of one block with checksum, and with a codebook where that makes it smaller."""
    values = tensor.detach().reshape(-1).contiguous()
    rows, dim = split_shape(tensor.shape)
    layout = Layout.flat([[rows]], [dim], [name])
    books = Codebooks(1, 1, values.device)
    plain = _bytes(encode(values, layout, [bound], mode, codebooks=books, backend=backend))
    # The first pass has no codebook and counts; without counts the mode asked for does not use one.
    if mode not in ("auto", "entropy") or not values.numel():
        return checksummed(plain)
    books.refresh()
    coded = _bytes(encode(values, layout, [bound], mode, codebooks=books, backend=backend))
    return checksummed(coded if len(coded) < len(plain) else plain)


def _bytes(frames: Frames) -> bytes:
    return frames.frame(0).cpu().numpy().tobytes()


def _read_frame(file: BufferedReader, start: int, size: int, where: str) -> Tensor:
    """A frame's bytes, uint8 [size], whose checksum matches."""
    if not checksum_matches_in(file, start, size):
        raise DamagedFrame(where, Fault.CHECKSUM)
    buffer = torch.empty(size, dtype=torch.uint8)
    file.seek(start)
    if file.readinto(memoryview(buffer.numpy())) != size:
        raise DamagedFrame(where, Fault.TRUNCATED)
    return buffer
