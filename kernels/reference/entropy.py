"""Chunks and strips of canonical Huffman codes (docs/FORMAT.md, section 4.4)."""

import torch
from torch import Tensor

from tightrec.kernels.format import (
    CHUNK_VALUES,
    ESCAPED_CODE_BITS,
    MAX_CHUNK_BYTES,
    MAX_CODE_LENGTH,
    MAX_SIZE_PLANES,
    STRIP_CHUNKS,
    SYMBOL_ESCAPE_CODE,
    SYMBOL_ESCAPE_RAW,
    Fault,
)
from tightrec.kernels.reference.bits import (
    bit_length,
    bits_to_values,
    bytes_to_words,
    from_planes,
    pad_rows,
    starts,
    to_planes,
    words_to_bytes,
)
from tightrec.kernels.reference.bits import value_bits as bits_of
from tightrec.kernels.reference.codebook import code_words, decoding_table
from tightrec.kernels.reference.packed import Rejected
from tightrec.kernels.reference.quantise import Codes, reconstruct


def symbols(codes: Codes) -> Tensor:
    """The symbol of each value where every code below 254 has a code word, int64."""
    small = codes.code.clamp(max=SYMBOL_ESCAPE_CODE)
    return torch.where(codes.exception, SYMBOL_ESCAPE_RAW, small)


def _stream(values: Tensor, codes: Codes, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(bits, number of bits) that each value adds to its chunk; at most 44."""
    lengths = lengths.to(torch.int64)
    symbol = symbols(codes)
    symbol = torch.where(lengths[symbol] > 0, symbol, SYMBOL_ESCAPE_CODE)
    bits, length = code_words(lengths)[symbol], lengths[symbol]
    coded, raw = symbol == SYMBOL_ESCAPE_CODE, symbol == SYMBOL_ESCAPE_RAW
    after = torch.where(raw, bits_of(values), torch.where(coded, codes.code, 0))
    raw_bits = 8 * values.element_size()
    return bits | after << length, length + torch.where(
        coded, ESCAPED_CODE_BITS, torch.where(raw, raw_bits, 0)
    )


def encode_values(values: Tensor, codes: Codes, lengths: Tensor) -> Tensor:
    """The coded payload, uint8, of flat values, with a codebook's code lengths, uint8 [256]."""
    bits, length = _stream(values, codes, lengths)
    length = pad_rows(length, CHUNK_VALUES)
    chunk_bytes = (length.sum(1) + 7) // 8
    chunks = chunk_bytes.numel()
    size = pad_rows(chunk_bytes, STRIP_CHUNKS)
    present = (torch.arange(size.numel()) < chunks).view(size.shape)
    base = torch.where(present, size, MAX_CHUNK_BYTES).min(1).values
    above = torch.where(present, size - base[:, None], 0)
    planes = bit_length(above.max(1).values)
    strip_bytes = 4 * planes + -(-size.sum(1) // 4) * 4
    strip_start = starts(strip_bytes)

    data = torch.zeros(int(strip_bytes.sum()), dtype=torch.uint8)
    plane_words = to_planes(above, MAX_SIZE_PLANES)
    for strip in range(size.shape[0]):
        count = int(planes[strip])
        data[strip_start[strip] :][: 4 * count] = words_to_bytes(plane_words[strip, :count])
    chunk_start = (strip_start + 4 * planes)[:, None] + size.cumsum(1) - size
    bit = (8 * chunk_start.flatten()[:chunks, None] + length.cumsum(1) - length).flatten()[: bits.numel()]
    _deposit(data, bit, bits)

    entries = torch.stack([strip_start // 4, base | planes << 16], 1).flatten()
    return torch.cat([words_to_bytes(entries), data])


def _deposit(data: Tensor, bit: Tensor, bits: Tensor) -> None:
    """Sets each value's bits (at most 44) in the stream from its bit position on; they do not overlap."""
    shifted = bits << bit % 8
    total = torch.zeros(data.numel() + 7, dtype=torch.int64)
    for byte in range(7):
        total.scatter_add_(0, bit // 8 + byte, shifted >> 8 * byte & 255)
    data |= total[: data.numel()].to(torch.uint8)


def decode_values(payload: Tensor, count: int, lengths: Tensor, bound: Tensor, dtype: torch.dtype) -> Tensor:
    """The ``count`` values of a coded payload.

    What would be read at each bit of the data is found for all bits at once; then all chunks go from symbol
    to symbol together.

    Raises:
        Rejected: the payload breaks a rule of the format.
    """
    chunks = -(-count // CHUNK_VALUES)
    strips = -(-chunks // STRIP_CHUNKS)
    if payload.numel() < 8 * strips:
        raise Rejected(Fault.PAYLOAD_SIZE)
    entries = bytes_to_words(payload[: 8 * strips]).view(strips, 2)
    data = payload[8 * strips :]
    position, size = _chunks(entries, data, chunks)

    value_bits = 8 * dtype.itemsize
    symbol_of, length_of = decoding_table(lengths)
    window = _windows(data)
    index = window & (1 << MAX_CODE_LENGTH) - 1
    symbol, length = symbol_of[index], length_of[index]
    coded, raw = symbol == SYMBOL_ESCAPE_CODE, symbol == SYMBOL_ESCAPE_RAW
    following = torch.arange(window.numel()) + length + coded * ESCAPED_CODE_BITS + raw * value_bits
    following = following.clamp(max=window.numel() - 1)  # behind the data, where no chunk may end

    at = 8 * position
    remaining = count - CHUNK_VALUES * torch.arange(chunks)
    read = torch.zeros(chunks, CHUNK_VALUES, dtype=torch.int64)
    for step in range(min(CHUNK_VALUES, count)):
        read[:, step] = at
        at = torch.where(step < remaining, following[at], at)
    if not torch.equal((at - 8 * position + 7) // 8, size):
        raise Rejected(Fault.STREAM)

    read = read.flatten()[:count]
    after = window[read] >> length[read]
    code = torch.where(coded[read], after & (1 << ESCAPED_CODE_BITS) - 1, symbol[read])
    decoded = bits_of(reconstruct(code, bound, dtype))
    return bits_to_values(torch.where(raw[read], after & (1 << value_bits) - 1, decoded), dtype)


def _windows(data: Tensor) -> Tensor:
    """The 49 bits or more from each bit on, and from some bits behind the end: int64 [8 (bytes + 16)]."""
    padded = torch.cat([data, data.new_zeros(23)]).to(torch.int64)
    places = data.numel() + 16
    whole = torch.zeros(places, dtype=torch.int64)
    for byte in range(7):
        whole |= padded[byte : byte + places] << 8 * byte
    return (whole[:, None] >> torch.arange(8)).flatten()


def _chunks(entries: Tensor, data: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """(start, size) in bytes of every chunk in the strips' data."""
    start, base, planes = 4 * entries[:, 0], entries[:, 1] & 0xFFFF, (entries[:, 1] >> 16) & 0xF
    if bool((entries[:, 1] >> 20).any()) or bool((planes > MAX_SIZE_PLANES).any()):
        raise Rejected(Fault.DIRECTORY)
    if bool((start + 4 * planes > data.numel()).any()):
        raise Rejected(Fault.DIRECTORY)
    size = torch.zeros(entries.shape[0], STRIP_CHUNKS, dtype=torch.int64)
    for strip, (first, count) in enumerate(zip(start.tolist(), planes.tolist(), strict=True)):
        words = bytes_to_words(data[first : first + 4 * count])
        size[strip] = base[strip] + from_planes(words[None])[0]
    present = (torch.arange(size.numel()) < chunks).view(size.shape)
    size = torch.where(present, size, 0)
    if bool((size > MAX_CHUNK_BYTES).any()):
        raise Rejected(Fault.DIRECTORY)
    strip_bytes = 4 * planes + -(-size.sum(1) // 4) * 4
    if not torch.equal(start, starts(strip_bytes)) or int(strip_bytes.sum()) != data.numel():
        raise Rejected(Fault.DIRECTORY)
    position = (start + 4 * planes)[:, None] + size.cumsum(1) - size
    return position.flatten()[:chunks], size.flatten()[:chunks]
