"""What a stored file or a bare frame says of itself, read from headers without decoding values.

A description costs memory in proportion to the number of blocks. With checksums every byte is read, in
pieces.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BufferedReader
from typing import Any, Literal

from tightrec.compression.index import (
    DTYPE_NAMES,
    FILE_MAGIC,
    DamagedFrame,
    Entry,
    PathLike,
    index_of,
    open_regular,
)
from tightrec.compression.store import checksum_matches_in
from tightrec.kernels.format import (
    BLOCK_FLAG_CODEBOOK,
    BLOCK_HEADER_BYTES,
    CODEBOOK_BYTES,
    DTYPES,
    FRAME_ALIGNMENT,
    FRAME_FLAG_CHECKSUM,
    FRAME_HEADER_BYTES,
    MAGIC,
    MAX_BLOCK_VALUES,
    MAX_BOUND,
    MAX_DIM,
    MIN_BOUND,
    VERSION,
    Fault,
    Mode,
)

__all__ = ["Block", "Description", "Frame", "describe", "is_stored_file"]

_CODED = (Mode.ENTROPY, Mode.DEDUP_ENTROPY)
_DEDUP = (Mode.DEDUP, Mode.DEDUP_ENTROPY)
_HALF = (Mode.FLOAT16, Mode.BFLOAT16)
_NAME_OF_DTYPE = {DTYPES.index(dtype): name for name, dtype in DTYPE_NAMES.items()}
_VALUE_BYTES = {name: dtype.itemsize for name, dtype in DTYPE_NAMES.items()}
_MAGIC_BYTES = struct.pack("<I", MAGIC)

Checksum = Literal["matches", "absent", "not checked"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block header, and what follows from it."""

    mode: str
    """raw, float16, bfloat16, packed, dedup, entropy or dedup_entropy."""
    bound: float
    """Absolute error bound; 0 where the block was asked to be lossless."""
    rows: int
    """Number of rows."""
    dim: int
    """Values in a row."""
    distinct: int | None
    """Rows that were sent, in the dedup modes."""
    codebook: int
    """Id of the codebook in the entropy modes, else 0."""
    brings_codebook: bool
    """Whether the codebook is in the payload."""
    payload_bytes: int
    """Size of the payload."""
    original_bytes: int
    """Size of the values in the frame's type."""

    @property
    def values(self) -> int:
        """Number of values."""
        return self.rows * self.dim


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame's headers."""

    version: int
    """Of the frame format."""
    dtype: str
    """Type of the values."""
    checksum: Checksum
    """A wrong one raises instead."""
    frame_bytes: int
    """Size of the frame."""
    blocks: tuple[Block, ...]
    """In the frame's order."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """A stored file, or a bare frame."""

    path: str
    """As it was given."""
    file_bytes: int
    """Size of the file."""
    entries: tuple[Entry, ...]
    """Of a stored file, one for each frame; () for a bare frame."""
    frames: tuple[Frame, ...]
    """Those of the file, or the bare one."""

    @property
    def stored(self) -> bool:
        """Whether it is a stored file."""
        return self.entries != () or self.frames == ()

    def rows(self) -> Iterator[tuple[str, Frame, Block]]:
        """(name, frame, block) of every block: the tensor's name, or the block's number in a bare frame."""
        for number, frame in enumerate(self.frames):
            for block_number, block in enumerate(frame.blocks):
                yield (self.entries[number].name if self.entries else str(block_number)), frame, block

    def as_json(self) -> dict[str, Any]:
        """The same in lists and numbers."""
        frames = []
        for number, frame in enumerate(self.frames):
            blocks = [asdict(block) | _derived(block, block.payload_bytes) for block in frame.blocks]
            entry = {"tensor": asdict(self.entries[number])} if self.entries else {}
            frames.append(entry | asdict(frame) | {"blocks": blocks})
        kind = "stored file" if self.stored else "frame"
        return {"path": self.path, "kind": kind, "file_bytes": self.file_bytes, "frames": frames}


def is_stored_file(path: PathLike) -> bool:
    """Whether a file is a stored file (or the beginning of one), rather than a bare frame.

    Raises:
        OSError: it cannot be read.
        ValueError: it is neither.
    """
    with open_regular(path) as file:
        head = file.read(len(FILE_MAGIC))
    if head == FILE_MAGIC:
        return True
    if head[:4] == _MAGIC_BYTES:
        return False
    raise ValueError(
        f"{os.fspath(path)}: neither a stored file nor a frame of tightrec (it does not start with TREC)"
    )


def describe(path: PathLike, *, checksums: bool = True) -> Description:
    """Read the headers of a stored file or of a bare frame.

    Raises:
        OSError: it cannot be read.
        ValueError: it is neither, is cut short, or its index is wrong; says how.
        FrameError: a header breaks the format, or a checksum does not match; names the tensor.
    """
    name = os.fspath(path)
    stored = is_stored_file(path)
    with open_regular(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        if not stored:
            frame = _frame(file, 0, file_bytes, name, checksums)
            return Description(path=name, file_bytes=file_bytes, entries=(), frames=(frame,))
        index = index_of(file, name)
        frames = []
        for entry in index.entries:
            where = f"{name}: tensor {entry.name!r}"
            frame = _frame(file, index.start + entry.offset, entry.size, where, checksums)
            _agree(entry, frame, where)
            frames.append(frame)
    return Description(path=name, file_bytes=file_bytes, entries=index.entries, frames=tuple(frames))


def _agree(entry: Entry, frame: Frame, where: str) -> None:
    """Refuse a frame that is not what the index says."""
    if frame.checksum == "absent":
        raise DamagedFrame(where, Fault.CHECKSUM)
    if frame.dtype != entry.dtype:
        raise DamagedFrame(where, Fault.DTYPE)
    if len(frame.blocks) != 1:
        raise DamagedFrame(where, Fault.BLOCKS)
    (block,) = frame.blocks
    if block.rows != entry.rows:
        raise DamagedFrame(where, Fault.ROWS)
    if block.dim != entry.dim:
        raise DamagedFrame(where, Fault.DIM)
    if block.codebook and not block.brings_codebook:
        raise DamagedFrame(where, Fault.CODEBOOK_MISSING)


def _frame(file: BufferedReader, start: int, size: int, where: str, checksums: bool) -> Frame:
    """The headers of a frame of ``size`` bytes, checked as far as headers go."""
    file.seek(start)
    head = file.read(FRAME_HEADER_BYTES)
    if len(head) < FRAME_HEADER_BYTES:
        raise DamagedFrame(where, Fault.TRUNCATED)
    magic, version, dtype, flags, reserved, count, checksum, stated = struct.unpack("<IBBBBIIQ", head)
    if magic != MAGIC:
        raise DamagedFrame(where, Fault.MAGIC)
    if version != VERSION:
        raise DamagedFrame(where, Fault.VERSION)
    if dtype not in _NAME_OF_DTYPE:
        raise DamagedFrame(where, Fault.DTYPE)
    if flags & ~FRAME_FLAG_CHECKSUM or reserved or (checksum and not flags):
        raise DamagedFrame(where, Fault.RESERVED)
    if stated != size or size % FRAME_ALIGNMENT:
        raise DamagedFrame(where, Fault.FRAME_SIZE)
    if FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES * count > size:
        raise DamagedFrame(where, Fault.TRUNCATED)
    # Before the block headers: a damaged one is told as what it is.
    if flags and checksums and not checksum_matches_in(file, start, size):
        raise DamagedFrame(where, Fault.CHECKSUM)
    file.seek(start + FRAME_HEADER_BYTES)
    headers = file.read(BLOCK_HEADER_BYTES * count)
    if len(headers) < BLOCK_HEADER_BYTES * count:
        raise DamagedFrame(where, Fault.TRUNCATED)
    dtype_name = _NAME_OF_DTYPE[dtype]
    at = FRAME_HEADER_BYTES + len(headers)
    blocks = []
    for number in range(count):
        header = headers[BLOCK_HEADER_BYTES * number :][:BLOCK_HEADER_BYTES]
        inner = where if count == 1 else f"{where}: block {number}"
        blocks.append(_block(file, header, dtype_name, start + at, size - at, inner))
        at += blocks[-1].payload_bytes
    if size - at >= FRAME_ALIGNMENT:
        raise DamagedFrame(where, Fault.FRAME_SIZE)
    file.seek(start + at)
    if any(file.read(size - at)):
        raise DamagedFrame(where, Fault.PADDING)
    state: Checksum = "absent" if not flags else "matches" if checksums else "not checked"
    return Frame(version=version, dtype=dtype_name, checksum=state, frame_bytes=size, blocks=tuple(blocks))


def _block(file: BufferedReader, header: bytes, dtype: str, start: int, room: int, where: str) -> Block:
    """A block header whose payload starts at ``start`` with at most ``room`` bytes."""
    number, flags, dim, rows, bound, codebook, size = struct.unpack("<BBHIfIQ", header)
    if number > max(Mode) or (number in _HALF and dtype != "float32") or (not rows and number):
        raise DamagedFrame(where, Fault.MODE)
    mode = Mode(number)
    if flags & ~BLOCK_FLAG_CODEBOOK or (flags and mode not in _CODED):
        raise DamagedFrame(where, Fault.RESERVED)
    if not 1 <= dim <= MAX_DIM:
        raise DamagedFrame(where, Fault.DIM)
    if rows * dim > MAX_BLOCK_VALUES:
        raise DamagedFrame(where, Fault.ROWS)
    if not (MIN_BOUND <= bound <= MAX_BOUND or (bound == 0 and mode == Mode.RAW)):
        raise DamagedFrame(where, Fault.BOUND)
    if bool(codebook) != (mode in _CODED):
        raise DamagedFrame(where, Fault.CODEBOOK)
    value_bytes = 2 if mode in _HALF else _VALUE_BYTES[dtype]
    plain = mode in (Mode.RAW, *_HALF)
    if size % 4 or size > room or (plain and size != -(-rows * dim * value_bytes // 4) * 4):
        raise DamagedFrame(where, Fault.PAYLOAD_SIZE)
    distinct = _distinct(file, start + CODEBOOK_BYTES * flags, size, rows, where) if mode in _DEDUP else None
    return Block(
        mode=mode.name.lower(),
        bound=bound,
        rows=rows,
        dim=dim,
        distinct=distinct,
        codebook=codebook,
        brings_codebook=bool(flags),
        payload_bytes=size,
        original_bytes=rows * dim * _VALUE_BYTES[dtype],
    )


def _distinct(file: BufferedReader, at: int, size: int, rows: int, where: str) -> int:
    """The first word of a dedup payload, behind its codebook."""
    file.seek(at)
    word = file.read(4)
    if size < 4 or len(word) < 4:
        raise DamagedFrame(where, Fault.PAYLOAD_SIZE)
    (distinct,) = struct.unpack("<I", word)
    if not 1 <= distinct <= rows:
        raise DamagedFrame(where, Fault.DISTINCT)
    return distinct


def _derived(block: Block, size: int) -> dict[str, float | None]:
    """Ratio and bits for each value where there are any."""
    if not block.values or not size:
        return {"ratio": None, "bits_per_value": None}
    return {"ratio": block.original_bytes / size, "bits_per_value": 8 * size / block.values}
