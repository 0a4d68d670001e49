"""Words, bytes and planes as torch tensors.

A word (unsigned 32-bit) is held in an int64 element, since torch's uint32 has few operations.
"""

import torch
from torch import Tensor

WORD_MASK = 0xFFFFFFFF


def words_to_bytes(words: Tensor) -> Tensor:
    """Little-endian bytes, uint8 [4 n], of words, int64 [n]."""
    signed = torch.where(words >= 2**31, words - 2**32, words)
    return signed.to(torch.int32).contiguous().view(torch.uint8)


def bytes_to_words(data: Tensor) -> Tensor:
    """Words, int64 [n], of little-endian bytes, uint8 [4 n]."""
    return data.clone().view(torch.int32).to(torch.int64) & WORD_MASK


def value_bits(values: Tensor) -> Tensor:
    """The bits of float values as int64, unsigned; same shape."""
    if values.element_size() == 4:
        return values.contiguous().view(torch.int32).to(torch.int64) & WORD_MASK
    return values.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF


def bits_to_values(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Float values of unsigned bits, int64; the inverse of ``value_bits``."""
    if dtype == torch.float32:
        return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(dtype)
    return torch.where(bits >= 2**15, bits - 2**16, bits).to(torch.int16).view(dtype)


def bit_length(numbers: Tensor) -> Tensor:
    """Number of bits of each non-negative number below 2^32: 0 for 0, 1 for 1, 2 for 2 and 3."""
    powers = 2 ** torch.arange(32, dtype=torch.int64)
    return (numbers[..., None] >= powers).sum(-1)


def to_planes(numbers: Tensor, planes: int) -> Tensor:
    """Bit planes of rows of up to 32 numbers: [..., 32] -> words [..., planes], number i at bit i."""
    place = 2 ** torch.arange(numbers.shape[-1], dtype=torch.int64)
    columns = [(((numbers >> j) & 1) * place).sum(-1) for j in range(planes)]
    return torch.stack(columns, -1) if columns else numbers.new_zeros(*numbers.shape[:-1], 0)


def from_planes(words: Tensor) -> Tensor:
    """Numbers of bit planes: words [..., planes] -> [..., 32]; the inverse of ``to_planes``."""
    lanes = torch.arange(32, dtype=torch.int64)
    numbers = words.new_zeros(*words.shape[:-1], 32)
    for j in range(words.shape[-1]):
        numbers |= ((words[..., j, None] >> lanes) & 1) << j
    return numbers


def pad_rows(numbers: Tensor, multiple: int, fill: int = 0) -> Tensor:
    """A flat tensor as rows of ``multiple``, the last one filled up."""
    missing = -numbers.numel() % multiple
    return torch.cat([numbers, numbers.new_full((missing,), fill)]).view(-1, multiple)


def starts(sizes: Tensor) -> Tensor:
    """Where each of consecutive parts starts: the exclusive prefix sum."""
    return sizes.cumsum(0) - sizes
