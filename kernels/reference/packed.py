"""Groups, tiles and segments of bit planes (docs/FORMAT.md, section 4.2)."""

import torch
from torch import Tensor

from tightrec.kernels.format import (
    GROUP_VALUES,
    KIND_MIXED,
    KIND_RAW,
    MAX_CODE_PLANES,
    MAX_KIND,
    MAX_KIND_PLANES,
    SEGMENT_TILES,
    TILE_GROUPS,
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
    value_bits,
    words_to_bytes,
)
from tightrec.kernels.reference.quantise import Codes, reconstruct

_TILES_AT_ONCE = 1024


class Rejected(Exception):
    """A payload breaks a rule of the format; ``fault`` says which."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.name)
        self.fault = fault


def pack(received: Tensor, codes: Codes) -> Tensor:
    """The packed payload, uint8, of codes, flat, and the values that they and their exceptions decode to."""
    tile_values = TILE_GROUPS * GROUP_VALUES
    entries, data = [], []
    for first in range(0, received.numel(), _TILES_AT_ONCE * tile_values):
        part = slice(first, first + _TILES_AT_ONCE * tile_values)
        entry, words = _pack_tiles(received[part], Codes(codes.code[part], codes.exception[part]))
        entries.append(entry)
        data.append(words)
    entry = torch.cat(entries)
    segment_words = pad_rows(entry & 0x7FF, SEGMENT_TILES).sum(1)
    return words_to_bytes(torch.cat([starts(segment_words)[1:], entry, *data]))


def _pack_tiles(received: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Tile entries and the tiles' data words."""
    groups = -(-received.numel() // GROUP_VALUES)
    tile_values = TILE_GROUPS * GROUP_VALUES
    code = pad_rows(codes.code, tile_values).view(-1, GROUP_VALUES)
    exception = pad_rows(codes.exception, tile_values).view(-1, GROUP_VALUES)
    bits = pad_rows(value_bits(received), tile_values).view(-1, GROUP_VALUES)
    kind, group_words = _pack_groups(code, exception, bits, received.element_size())

    present = (torch.arange(kind.numel()) < groups).view(-1, TILE_GROUPS)
    kind = kind.view(-1, TILE_GROUPS)
    size = torch.where(present, group_size(kind, received.element_size()), 0)
    base = torch.where(present, kind, MAX_KIND).min(1).values
    above = torch.where(present, kind - base[:, None], 0)
    planes = bit_length(above.max(1).values)
    words = planes + size.sum(1)

    # One row a tile, with every place a word could have; the mask keeps those that are there, in order.
    width = group_words.shape[1]
    everything = torch.cat([to_planes(above, MAX_KIND_PLANES), group_words.view(kind.shape[0], -1)], 1)
    there = torch.cat(
        [
            torch.arange(MAX_KIND_PLANES) < planes[:, None],
            (torch.arange(width) < size[:, :, None]).view(kind.shape[0], -1),
        ],
        1,
    )
    return words | base << 11 | planes << 17, everything[there]


def _pack_groups(code: Tensor, exception: Tensor, bits: Tensor, value_bytes: int) -> tuple[Tensor, Tensor]:
    """Kind and data words (the first ``group_size`` columns count) of groups [G, 32]."""
    raw_words = GROUP_VALUES * value_bytes // 4
    count = exception.sum(1)
    width = bit_length(code.max(1).values)
    exception_words = count if value_bytes == 4 else (count + 1) // 2
    mixed_words = 1 + width + exception_words
    plain = (count == 0) & (width < raw_words)
    mixed = (count > 0) & (mixed_words < raw_words)
    kind = torch.where(plain, width, torch.where(mixed, KIND_MIXED + mixed_words, KIND_RAW))

    words = code.new_zeros(code.shape[0], GROUP_VALUES)
    planes = to_planes(code, MAX_CODE_PLANES)
    words[plain, :MAX_CODE_PLANES] = planes[plain]
    words[kind == KIND_RAW, :raw_words] = _whole_words(bits, value_bytes)[kind == KIND_RAW]
    for group in mixed.nonzero().flatten().tolist():
        sent = bits[group][exception[group]]
        exceptions = _whole_words(pad_rows(sent, 4 // value_bytes), value_bytes).flatten()
        parts = [to_planes(exception[group].to(torch.int64), 1), planes[group, : width[group]], exceptions]
        words[group, : mixed_words[group]] = torch.cat(parts)
    return kind, words


def _whole_words(bits: Tensor, value_bytes: int) -> Tensor:
    """Values' bits [..., m] as words, one each or two 16-bit values to a word, the first in the low half."""
    return bits if value_bytes == 4 else bits[..., ::2] | bits[..., 1::2] << 16


def group_size(kind: Tensor, value_bytes: int) -> Tensor:
    """Words of a group's data by its kind."""
    size = torch.where(kind > KIND_RAW, kind - KIND_MIXED, kind)
    return torch.where(kind == KIND_RAW, GROUP_VALUES * value_bytes // 4, size)


def unpack(payload: Tensor, count: int, bound: Tensor, dtype: torch.dtype) -> Tensor:
    """The ``count`` values of a packed payload, uint8 of a multiple of 4.

    Raises:
        Rejected: the payload breaks a rule of the format.
    """
    words = bytes_to_words(payload)
    groups = -(-count // GROUP_VALUES)
    tiles = -(-groups // TILE_GROUPS)
    segments = -(-tiles // SEGMENT_TILES)
    if words.numel() < segments - 1 + tiles:
        raise Rejected(Fault.PAYLOAD_SIZE)
    entry = words[segments - 1 : segments - 1 + tiles]
    data = words[segments - 1 + tiles :]
    size, base, planes = entry & 0x7FF, (entry >> 11) & 0x3F, (entry >> 17) & 0x7
    if bool((entry >> 20).any()) or bool((planes > MAX_KIND_PLANES).any()):
        raise Rejected(Fault.DIRECTORY)
    if int(size.sum()) != data.numel():
        raise Rejected(Fault.DIRECTORY)
    if not torch.equal(words[: segments - 1], starts(pad_rows(size, SEGMENT_TILES).sum(1))[1:]):
        raise Rejected(Fault.DIRECTORY)

    present = (torch.arange(tiles * TILE_GROUPS) < groups).view(tiles, TILE_GROUPS)
    start = starts(size)
    kind = base[:, None] + from_planes(_masked(data, start, planes, MAX_KIND_PLANES))
    kind = torch.where(present, kind, 0)
    if bool((kind > MAX_KIND).any()):
        raise Rejected(Fault.GROUP_KIND)
    value_bytes = dtype.itemsize
    group_words = group_size(kind, value_bytes)
    if not torch.equal(planes + group_words.sum(1), size):
        raise Rejected(Fault.DIRECTORY)
    offset = (start + planes)[:, None] + group_words.cumsum(1) - group_words
    values = _unpack_groups(data, kind.flatten(), offset.flatten(), bound, dtype)
    return values.flatten()[:count]


def _unpack_groups(data: Tensor, kind: Tensor, offset: Tensor, bound: Tensor, dtype: torch.dtype) -> Tensor:
    """Values [G, 32] of groups whose data starts at ``offset``."""
    value_bytes = dtype.itemsize
    mixed, raw = kind > KIND_RAW, kind == KIND_RAW
    zero = torch.zeros_like(kind)
    mask = _masked(data, offset, mixed.to(torch.int64), 1)
    exception = from_planes(mask).to(torch.bool) & mixed[:, None]
    count = exception.sum(1)
    exception_words = count if value_bytes == 4 else (count + 1) // 2
    width = torch.where(mixed, kind - KIND_MIXED - 1 - exception_words, torch.where(raw, zero, kind))
    if bool((mixed & ((count == 0) | (width < 0) | (width > MAX_CODE_PLANES))).any()):
        raise Rejected(Fault.MIXED_GROUP)
    code = from_planes(_masked(data, offset + mixed.to(torch.int64), width, MAX_CODE_PLANES))
    bits = value_bits(reconstruct(code, bound, dtype))

    per_word = 4 // value_bytes
    rank = torch.where(raw[:, None], torch.arange(GROUP_VALUES), exception.cumsum(1) - 1).clamp(min=0)
    at = (offset + torch.where(mixed, 1 + width, zero))[:, None] + rank // per_word
    own = raw[:, None] | exception
    word = data[at[own]] if data.numel() else data
    # Written as bits: torch may carry a single float through a double, which makes a signalling NaN quiet.
    bits[own] = word >> 16 * (rank[own] % per_word) & (0xFFFFFFFF if value_bytes == 4 else 0xFFFF)
    return bits_to_values(bits, dtype)


def _masked(data: Tensor, start: Tensor, count: Tensor, most: int) -> Tensor:
    """Words data[start : start + count] as rows [..., most], zero after ``count`` and past the end."""
    column = torch.arange(most)
    at = start[:, None] + column
    there = (column < count[:, None]) & (at < data.numel())
    if not data.numel():
        return torch.zeros_like(at)
    return torch.where(there, data[at.clamp(0, data.numel() - 1)], 0)
