"""Writes frames from explicit pieces, legal or not: each field of docs/FORMAT.md is an argument somewhere.

Written from that document alone. What is left out (None) gets the value that the document asks for, so that
a bad frame differs from a good one in one argument. A *symbol* is a value as section 3 sends it: a code is an
int u >= 0, an exception is ``Exact(bits)``. Words are lists of ints.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Exact:
    """An exception: a value sent as its own bits."""

    bits: int


Symbol = int | Exact


def words_to_bytes(words: Sequence[int]) -> bytes:
    """Words, least significant byte first."""
    return struct.pack(f"<{len(words)}I", *words)


def pad(data: bytes, multiple: int, fill: int = 0) -> bytes:
    """``data`` and as many ``fill`` bytes as make its size a multiple."""
    return data + bytes([fill]) * (-len(data) % multiple)


def value_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def values_to_bytes(bits: Sequence[int], dtype: str) -> bytes:
    """Values in order in their own type: section 4.1 without its padding."""
    return b"".join(x.to_bytes(value_bytes(dtype), "little") for x in bits)


def float_bits(value: float) -> int:
    """The bits of a float32."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


# Frame and block headers (1, 2)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block header and its payload."""

    mode: int
    rows: int
    dim: int
    bound: float = 0.0
    payload: bytes = b""
    flags: int = 0
    codebook: int = 0
    bound_bits: int | None = None
    size: int | None = None

    def header(self) -> bytes:
        bound = float_bits(self.bound) if self.bound_bits is None else self.bound_bits
        size = len(self.payload) if self.size is None else self.size
        return struct.pack("<BBHIIIQ", self.mode, self.flags, self.dim, self.rows, bound, self.codebook, size)


def frame(
    blocks: Sequence[Block],
    dtype: str = "float32",
    *,
    magic: bytes = b"TREC",
    version: int = 1,
    dtype_code: int | None = None,
    flags: int = 0,
    reserved: int = 0,
    count: int | None = None,
    checksum: int | None = None,
    size: int | None = None,
    padding: bytes | None = None,
) -> bytes:
    """A frame; ``flags`` bit 0 fills in the checksum unless ``checksum`` is given."""
    body = b"".join([b.header() for b in blocks] + [b.payload for b in blocks])
    body += bytes(-(24 + len(body)) % 16) if padding is None else padding
    size = 24 + len(body) if size is None else size
    code = DTYPES.index(dtype) if dtype_code is None else dtype_code
    count = len(blocks) if count is None else count
    start = magic + struct.pack("<BBBBI", version, code, flags, reserved, count)
    end = struct.pack("<Q", size) + body
    if checksum is None:
        checksum = zlib.crc32(start + bytes(4) + end) if flags & 1 else 0
    return start + struct.pack("<I", checksum) + end


# Groups, tiles and packed payloads (4.2)


@dataclass(frozen=True)
class Group:
    """A group's kind and data."""

    kind: int
    words: list[int]


def planes_of(numbers: Sequence[int], count: int) -> list[int]:
    """Words that hold bit 0, 1, .. of up to 32 numbers, number i at bit i."""
    return [sum((x >> j & 1) << i for i, x in enumerate(numbers)) for j in range(count)]


def halves(bits: Sequence[int], dtype: str) -> list[int]:
    """Values' bits in words: one to a word, or two of the 16-bit types."""
    data = pad(values_to_bytes(bits, dtype), 4)
    return list(struct.unpack(f"<{len(data) // 4}I", data))


def plain(codes: Sequence[int], width: int | None = None) -> Group:
    """A plain group of up to 32 codes, as wide as the largest needs."""
    width = max(codes).bit_length() if width is None else width
    return Group(width, planes_of(codes, width))


def raw(bits: Sequence[int], dtype: str) -> Group:
    """A raw group; missing values are zero bits."""
    return Group(25, halves([*bits, *[0] * (32 - len(bits))], dtype))


def mixed(
    symbols: Sequence[Symbol],
    dtype: str,
    width: int | None = None,
    mask: int | None = None,
    kind: int | None = None,
) -> Group:
    """A mixed group of up to 32 symbols; ``mask`` and ``kind`` overrule what follows from them."""
    codes = [0 if isinstance(s, Exact) else s for s in symbols]
    width = max(codes).bit_length() if width is None else width
    if mask is None:
        mask = sum(isinstance(s, Exact) << i for i, s in enumerate(symbols))
    exceptions = halves([s.bits for s in symbols if isinstance(s, Exact)], dtype)
    words = [mask, *planes_of(codes, width), *exceptions]
    return Group(24 + len(words) if kind is None else kind, words)


def canonical_group(symbols: Sequence[Symbol], decoded: Sequence[int], dtype: str) -> Group:
    """The group that an encoder chooses (5, Kind of a group); ``decoded`` are the bits it decodes to."""
    raw_group = raw(decoded, dtype)
    if any(isinstance(s, Exact) for s in symbols):
        chosen = mixed(symbols, dtype)
    else:
        chosen = plain([s for s in symbols if isinstance(s, int)])
    return chosen if len(chosen.words) < len(raw_group.words) else raw_group


@dataclass(frozen=True)
class Tile:
    """A tile's entry and data."""

    entry: int
    words: list[int]


def tile(
    groups: Sequence[Group],
    *,
    base: int | None = None,
    planes: int | None = None,
    plane_words: list[int] | None = None,
    size: int | None = None,
    reserved: int = 0,
) -> Tile:
    """A tile of up to 32 groups."""
    kinds = [group.kind for group in groups]
    base = min(kinds) if base is None else base
    count = max(kind - base for kind in kinds).bit_length() if planes is None else planes
    if plane_words is None:
        plane_words = planes_of([kind - base for kind in kinds], count)
    words = plane_words + [word for group in groups for word in group.words]
    size = len(words) if size is None else size
    return Tile(size | base << 11 | count << 17 | reserved << 20, words)


def packed(tiles: Sequence[Tile], offsets: Sequence[int] | None = None) -> bytes:
    """A packed payload; ``offsets`` overrules the segment offsets."""
    if offsets is None:
        offsets = [sum(len(t.words) for t in tiles[:k]) for k in range(32, len(tiles), 32)]
    entries = [t.entry for t in tiles]
    return words_to_bytes([*offsets, *entries, *[word for t in tiles for word in t.words]])


def canonical_packed(symbols: Sequence[Symbol], decoded: Sequence[int], dtype: str) -> bytes:
    """The packed payload that an encoder writes; ``decoded`` are the bits it decodes to, for raw groups."""
    spans = [slice(at, at + 32) for at in range(0, len(symbols), 32)]
    groups = [canonical_group(symbols[span], decoded[span], dtype) for span in spans]
    return packed([tile(groups[at : at + 32]) for at in range(0, len(groups), 32)])


# Dedup (4.3)


def dedup(indices: Sequence[int], distinct: int | None = None, width: int | None = None) -> bytes:
    """What stands before the distinct rows' own payload."""
    distinct = max(indices) + 1 if distinct is None else distinct
    width = max(distinct - 1, 0).bit_length() if width is None else width
    words = [distinct]
    for at in range(0, len(indices), 32):
        words += planes_of(indices[at : at + 32], width)
    return words_to_bytes(words)


# Codebooks, chunks and strips (4.4)


def codebook(lengths: Sequence[int]) -> bytes:
    """The 128 bytes of a codebook."""
    return bytes(low | high << 4 for low, high in zip(lengths[0::2], lengths[1::2], strict=True))


def code_words(lengths: Sequence[int]) -> dict[int, str]:
    """Each symbol's code as a string of bits in stream order."""
    words, code, previous = {}, 0, 0
    for length, symbol in sorted((n, s) for s, n in enumerate(lengths) if n):
        code <<= length - previous
        words[symbol] = f"{code:0{length}b}"
        code, previous = code + 1, length
    return words


def least_first(number: int, bits: int) -> str:
    """A number's bits in stream order."""
    return f"{number:0{bits}b}"[::-1]


def stream(symbols: Sequence[Symbol], lengths: Sequence[int], dtype: str, escape: bool = False) -> str:
    """The bits of the symbols; ``escape`` sends every code through symbol 254."""
    words, bits = code_words(lengths), []
    for s in symbols:
        if isinstance(s, Exact):
            bits.append(words[255] + least_first(s.bits, 8 * value_bytes(dtype)))
        elif s >= 254 or s not in words or escape:
            bits.append(words[254] + least_first(s, 24))
        else:
            bits.append(words[s])
    return "".join(bits)


def chunk(bits: str, size: int | None = None) -> bytes:
    """A chunk from its bits, zeros up to ``size`` bytes."""
    size = -(-len(bits) // 8) if size is None else size
    return int(bits[::-1] or "0", 2).to_bytes(size, "little")


@dataclass(frozen=True)
class Strip:
    """The second word of a strip's entry, and its data."""

    entry: int
    data: bytes


def strip(
    chunks: Sequence[bytes],
    *,
    base: int | None = None,
    planes: int | None = None,
    reserved: int = 0,
    fill: int = 0,
) -> Strip:
    """A strip of up to 32 chunks; ``fill`` is what stands in the bytes after the last."""
    sizes = [len(c) for c in chunks]
    base = min(sizes) if base is None else base
    count = max(size - base for size in sizes).bit_length() if planes is None else planes
    words = words_to_bytes(planes_of([size - base for size in sizes], count))
    return Strip(base | count << 16 | reserved << 20, words + pad(b"".join(chunks), 4, fill))


def coded(strips: Sequence[Strip], offsets: Sequence[int] | None = None) -> bytes:
    """A coded payload; ``offsets`` overrules the strips' offsets."""
    if offsets is None:
        offsets = [sum(len(s.data) for s in strips[:k]) // 4 for k in range(len(strips))]
    entries = [word for offset, s in zip(offsets, strips, strict=True) for word in (offset, s.entry)]
    return words_to_bytes(entries) + b"".join(s.data for s in strips)


def canonical_coded(symbols: Sequence[Symbol], lengths: Sequence[int], dtype: str) -> bytes:
    """The coded payload that an encoder writes."""
    spans = [slice(at, at + 256) for at in range(0, len(symbols), 256)]
    chunks = [chunk(stream(symbols[span], lengths, dtype)) for span in spans]
    return coded([strip(chunks[at : at + 32]) for at in range(0, len(chunks), 32)])
