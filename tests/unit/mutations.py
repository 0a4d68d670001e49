"""Damages frames in ways that decoders must survive; most mutations get past the frame's headers.

``mutations(frame, generator, count)`` yields damaged copies; the same seed yields the same ones. Header
fields lie where docs/FORMAT.md (1, 2) says. A mutation may leave a legal frame, or the frame as it was.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

INTERESTING_BYTES = (0, 1, 2, 3, 0x0F, 0x10, 0x1F, 0x20, 0x7F, 0x80, 0xC0, 0xF0, 0xFE, 0xFF)
INTERESTING_WORDS = (0, 1, 2, 31, 32, 255, 256, 2**11 - 1, 2**16, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


@dataclass
class Layout:
    """Where a frame's parts lie, as far as its own headers can be believed."""

    blocks: int
    payloads: list[tuple[int, int]]
    """(start, end) of those payloads that are not empty."""


def layout(frame: bytes) -> Layout:
    """Read the sizes out of the block headers."""
    blocks = int.from_bytes(frame[8:12], "little")
    at, payloads = 24 + 24 * blocks, []
    for number in range(blocks):
        (size,) = struct.unpack_from("<Q", frame, 40 + 24 * number)
        payloads.append((at, at + size))
        at += size
    assert at <= len(frame) < at + 16, "mutations start from a well-formed frame"
    return Layout(blocks, [span for span in payloads if span[0] < span[1]])


def _below(generator: np.random.Generator, limit: int) -> int:
    return int(generator.integers(limit))


def _chosen(generator: np.random.Generator, options: tuple[int, ...]) -> int:
    return options[_below(generator, len(options))]


def _damage(data: bytearray, start: int, end: int, generator: np.random.Generator) -> None:
    """Change one to four places between start and end: bits, bytes, or words by a little or entirely."""
    for _ in range(1 + _below(generator, 4) * _below(generator, 2)):
        how, at = _below(generator, 5), start + _below(generator, end - start)
        word = start + (at - start) // 4 * 4
        if how == 0:
            data[at] ^= 1 << _below(generator, 8)
        elif how == 1 or word + 4 > end:
            data[at] = _chosen(generator, INTERESTING_BYTES)
        elif how == 2:
            struct.pack_into("<I", data, word, _chosen(generator, INTERESTING_WORDS))
        else:
            # One field of a directory entry a step up or down: shifts that meet the fields' lowest bits.
            step = (1 - 2 * _below(generator, 2)) << _chosen(generator, (0, 0, 8, 11, 16, 17, 20))
            (old,) = struct.unpack_from("<I", data, word)
            struct.pack_into("<I", data, word, old + step & 0xFFFFFFFF)


def anywhere(frame: bytes, parts: Layout, generator: np.random.Generator) -> bytes:
    """Damage any place of the frame."""
    data = bytearray(frame)
    _damage(data, 0, len(data), generator)
    return bytes(data)


def payload(frame: bytes, parts: Layout, generator: np.random.Generator) -> bytes:
    """Damage a payload anywhere."""
    return _in_payload(frame, parts, generator, 1 << 62)


def directory(frame: bytes, parts: Layout, generator: np.random.Generator) -> bytes:
    """Damage the first words of a payload, where its counts, offsets and entries stand."""
    return _in_payload(frame, parts, generator, _chosen(generator, (4, 8, 16, 64, 160)))


def _in_payload(frame: bytes, parts: Layout, generator: np.random.Generator, reach: int) -> bytes:
    if not parts.payloads:
        return anywhere(frame, parts, generator)
    start, end = parts.payloads[_below(generator, len(parts.payloads))]
    data = bytearray(frame)
    _damage(data, start, min(end, start + reach), generator)
    return bytes(data)


def codebook_area(frame: bytes, parts: Layout, generator: np.random.Generator) -> bytes:
    """Swap two nibbles in the first 128 bytes of a payload: a codebook stays complete, its codes move."""
    if not parts.payloads:
        return anywhere(frame, parts, generator)
    start, end = parts.payloads[_below(generator, len(parts.payloads))]
    data = bytearray(frame)
    nibbles = min(256, 2 * (end - start))
    a, b = _below(generator, nibbles), _below(generator, nibbles)
    values = [data[start + at // 2] >> 4 * (at & 1) & 15 for at in (a, b)]
    for at, value in ((a, values[1]), (b, values[0])):
        shift = 4 * (at & 1)
        data[start + at // 2] = data[start + at // 2] & ~(15 << shift) | value << shift
    return bytes(data)


def payload_cut(frame: bytes, parts: Layout, generator: np.random.Generator) -> bytes:
    """Remove or insert a few words in the last payload and put all sizes right again."""
    if not parts.payloads:
        return anywhere(frame, parts, generator)
    start, end = parts.payloads[-1]
    body = bytearray(frame[:end])
    at = start + 4 * _below(generator, (end - start) // 4 + 1)
    words = 1 + _below(generator, 3)
    if _below(generator, 2):
        del body[at : min(at + 4 * words, end)]
    else:
        body[at:at] = generator.bytes(4 * words) if _below(generator, 2) else bytes(4 * words)
    change = len(body) - end
    # The last payload that is not empty belongs to the last block with a size.
    sizes = [struct.unpack_from("<Q", body, 40 + 24 * b)[0] for b in range(parts.blocks)]
    last = max(b for b, size in enumerate(sizes) if size)
    struct.pack_into("<Q", body, 40 + 24 * last, sizes[last] + change)
    body += bytes(-len(body) % 16)
    struct.pack_into("<Q", body, 16, len(body))
    return bytes(body)


def sizes_moved(frame: bytes, parts: Layout, generator: np.random.Generator) -> bytes:
    """Swap two blocks' sizes, or move some words from one to the other: their sum stays."""
    if parts.blocks < 2:
        return payload_cut(frame, parts, generator)
    data = bytearray(frame)
    a, b = (40 + 24 * int(x) for x in generator.choice(parts.blocks, 2, replace=False))
    (first,), (second,) = struct.unpack_from("<Q", data, a), struct.unpack_from("<Q", data, b)
    moved = second - first if _below(generator, 2) else -min(first, 4 * (1 + _below(generator, 8)))
    struct.pack_into("<Q", data, a, first + moved)
    struct.pack_into("<Q", data, b, second - moved)
    return bytes(data)


def header_field(frame: bytes, parts: Layout, generator: np.random.Generator) -> bytes:
    """Give a field of the frame header or of a block header a plausible or an extreme value."""
    data = bytearray(frame)
    fields = [("<B", 4), ("<B", 5), ("<B", 6), ("<B", 7), ("<I", 8), ("<I", 12), ("<Q", 16)]
    if parts.blocks and _below(generator, 4):
        start = 24 + 24 * _below(generator, parts.blocks)
        inner = [("<B", 0), ("<B", 1), ("<H", 2), ("<I", 4), ("<I", 8), ("<I", 12), ("<Q", 16)]
        fields = [(form, start + at) for form, at in inner]
    form, at = fields[_below(generator, len(fields))]
    top = 256 ** struct.calcsize(form) - 1
    (old,) = struct.unpack_from(form, data, at)
    step = _chosen(generator, (-16, -4, -1, 1, 4, 16))
    value = (old + step) if _below(generator, 2) else _chosen(generator, INTERESTING_WORDS)
    struct.pack_into(form, data, at, value & top)
    return bytes(data)


def mode_changed(frame: bytes, parts: Layout, generator: np.random.Generator) -> bytes:
    """Give a block another mode, with a codebook id and flag that go with it."""
    if not parts.blocks:
        return header_field(frame, parts, generator)
    data = bytearray(frame)
    start = 24 + 24 * _below(generator, parts.blocks)
    mode = _below(generator, 7)
    coded = mode >= 5
    data[start : start + 2] = bytes([mode, _below(generator, 2) if coded else 0])
    struct.pack_into("<I", data, start + 12, 1 + _below(generator, 2) if coded else 0)
    if struct.unpack_from("<I", data, start + 8)[0] == 0:
        struct.pack_into("<f", data, start + 8, 0.5)
    return bytes(data)


def bound_changed(frame: bytes, parts: Layout, generator: np.random.Generator) -> bytes:
    """Give a block another bound: legal ones, and signs, denormals, Inf and NaN."""
    if not parts.blocks:
        return header_field(frame, parts, generator)
    legal = (0x00800000, 0x3F800000, 0x3A83126F, 0x7E000000)
    illegal = (0x80000000, 0xBF800000, 0x007FFFFF, 0x7E000001, 0x7F800000, 0x7FC00000, 1, 0)
    data = bytearray(frame)
    at = 32 + 24 * _below(generator, parts.blocks)
    struct.pack_into("<I", data, at, _chosen(generator, legal if _below(generator, 2) else illegal))
    return bytes(data)


def resized(frame: bytes, parts: Layout, generator: np.random.Generator) -> bytes:
    """Cut the frame short or make it longer; half the time its size field follows."""
    if _below(generator, 2):
        data = bytearray(frame[: _below(generator, len(frame))])
    else:
        fill = bytes(1 + _below(generator, 40)) if _below(generator, 2) else generator.bytes(16)
        data = bytearray(frame + fill)
    if len(data) >= 24 and _below(generator, 2):
        struct.pack_into("<Q", data, 16, len(data))
    return bytes(data)


Mutator = Callable[[bytes, Layout, np.random.Generator], bytes]

MUTATORS: tuple[tuple[int, Mutator], ...] = (
    (4, payload),
    (5, directory),
    (1, codebook_area),
    (3, payload_cut),
    (2, sizes_moved),
    (1, mode_changed),
    (1, bound_changed),
    (2, anywhere),
    (2, header_field),
    (1, resized),
)
"""Weight and mutator. The splice of two frames has the weight of one of these more, see ``mutations``."""


def splice(frame: bytes, other: bytes, generator: np.random.Generator) -> bytes:
    """The beginning of one frame and the end of another, cut at the same place, its size put right."""
    at = 4 * (1 + _below(generator, min(len(frame), len(other)) // 4 - 1))
    data = bytearray(frame[:at] + other[at:])
    if len(data) >= 24 and _below(generator, 4):
        struct.pack_into("<Q", data, 16, len(data))
    return bytes(data)


def mutations(
    frame: bytes, generator: np.random.Generator, count: int, other: bytes | None = None
) -> Iterator[bytes]:
    """Yield ``count`` damaged copies of a well-formed frame; ``other`` is one to splice with."""
    parts = layout(frame)
    weights = np.array([weight for weight, _ in MUTATORS])
    for _ in range(count):
        if other is not None and _below(generator, int(weights.sum()) + 1) == 0:
            yield splice(frame, other, generator)
            continue
        damaged = MUTATORS[int(generator.choice(len(MUTATORS), p=weights / weights.sum()))][1]
        yield damaged(frame, parts, generator)
