"""The index of a stored file: which tensor lies where, and what a file may claim (docs/FORMAT.md, section 6).

Nothing read is trusted. Beyond the format's rules a file's tensors must be in proportion to its bytes: a
packed frame takes at least 4 bytes for 1,024 values and an entropy frame a bit for each, but a dedup frame of
a few bytes may say that one row stands for 2^31 values. Tensors of more than ``DENSE_VALUES`` values a byte
may therefore hold ``SPARSE_VALUES`` values in a file together. So what a file decodes to takes at most 1,024
times its own size plus 256 MiB, which is known before anything is allocated; ``store.save`` keeps to it.
"""

import json
import math
import os
import stat
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BufferedReader
from typing import Any

import torch

from tightrec.compression.frames import FrameError, sentence
from tightrec.kernels.format import (
    BLOCK_HEADER_BYTES,
    FRAME_ALIGNMENT,
    FRAME_HEADER_BYTES,
    MAX_BLOCK_VALUES,
    MAX_DIM,
    Fault,
)

FILE_MAGIC = b"TRECFILE"
FILE_VERSION = 1
HEAD = struct.Struct("<8sIII")
"""Magic, version, length of the index, its CRC-32."""
MAX_INDEX_BYTES = 2**26
MAX_DIMENSIONS = 64
DENSE_VALUES = 256
SPARSE_VALUES = 2**26
DTYPE_NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

PathLike = str | os.PathLike[str]


class DamagedFrame(FrameError):
    """A frame in a file breaks the format; ``fault`` says how, the message names file and tensor."""

    def __init__(self, where: str, fault: Fault) -> None:
        super().__init__(fault, 0, "")
        self.args = (f"{where}: bad frame: {sentence(fault)}",)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a stored file: a frame of one block."""

    name: str
    """Unique in the file."""
    dtype: str
    """float32, float16 or bfloat16."""
    shape: tuple[int, ...]
    """Of the tensor; () for a single value."""
    rows: int
    """Rows of the block; rows x dim is the number of elements."""
    dim: int
    """Values in a row, 1 to 2,048."""
    offset: int
    """Bytes from the first frame to this one."""
    size: int
    """Bytes of the frame."""

    @property
    def values(self) -> int:
        """Number of elements."""
        return self.rows * self.dim

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type as torch's."""
        return DTYPE_NAMES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Index:
    """What a stored file says of its tensors, checked against the file's size."""

    entries: tuple[Entry, ...]
    """In the order of the frames."""
    start: int
    """Byte of the file at which the first frame starts."""
    file_bytes: int
    """Size of the whole file."""


def open_regular(path: PathLike) -> BufferedReader:
    """Open a file for reading.

    Raises:
        OSError: it is missing, a folder or not readable.
        ValueError: it is a pipe, a device or a socket, whose size is not known.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{os.fspath(path)}: not a regular file")
    return open(path, "rb")


def read_index(path: PathLike) -> Index:
    """The index of a stored file; reads no frame.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no stored file, is cut short, or its index is wrong; says how.
    """
    with open_regular(path) as file:
        return index_of(file, os.fspath(path))


def index_of(file: BufferedReader, path: str) -> Index:
    """The index of an open stored file; ``path`` is for messages."""
    file_bytes = os.fstat(file.fileno()).st_size
    file.seek(0)
    head = file.read(HEAD.size)
    if head[: len(FILE_MAGIC)] != FILE_MAGIC[: len(head)] or not head:
        raise ValueError(f"{path}: not a stored file of tightrec (it does not start with TRECFILE)")
    if len(head) < HEAD.size:
        raise ValueError(f"{path}: cut short within its first {HEAD.size} bytes")
    _, version, length, checksum = HEAD.unpack(head)
    if version != FILE_VERSION:
        raise ValueError(f"{path}: stored files of version {version} are not known here, only {FILE_VERSION}")
    start = aligned(HEAD.size + length)
    if length > MAX_INDEX_BYTES or start > file_bytes:
        raise ValueError(f"{path}: cut short, or its index is not {length} bytes long as its header says")
    text = file.read(length)
    padding = file.read(start - HEAD.size - length)
    if len(text) + len(padding) != start - HEAD.size:
        raise ValueError(f"{path}: cut short while it was read")
    if any(padding):
        raise ValueError(f"{path}: the padding behind its index is not zero")
    if zlib.crc32(text) != checksum:
        raise ValueError(f"{path}: damaged: the checksum of its index does not match")
    try:
        entries = _entries(_parsed(text), file_bytes - start)
        check_claims([(entry.values, entry.size) for entry in entries])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Index(entries=entries, start=start, file_bytes=file_bytes)


def file_head(text: bytes) -> bytes:
    """What a file with this index text starts with, the text included."""
    return HEAD.pack(FILE_MAGIC, FILE_VERSION, len(text), zlib.crc32(text)) + text


def index_text(entries: Sequence[Entry]) -> bytes:
    """The index as it stands in a file.

    Raises:
        ValueError: a name is not text, or there are so many tensors that the index gets too long.
    """
    for entry in entries:
        _name({"name": entry.name}, "a tensor")
    # Escaped as ASCII so that its length does not depend on how names are normalised or shown.
    text = json.dumps({"tensors": [asdict(entry) for entry in entries]}, separators=(",", ":")).encode()
    if len(text) > MAX_INDEX_BYTES:
        raise ValueError(
            f"the index of {len(entries)} tensors would take {len(text)} bytes; at most {MAX_INDEX_BYTES} "
            f"are allowed: use several files"
        )
    return text


def aligned(size: int) -> int:
    """A number of bytes rounded up to a multiple of 16."""
    return -(-size // FRAME_ALIGNMENT) * FRAME_ALIGNMENT


def sparse_values(values: int, size: int) -> int:
    """The values that count against ``SPARSE_VALUES``: all of a frame, or none where it is dense enough."""
    return values if values > DENSE_VALUES * size else 0


def check_claims(claims: Sequence[tuple[int, int]]) -> None:
    """Refuse values out of proportion to their bytes; ``claims`` are (values, bytes) of frames or blocks.

    Raises:
        ValueError: the sparse ones hold more than ``SPARSE_VALUES`` values together.
    """
    sparse = sum(sparse_values(values, size) for values, size in claims)
    if sparse > SPARSE_VALUES:
        raise ValueError(
            f"it says that {sparse} values lie in less than a byte for {DENSE_VALUES} of them; at most "
            f"{SPARSE_VALUES} may, so that a small file cannot fill the memory"
        )


def _parsed(text: bytes) -> list[Any]:
    """The list of tensors in an index, its elements not yet looked at."""
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("its index is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"its index is not valid JSON in UTF-8 ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("tensors"), list):
        raise ValueError("its index is not an object with a list 'tensors'")
    return content["tensors"]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _entries(items: list[Any], data_bytes: int) -> tuple[Entry, ...]:
    """Checked entries of an index, whose frames must fill ``data_bytes`` exactly."""
    entries: list[Entry] = []
    names: set[str] = set()
    end = 0
    for number, item in enumerate(items):
        entry = _entry(item, f"tensor {number} of its index")
        if entry.name in names:
            raise ValueError(f"two tensors are named {entry.name!r}")
        if entry.offset != end:
            raise ValueError(
                f"tensor {entry.name!r} starts at byte {entry.offset} of the frames, but the one before it "
                f"ends at {end}"
            )
        end += entry.size
        if end > data_bytes:
            raise ValueError(
                f"cut short: tensor {entry.name!r} ends at byte {end} of the frames, but the file holds "
                f"{data_bytes} bytes of frames"
            )
        names.add(entry.name)
        entries.append(entry)
    if end != data_bytes:
        raise ValueError(f"{data_bytes - end} bytes behind its last frame belong to nothing")
    return tuple(entries)


def _entry(item: Any, where: str) -> Entry:
    """One checked entry; ``where`` says which for as long as its name is not known."""
    if not isinstance(item, dict):
        raise ValueError(f"{where} is not an object")
    name = _name(item, where)
    where = f"tensor {name!r}"
    dtype, shape = item.get("dtype"), item.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPE_NAMES:
        raise ValueError(f"{where}: its type is {_short(dtype)}, not one of {', '.join(DTYPE_NAMES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise ValueError(
            f"{where}: its shape {_short(shape)} is not a list of at most {MAX_DIMENSIONS} sizes"
        )
    # torch multiplies up strides of empty tensors as well, with 64 bits.
    if math.prod(max(size, 1) for size in shape) >= 2**63:
        raise ValueError(f"{where}: its shape {_short(shape)} is larger than tensors can be")
    rows = _integer(item, "rows", 0, MAX_BLOCK_VALUES, where)
    dim = _integer(item, "dim", 1, MAX_DIM, where)
    if rows * dim != math.prod(shape):
        raise ValueError(f"{where}: {rows} rows of {dim} values do not make the shape {_short(shape)}")
    if rows * dim > MAX_BLOCK_VALUES:
        raise ValueError(
            f"{where}: {rows} rows of {dim} values are more than the 2^31 - 1 that a block holds"
        )
    size = _integer(item, "size", FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES, 2**63 - 1, where)
    if size % FRAME_ALIGNMENT:
        raise ValueError(f"{where}: its frame has {size} bytes, not a multiple of {FRAME_ALIGNMENT}")
    offset = _integer(item, "offset", 0, 2**63 - 1, where)
    return Entry(name=name, dtype=dtype, shape=tuple(shape), rows=rows, dim=dim, offset=offset, size=size)


def _name(item: dict[str, Any], where: str) -> str:
    name = item.get("name")
    if not isinstance(name, str):
        raise ValueError(f"{where}: its name is {_short(name)}, not a text")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: its name {name!a} is not valid Unicode") from None
    return name


def _integer(item: dict[str, Any], key: str, low: int, high: int, where: str) -> int:
    value = item.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{where}: its {key} is {_short(value)}, not an integer from {low} to {high}")
    return value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _short(value: Any) -> str:
    """A value from a file as a message shows it, cut where somebody made it long."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
