"""A decoder of frames written from docs/FORMAT.md alone, in plain Python and numpy: clear, complete, slow.

It shares no code with the package, so that a mistake there is not repeated here. Values come back as their
own bits, uint32 for float32 and uint16 for the 16-bit types. Numbers in comments are sections of FORMAT.md.
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np
from independent_payloads import (
    Rejected,
    decode_coded,
    decode_packed,
    need,
    read_codebook,
    read_indices,
    value_bytes,
)

DTYPES = ("float32", "float16", "bfloat16")
RAW, FLOAT16, BFLOAT16, PACKED, DEDUP, ENTROPY, DEDUP_ENTROPY = range(7)

Books = dict[int, tuple[int, bytes]]
"""What a receiver keeps of one sender: block number -> (codebook id, 256 code lengths)."""


@dataclass
class Block:
    """A checked block header and its payload."""

    number: int
    dtype: str
    mode: int
    has_book: bool
    dim: int
    rows: int
    bound: float
    codebook: int
    payload: bytes = b""


def read_headers(frame: bytes, expected: list[tuple[int, int]], dtype: str, checksum: bool) -> list[Block]:
    """Check header and block headers (1, 2) and cut out the payloads; ``expected`` is (rows, dim)s."""
    need(len(frame) >= 24, "TRUNCATED", "header")
    magic, version, code, flags, zero, count, crc, size = struct.unpack_from("<4sBBBBIIQ", frame)
    need(magic == b"TREC", "MAGIC", "header")
    need(version == 1, "VERSION", "header")
    need(code == DTYPES.index(dtype), "DTYPE", "header")
    need(flags <= 1 and zero == 0, "RESERVED", "header")
    need(count == len(expected), "BLOCKS", "header")
    need(size == len(frame) and size % 16 == 0, "FRAME_SIZE", "header")
    need(flags == 1 or crc == 0, "CHECKSUM", "header: not zero")
    if flags == 1 and checksum:
        need(zlib.crc32(frame[:12] + bytes(4) + frame[16:]) == crc, "CHECKSUM", "header")
    need(len(frame) >= 24 + 24 * count, "TRUNCATED", "block headers")
    blocks, at = [], 24 + 24 * count
    for number, (rows, dim) in enumerate(expected):
        fields = struct.unpack_from("<BBHIIIQ", frame, 24 + 24 * number)
        blocks.append(read_block_header(number, fields, rows, dim, dtype))
        need(fields[6] % 4 == 0, "PAYLOAD_SIZE", f"block {number}: not a multiple of 4")
        blocks[-1].payload = frame[at : at + fields[6]]
        at += fields[6]
    need(-(-at // 16) * 16 == size, "PAYLOAD_SIZE", "the sizes do not add up to the frame's")
    need(not any(frame[at:]), "PADDING", "end of the frame")
    return blocks


def read_block_header(number: int, fields: tuple[int, ...], rows: int, dim: int, dtype: str) -> Block:
    mode, flags, got_dim, got_rows, bound_bits, codebook, size = fields
    where = f"block {number}"
    need(mode <= DEDUP_ENTROPY, "MODE", where)
    need(mode not in (FLOAT16, BFLOAT16) or dtype == "float32", "MODE", f"{where}: half of a 16-bit type")
    need(flags <= 1, "RESERVED", f"{where}: flags")
    coded = mode in (ENTROPY, DEDUP_ENTROPY)
    need(flags == 0 or coded, "RESERVED", f"{where}: a codebook in mode {mode}")
    need(got_dim == dim and 1 <= dim <= 2048, "DIM", where)
    need(got_rows == rows, "ROWS", where)
    # As bits, 2^-126 to 2^125 are 0x00800000 to 0x7E000000; signs, NaN and Inf lie above, denormals below.
    lossless = mode == RAW and bound_bits in (0, 0x80000000)
    need(lossless or 0x00800000 <= bound_bits <= 0x7E000000, "BOUND", where)
    need((codebook != 0) == coded, "CODEBOOK", f"{where}: id {codebook} in mode {mode}")
    need(rows > 0 or (mode == RAW and size == 0), "MODE" if mode else "PAYLOAD_SIZE", f"{where}: no rows")
    (bound,) = struct.unpack("<f", struct.pack("<I", bound_bits))
    return Block(number, dtype, mode, flags == 1, dim, rows, bound, codebook)


def half_to_float_bits(bits: np.ndarray, mode: int) -> np.ndarray:
    """float32 bits of equal value (4.1); a NaN keeps its sign and the upper bits of its mantissa."""
    wide = bits.astype(np.uint32)
    if mode == BFLOAT16:
        return wide << np.uint32(16)
    sign, magnitude = (wide & 0x8000) << 16, wide & 0x7FFF
    exact = np.abs(bits.view(np.float16).astype(np.float64)).astype(np.float32).view(np.uint32)
    return sign | np.where(magnitude >= 0x7C00, 0x7F800000 | (magnitude & 0x3FF) << 13, exact)


def take_book(block: Block, books: Books) -> tuple[bytes, bytes]:
    """The code lengths to use and the payload behind the codebook; a valid codebook is kept."""
    if block.has_book:
        books[block.number] = (block.codebook, read_codebook(block.payload[:128]))
        return books[block.number][1], block.payload[128:]
    number, lengths = books.get(block.number, (0, b""))
    need(number == block.codebook, "CODEBOOK_MISSING", f"block {block.number}: id {block.codebook}")
    return lengths, block.payload


def decode_block(block: Block, books: Books) -> np.ndarray:
    """The bits [rows, dim] of a block; takes its codebook from ``books`` or puts it there."""
    n, mode = block.rows * block.dim, block.mode
    shape = (block.rows, block.dim)
    if mode in (RAW, FLOAT16, BFLOAT16):
        width = value_bytes(block.dtype) if mode == RAW else 2
        need(len(block.payload) == -(-n * width // 4) * 4, "PAYLOAD_SIZE", f"block {block.number}")
        bits = np.frombuffer(block.payload, f"<u{width}")[:n]
        return (bits if mode == RAW else half_to_float_bits(bits, mode)).reshape(shape)
    coded = mode in (ENTROPY, DEDUP_ENTROPY)
    lengths, payload = take_book(block, books) if coded else (b"", block.payload)
    words = np.frombuffer(payload, "<u4")
    distinct, index = block.rows, np.arange(block.rows)
    if mode in (DEDUP, DEDUP_ENTROPY):
        distinct, index, words = read_indices(words, block.rows)
    sent = distinct * block.dim
    bits = (
        decode_coded(words, sent, block.bound, block.dtype, lengths)
        if coded
        else decode_packed(words, sent, block.bound, block.dtype)
    )
    return bits.reshape(distinct, block.dim)[index]


def decode_blocks(
    frame: bytes,
    expected: list[tuple[int, int]],
    dtype: str,
    books: Books | None = None,
    checksum: bool = True,
) -> list[np.ndarray | Rejected]:
    """Each block's bits [rows, dim], or why it was rejected; raises Rejected for the headers' faults.

    ``books`` is changed. ``checksum``: compare it where the frame has one.
    """
    books = {} if books is None else books
    results: list[np.ndarray | Rejected] = []
    for block in read_headers(frame, expected, dtype, checksum):
        try:
            results.append(decode_block(block, books))
        except Rejected as fault:
            results.append(fault)
    return results


def decode_frame(
    frame: bytes,
    expected: list[tuple[int, int]],
    dtype: str,
    books: Books | None = None,
    checksum: bool = True,
) -> list[np.ndarray]:
    """Each block's bits [rows, dim]; raises Rejected for the first fault. See ``decode_blocks``."""
    arrays = []
    for result in decode_blocks(frame, expected, dtype, books, checksum):
        if isinstance(result, Rejected):
            raise result
        arrays.append(result)
    return arrays


def to_floats(bits: np.ndarray, dtype: str) -> np.ndarray:
    """float32 of the values with these bits."""
    if dtype == "float32":
        return bits.view(np.float32)
    return half_to_float_bits(bits, BFLOAT16 if dtype == "bfloat16" else FLOAT16).view(np.float32)
