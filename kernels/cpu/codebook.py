"""Canonical code words and the decoding table of a codebook (docs/FORMAT.md, section 4.4)."""

import numpy as np
from numpy.typing import NDArray

from tightrec.kernels.cpu.floats import Words, i64, u32
from tightrec.kernels.cpu.jit import inner
from tightrec.kernels.format import MAX_CODE_LENGTH, SYMBOL_ESCAPE_CODE, SYMBOL_ESCAPE_RAW, SYMBOLS


@inner
def is_complete(lengths: NDArray[np.uint8]) -> bool:
    """Whether 256 code lengths are a codebook: short enough, both escapes, a complete prefix code."""
    total = 0
    for symbol in range(SYMBOLS):
        length = i64(lengths[symbol])
        if length > MAX_CODE_LENGTH:
            return False
        if length:
            total += 1 << (MAX_CODE_LENGTH - length)
    return (
        total == 1 << MAX_CODE_LENGTH and lengths[SYMBOL_ESCAPE_CODE] != 0 and lengths[SYMBOL_ESCAPE_RAW] != 0
    )


@inner
def code_words(lengths: NDArray[np.uint8], words: Words) -> None:
    """Code words of 256 symbols as they stand in the stream, the first bit lowest; 0 without a code."""
    following = 0
    for symbol in range(SYMBOLS):
        words[symbol] = u32(0)
    for length in range(1, MAX_CODE_LENGTH + 1):
        following <<= 1
        for symbol in range(SYMBOLS):
            if lengths[symbol] == length:
                reversed_ = 0
                for bit in range(length):
                    reversed_ |= (following >> bit & 1) << (length - 1 - bit)
                words[symbol] = u32(reversed_)
                following += 1


@inner
def decoding_table(lengths: NDArray[np.uint8], table: Words) -> bool:
    """Symbol | length << 8 for each possible next 12 bits; returns whether the codebook is complete."""
    if not is_complete(lengths):
        return False
    words = np.empty(SYMBOLS, np.uint32)
    code_words(lengths, words)
    for symbol in range(SYMBOLS):
        length = i64(lengths[symbol])
        if length:
            for place in range(i64(words[symbol]), 1 << MAX_CODE_LENGTH, 1 << length):
                table[place] = u32(symbol | length << 8)
    return True
