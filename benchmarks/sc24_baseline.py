"""The published compressor of embedding exchanges (SC'24, arXiv 2407.04272), to compare ours with.

    .venv/bin/python benchmarks/sc24_baseline.py dump.npz [--bound 0.03] [--kind forward]

A re-implementation of the scheme, not of its kernels: an error-bounded uniform quantiser, then vector LZ or
Huffman, whichever has the larger modelled speed-up. Both coders write bytes that can be decoded again. What
the paper leaves open is settled in its favour: a match token is 5 bits of distance and 11 of length, Huffman
codes are one stream without chunks, and of a receiver's fields only eb, coder and size are counted.
The command prints float32 bytes over bytes on the wire, for tensors written by benchmarks/dump_exchange.py.

Shapes: a block is float32 [N, D], what one peer gets of one table; its codes are int8 [N, D].
"""

import argparse
import heapq
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numba import njit

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Codes = np.ndarray[Any, np.dtype[np.int8]]
Coder = Literal["vector_lz", "huffman"]

WINDOW_ROWS = 32
LZ_BLOCK_ROWS = 2048
MAX_MATCH_ROWS = 2**11
LINK_GBPS = 4.0
CODER_GBPS: dict[Coder, tuple[float, float]] = {"vector_lz": (45.0, 290.0), "huffman": (60.0, 40.0)}
"""Speed of compression and decompression on an A100, as published, GB/s of uncompressed data."""

_HEADER = struct.Struct("<fI")
"""eb, then the payload's size in bytes with the coder in bit 31."""

_MAX_HUFFMAN_BITS = 63


@dataclass(frozen=True)
class Compressed:
    """A compressed block."""

    payload: bytes
    """Header and the chosen coder's bytes."""

    coder: Coder
    """The chosen one."""

    sizes: dict[Coder, int]
    """Bytes on the wire with each coder, header included."""


def quantise(block: np.ndarray[Any, Any], eb_rel: float) -> tuple[Codes, float]:
    """The codes of a block [N, D], and eb: ``round(x / (2 eb))`` with eb = eb_rel * (max - min).

    Raises:
        ValueError: an empty block, values that are not finite or all equal, or codes that int8 cannot hold:
            the scheme has no form for them.
    """
    block = np.asarray(block, np.float32)
    if not block.size or not np.isfinite(block).all():
        raise ValueError("the block is empty or holds values that are not finite.")
    eb = np.float32(eb_rel) * (block.max() - block.min())
    if not eb > 0:
        raise ValueError("the block's values are all equal, so that a share of their range is no bound.")
    codes = np.rint(block / (2 * eb))
    largest = np.abs(codes).max()
    if largest > 127:
        raise ValueError(f"codes of {largest:.0f} do not fit a signed byte; take a larger eb_rel.")
    return codes.astype(np.int8), float(eb)


def dequantise(codes: Codes, eb: float) -> np.ndarray[Any, Any]:
    """The values that codes stand for, float32."""
    return codes.astype(np.float32) * (2 * np.float32(eb))


def speed_up(ratio: float, coder: Coder) -> float:
    """The modelled speed-up of an exchange: 1 / (1/CR + B (1/Tc + 1/Td))."""
    compress_gbps, decompress_gbps = CODER_GBPS[coder]
    return 1 / (1 / ratio + LINK_GBPS * (1 / compress_gbps + 1 / decompress_gbps))


def compress(block: np.ndarray[Any, Any], eb_rel: float) -> Compressed:
    """Compress a block [N, D] of float32 with a bound of ``eb_rel`` times its range.

    Raises:
        ValueError: as :func:`quantise`.
    """
    codes, eb = quantise(block, eb_rel)
    coded: dict[Coder, bytes] = {"vector_lz": lz_encode(codes), "huffman": huffman_encode(codes)}
    sizes = {coder: _HEADER.size + len(data) for coder, data in coded.items()}
    best = max(coded, key=lambda coder: speed_up(codes.size * 4 / sizes[coder], coder))
    header = _HEADER.pack(eb, len(coded[best]) | (best == "huffman") << 31)
    return Compressed(payload=header + coded[best], coder=best, sizes=sizes)


def decompress(payload: bytes, rows: int, dim: int) -> np.ndarray[Any, Any]:
    """The values [rows, dim] of a compressed block, float32.

    Raises:
        ValueError: the payload is damaged or of another shape.
    """
    if len(payload) < _HEADER.size:
        raise ValueError("the payload is shorter than its header.")
    eb, word = _HEADER.unpack_from(payload)
    data = payload[_HEADER.size :]
    if len(data) != word & 0x7FFFFFFF:
        raise ValueError("the payload's size differs from its header.")
    decode = huffman_decode if word >> 31 else lz_decode
    return dequantise(decode(data, rows, dim), eb)


def lz_encode(codes: Codes) -> bytes:
    """Vector LZ of codes [N, D]: a symbol is a row, matches reach back at most 32 rows.

    Blocks of 2,048 rows stand alone: offsets (4 B) of all but the first, then their data. Eight flag bits
    precede each eight tokens: 0, a literal row; 1, two bytes of distance - 1 (5 bits) and length - 1 (11).
    """
    data = [
        _lz_encode_block(np.ascontiguousarray(codes[start : start + LZ_BLOCK_ROWS])).tobytes()
        for start in range(0, len(codes), LZ_BLOCK_ROWS)
    ]
    ends = np.cumsum([len(part) for part in data[:-1]], dtype=np.uint32)
    return ends.astype("<u4").tobytes() + b"".join(data)


def lz_decode(data: bytes, rows: int, dim: int) -> Codes:
    """The codes [rows, dim] that :func:`lz_encode` wrote.

    Raises:
        ValueError: the bytes are damaged or of another shape.
    """
    blocks = -(-rows // LZ_BLOCK_ROWS)
    body = np.frombuffer(data, np.uint8)[4 * (blocks - 1) :]
    offsets = [0, *np.frombuffer(data, "<u4", count=blocks - 1).tolist(), len(body)]
    codes = np.empty((rows, dim), np.int8)
    for block in range(blocks):
        part = codes[block * LZ_BLOCK_ROWS : (block + 1) * LZ_BLOCK_ROWS]
        source = body[offsets[block] : offsets[block + 1]]
        if _lz_decode_block(source, part) != len(source):
            raise ValueError(f"LZ block {block} is damaged or of another shape.")
    return codes


@njit
def _lz_encode_block(codes: Codes) -> Bytes:
    rows, dim = codes.shape
    out = np.empty(rows * dim + rows // 8 + 1, np.uint8)
    at, flags, token, row = 0, 0, 0, 0
    while row < rows:
        if token % 8 == 0:
            flags, at = at, at + 1
            out[flags] = 0
        length, distance = 0, 0
        for back in range(1, min(WINDOW_ROWS, row) + 1):
            run = 0
            # A match may run into the rows that it makes, as in any LZ77.
            while row + run < rows and run < MAX_MATCH_ROWS:
                if (codes[row + run] != codes[row + run - back]).any():
                    break
                run += 1
            if run > length:
                length, distance = run, back
        if length * dim >= 2:
            out[flags] |= np.uint8(1 << token % 8)
            word = (distance - 1) | (length - 1) << 5
            out[at], out[at + 1] = word & 255, word >> 8
            at, row = at + 2, row + length
        else:
            for column in range(dim):
                out[at + column] = np.uint8(codes[row, column])
            at, row = at + dim, row + 1
        token += 1
    return out[:at]


@njit
def _lz_decode_block(source: Bytes, codes: Codes) -> int:
    """Fill ``codes``; returns the bytes read, or -1 for damage."""
    rows, dim = codes.shape
    at, flags, token, row = 0, 0, 0, 0
    while row < rows:
        if token % 8 == 0:
            if at >= len(source):
                return -1
            flags, at = int(source[at]), at + 1
        if flags >> token % 8 & 1:
            if at + 2 > len(source):
                return -1
            word = int(source[at]) | int(source[at + 1]) << 8
            distance, length, at = (word & 31) + 1, (word >> 5) + 1, at + 2
            if distance > row or row + length > rows:
                return -1
            for _ in range(length):
                codes[row] = codes[row - distance]
                row += 1
        else:
            if at + dim > len(source):
                return -1
            for column in range(dim):
                codes[row, column] = np.int8(source[at + column])
            at, row = at + dim, row + 1
        token += 1
    return at


def code_lengths(counts: np.ndarray[Any, Any]) -> Bytes:
    """Huffman's code lengths [256] for symbol counts [256]; 0 where a symbol does not occur."""
    lengths = np.zeros(256, np.uint8)
    present = np.flatnonzero(counts)
    if len(present) == 1:
        lengths[present] = 1
        return lengths
    # The second item breaks ties, so that the lengths are the same everywhere.
    heap = [(int(counts[symbol]), order, [int(symbol)]) for order, symbol in enumerate(present)]
    heapq.heapify(heap)
    for order in range(len(heap), 2 * len(heap) - 1):
        (low, _, left), (high, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        lengths[left + right] += 1
        heapq.heappush(heap, (low + high, order, left + right))
    return lengths


def huffman_encode(codes: Codes) -> bytes:
    """Canonical Huffman of the codes [N, D], with their codebook.

    Codebook: the lowest code, the number of codes up to the highest less 1, a length (1 B) for each of them;
    then the codes' bits, each from its most significant bit on, filled from bit 0 of the first byte.
    """
    symbols = (codes.reshape(-1).astype(np.int16) + 128).astype(np.uint8)
    lengths = code_lengths(np.bincount(symbols, minlength=256))
    present = np.flatnonzero(lengths)
    first, last = int(present[0]), int(present[-1])
    bits = int(lengths[symbols].astype(np.int64).sum())
    out = np.zeros(-(-bits // 8), np.uint8)
    _huffman_write(symbols, lengths, _canonical(lengths), out)
    return bytes([first, last - first]) + lengths[first : last + 1].tobytes() + out.tobytes()


def huffman_decode(data: bytes, rows: int, dim: int) -> Codes:
    """The codes [rows, dim] that :func:`huffman_encode` wrote.

    Raises:
        ValueError: the bytes are damaged or of another shape.
    """
    source = np.frombuffer(data, np.uint8)
    lengths = np.zeros(256, np.uint8)
    first, span = (int(source[0]), int(source[1]) + 1) if len(source) >= 2 else (0, 256)
    if len(source) < 2 + span or first + span > 256:
        raise ValueError("the codebook is cut off.")
    lengths[first : first + span] = source[2 : 2 + span]
    order = np.argsort(lengths, kind="stable")
    symbols = np.empty(rows * dim, np.uint8)
    counts = np.bincount(lengths, minlength=_MAX_HUFFMAN_BITS + 1)
    if len(counts) > _MAX_HUFFMAN_BITS + 1:
        raise ValueError("the codebook is damaged.")
    read = _huffman_read(source[2 + span :], counts, order[counts[0] :], symbols)
    if read < 0 or -(-read // 8) != len(source) - 2 - span:
        raise ValueError("the stream is damaged or of another shape.")
    return (symbols.astype(np.int16) - 128).astype(np.int8).reshape(rows, dim)


def _canonical(lengths: Bytes) -> np.ndarray[Any, Any]:
    """Code words [256], uint64: shorter first, among equal lengths by symbol."""
    words = np.zeros(256, np.uint64)
    word, before = 0, 0
    for symbol in np.argsort(lengths, kind="stable"):
        length = int(lengths[symbol])
        if length:
            word <<= length - before
            words[symbol], before = word, length
            word += 1
    return words


@njit
def _huffman_write(symbols: Bytes, lengths: Bytes, words: np.ndarray[Any, Any], out: Bytes) -> None:
    at = 0
    for symbol in symbols:
        for bit in range(int(lengths[symbol]) - 1, -1, -1):
            out[at >> 3] |= np.uint8((int(words[symbol]) >> bit & 1) << (at & 7))
            at += 1


@njit
def _huffman_read(
    source: Bytes, counts: np.ndarray[Any, Any], order: np.ndarray[Any, Any], symbols: Bytes
) -> int:
    """Fill ``symbols`` from ``counts`` of codes a length and symbols in ``order``; bits read, or -1."""
    at = 0
    for place in range(len(symbols)):
        word, first, passed, length = 0, 0, 0, 0
        while True:
            length += 1
            if length >= len(counts) or at >= 8 * len(source):
                return -1
            word = word << 1 | (int(source[at >> 3]) >> (at & 7) & 1)
            at += 1
            first <<= 1
            if word - first < counts[length]:
                symbols[place] = order[passed + word - first]
                break
            passed += counts[length]
            first += counts[length]
    return at


def dumped(path: Path, kind: str) -> dict[tuple[int, str, int], np.ndarray[Any, Any]]:
    """The arrays of one ``kind`` in a dump, by (step, table, peer)."""
    with np.load(path) as archive:
        keys = [key.split("/") for key in archive.files]
        return {
            (int(step), table, int(peer)): archive[f"{step}/{kind}/{table}/{peer}"]
            for step, which, table, peer in keys
            if which == kind
        }


def main(words: Iterable[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dump", type=Path, help="a file written by benchmarks/dump_exchange.py")
    parser.add_argument(
        "--bound", type=float, default=0.03, help="share of the range of a (peer, table) block"
    )
    parser.add_argument("--kind", choices=["forward", "backward", "summed"], default="forward")
    given = parser.parse_args(list(words))
    if not given.dump.is_file():
        parser.error(f"there is no file {given.dump}: benchmarks/dump_exchange.py writes one")
    if not any(key.count("/") == 3 for key in np.load(given.dump).files):
        parser.error(f"{given.dump} was not written by benchmarks/dump_exchange.py")
    totals: dict[str, dict[str, int]] = {}
    for (_, table, _), block in dumped(given.dump, given.kind).items():
        made = compress(block, given.bound)
        for name in (table, "all"):
            total = totals.setdefault(
                name, dict.fromkeys(("raw", "chosen", "vector_lz", "huffman", "blocks", "lz"), 0)
            )
            total["raw"] += block.size * 4
            total["chosen"] += len(made.payload)
            total["blocks"] += 1
            total["lz"] += made.coder == "vector_lz"
            for coder, size in made.sizes.items():
                total[coder] += size
    print(f"{given.kind}, bound {given.bound:g} of the range: float32 bytes / bytes on the wire")
    print("| table | vector LZ | Huffman | chosen | blocks that chose LZ |\n|---|---|---|---|---|")
    everything = totals.pop("all")
    for name, total in [*totals.items(), ("all", everything)]:
        ratios = [f"{total['raw'] / total[key]:.2f}" for key in ("vector_lz", "huffman", "chosen")]
        print(f"| {name} | {' | '.join(ratios)} | {total['lz']} of {total['blocks']} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
