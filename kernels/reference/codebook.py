"""Canonical code words from code lengths (docs/FORMAT.md, section 4.4)."""

import torch
from torch import Tensor

from tightrec.kernels.format import (
    CODEBOOK_BYTES,
    MAX_CODE_LENGTH,
    SYMBOL_ESCAPE_CODE,
    SYMBOL_ESCAPE_RAW,
    SYMBOLS,
)


def is_complete(lengths: Tensor) -> bool:
    """Whether 256 code lengths are a codebook: short enough, both escapes, a complete prefix code."""
    lengths = lengths.to(torch.int64)
    if bool((lengths > MAX_CODE_LENGTH).any()):
        return False
    if not (lengths[SYMBOL_ESCAPE_CODE] and lengths[SYMBOL_ESCAPE_RAW]):
        return False
    return int((1 << MAX_CODE_LENGTH - lengths[lengths > 0]).sum()) == 1 << MAX_CODE_LENGTH


def code_words(lengths: Tensor) -> Tensor:
    """Code words, int64 [256], as they stand in the stream: the first bit lowest. 0 without a code."""
    words = torch.zeros(SYMBOLS, dtype=torch.int64)
    following, previous = 0, 0
    ordered = sorted((length, symbol) for symbol, length in enumerate(lengths.tolist()) if length)
    for length, symbol in ordered:
        following <<= length - previous
        words[symbol] = int(f"{following:0{length}b}"[::-1], 2)
        following, previous = following + 1, length
    return words


def decoding_table(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(symbol, length), int64 [4096], of each possible next 12 bits of a stream."""
    symbol = torch.zeros(1 << MAX_CODE_LENGTH, dtype=torch.int64)
    length = torch.zeros_like(symbol)
    words = code_words(lengths).tolist()
    for one, bits in enumerate(lengths.tolist()):
        if bits:
            symbol[words[one] :: 1 << bits] = one
            length[words[one] :: 1 << bits] = bits
    return symbol, length


def lengths_to_bytes(lengths: Tensor) -> Tensor:
    """The 128 bytes of a codebook in a frame."""
    lengths = lengths.to(torch.uint8)
    return lengths[::2] | lengths[1::2] << 4


def bytes_to_lengths(data: Tensor) -> Tensor:
    """Code lengths, uint8 [256], of a codebook's 128 bytes."""
    assert data.numel() == CODEBOOK_BYTES
    return torch.stack([data & 15, data >> 4], 1).flatten()
