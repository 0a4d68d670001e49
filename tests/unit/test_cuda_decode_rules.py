"""Each rule marked (R) in docs/FORMAT.md, broken alone, is found by the CUDA kernels in its place."""

import struct
from collections.abc import Callable
from functools import lru_cache

import cuda_shim
import pytest
import torch
from codec_jobs import Books, flat_spans, make_blocks, run_encode
from cuda_decode_cases import BOOKS, Case, ShimBackend, assert_same, values_of

from tightrec.kernels import reference
from tightrec.kernels.format import Fault, Mode, Request

pytestmark = cuda_shim.requires_compiler

Edit = Callable[[bytearray, list[int]], None]
RAW, PACKED, ONCE, CODED, ONCE_CODED, EMPTY = range(6)
"""Tables of the frame that every test damages; its payloads start where an Edit's second argument says."""
PACKED_ROWS, TILES = 17_000, 34  # of two values: two segments, the second of two tiles
ONCE_ROWS, DISTINCT = 40, 5  # three index planes, so that indices 5 to 7 are out of range
CODED_STRIPS = 2


@lru_cache
def whole() -> Case:
    """A good frame; the block of table PACKED holds raw, mixed and plain groups."""
    shapes = [(3, 7), (PACKED_ROWS, 2), (ONCE_ROWS, 8), (8200, 1), (600, 8), (0, 4)]
    spans, count = flat_spans([shapes])
    blocks, totals = make_blocks(spans)
    values = values_of(count, torch.float32, 0)
    starts = [offset for offset, *_ in spans[0]]
    packed = values[starts[PACKED] : starts[ONCE]]
    packed[:] = torch.randn(len(packed), generator=torch.Generator().manual_seed(5))
    packed[:32] = float("inf")  # group 0 raw, group 1 mixed
    packed[40:60] = float("inf")
    rows = values[starts[ONCE] : starts[CODED]].view(ONCE_ROWS, 8)
    rows[:] = torch.arange(ONCE_ROWS)[:, None] % DISTINCT
    coded = values[starts[CODED] : starts[ONCE_CODED]]
    coded[:] = torch.randn(len(coded), generator=torch.Generator().manual_seed(6)) * 0.03
    twice = values[starts[ONCE_CODED] :].view(600, 8)
    twice[:] = torch.randn(600, 8, generator=torch.Generator().manual_seed(7)) * 0.03
    twice[300:] = twice[:300].clone()
    request = [Request.RAW, Request.PACKED, Request.DEDUP, Request.ENTROPY, Request.ENTROPY, Request.AUTO]
    books = Books.of([BOOKS[0]] * len(shapes), list(range(1, len(shapes) + 1)))
    frames = run_encode(reference, values, blocks, totals, bound=0.02, request=request, books=books)
    case = Case(frames, blocks, totals, torch.float32, count)
    modes = [frames[0][24 + 24 * table] for table in range(len(shapes))]
    expected = [Mode.RAW, Mode.PACKED, Mode.DEDUP, Mode.ENTROPY, Mode.DEDUP_ENTROPY, Mode.RAW]
    assert modes == expected
    return case


def payload_starts(frame: bytes) -> list[int]:
    tables = struct.unpack_from("<I", frame, 8)[0]
    at, starts = 24 + 24 * tables, []
    for table in range(tables):
        starts.append(at)
        at += struct.unpack_from("<Q", frame, 24 + 24 * table + 16)[0]
    return [*starts, at]


def put(layout: str, at: int, value: float) -> Edit:
    """Write at a byte of the frame."""
    return lambda frame, starts: struct.pack_into("<" + layout, frame, at, value)


def head(table: int, layout: str, at: int, value: float) -> Edit:
    """Write at a byte of a table's block header."""
    return put(layout, 24 + 24 * table + at, value)


def word(table: int, at: int, change: Callable[[int], int]) -> Edit:
    """Change the ``at``-th word of a table's payload."""

    def edit(frame: bytearray, starts: list[int]) -> None:
        place = starts[table] + 4 * at
        (old,) = struct.unpack_from("<I", frame, place)
        struct.pack_into("<I", frame, place, change(old) & 0xFFFFFFFF)

    return edit


def byte(table: int, at: int, value: int) -> Edit:
    return lambda frame, starts: struct.pack_into("<B", frame, starts[table] + at, value)


def swap_sizes(frame: bytearray, starts: list[int]) -> None:
    """RAW takes a word that belongs to PACKED, so that the sum stays."""
    for table, by in ((RAW, 4), (PACKED, -4)):
        at = 24 + 24 * table + 16
        struct.pack_into("<Q", frame, at, struct.unpack_from("<Q", frame, at)[0] + by)


def cut(table: int, size: int) -> Edit:
    """Leaves only ``size`` bytes to a table and gives the others to the next one."""

    def edit(frame: bytearray, starts: list[int]) -> None:
        for number, length in ((table, size), (table + 1, starts[table + 2] - starts[table] - size)):
            head(number, "Q", 16, length)(frame, starts)

    return edit


def padding(frame: bytearray, starts: list[int]) -> None:
    assert starts[-1] + 4 < len(frame)
    frame[-1] = 1


def tile(number: int, change: Callable[[int], int]) -> Edit:
    return word(PACKED, 1 + number, change)  # after the one segment offset


def gap_before_strips(frame: bytearray, starts: list[int]) -> None:
    """A word before the first strip's data, of which all offsets know."""
    for strip in range(CODED_STRIPS):
        word(CODED, BOOK + 2 * strip, lambda old: old + 1)(frame, starts)
    head(CODED, "Q", 16, starts[CODED + 1] - starts[CODED] + 4)(frame, starts)
    at = starts[CODED] + 4 * (BOOK + 2 * CODED_STRIPS)
    frame[at:at] = bytes(4)
    del frame[-4:]


def packed_without_rows(frame: bytearray, starts: list[int]) -> None:
    head(EMPTY, "B", 0, Mode.PACKED)(frame, starts)
    head(EMPTY, "f", 8, 1.0)(frame, starts)


BOOK = 32  # words
FIRST_DATA = 1 + TILES
FRAME_RULES: dict[str, tuple[Edit, Fault]] = {
    "magic": (put("B", 0, 0x55), Fault.MAGIC),
    "version": (put("B", 4, 2), Fault.VERSION),
    "dtype": (put("B", 5, 1), Fault.DTYPE),
    "flags": (put("B", 6, 2), Fault.RESERVED),
    "reserved": (put("B", 7, 1), Fault.RESERVED),
    "blocks": (put("I", 8, 5), Fault.BLOCKS),
    "checksum without flag": (put("I", 12, 1), Fault.RESERVED),
    "size": (put("Q", 16, 1 << 20), Fault.FRAME_SIZE),
    "padding": (padding, Fault.PADDING),
    "payloads too short": (head(RAW, "Q", 16, 0), Fault.FRAME_SIZE),
    "payloads too long": (head(RAW, "Q", 16, 1 << 20), Fault.PAYLOAD_SIZE),
    "payloads far too long": (head(RAW, "Q", 16, 2**64 - 4), Fault.PAYLOAD_SIZE),
}
HEADER_RULES: dict[str, tuple[int, Edit, Fault]] = {
    "mode": (RAW, head(RAW, "B", 0, 7), Fault.MODE),
    "block flags": (CODED, head(CODED, "B", 1, 3), Fault.RESERVED),
    "codebook elsewhere": (PACKED, head(PACKED, "B", 1, 1), Fault.RESERVED),
    "dim": (ONCE, head(ONCE, "H", 2, 9), Fault.DIM),
    "rows": (ONCE, head(ONCE, "I", 4, 41), Fault.ROWS),
    "bound of zero": (PACKED, head(PACKED, "f", 8, 0.0), Fault.BOUND),
    "denormal bound": (PACKED, head(PACKED, "I", 8, 0x007FFFFF), Fault.BOUND),
    "large bound": (PACKED, head(PACKED, "I", 8, 0x7E000001), Fault.BOUND),
    "negative bound": (PACKED, head(PACKED, "f", 8, -0.02), Fault.BOUND),
    "NaN bound": (RAW, head(RAW, "I", 8, 0x7FC00000), Fault.BOUND),
    "no codebook id": (CODED, head(CODED, "I", 12, 0), Fault.CODEBOOK),
    "codebook id elsewhere": (PACKED, head(PACKED, "I", 12, 9), Fault.CODEBOOK),
    "size of no words": (RAW, head(RAW, "Q", 16, 86), Fault.PAYLOAD_SIZE),
    "size without rows": (EMPTY, head(EMPTY, "Q", 16, 4), Fault.PAYLOAD_SIZE),
    "mode without rows": (EMPTY, packed_without_rows, Fault.MODE),
}  # fmt: skip
PAYLOAD_RULES: dict[str, tuple[int, Edit, Fault]] = {
    "raw size": (RAW, swap_sizes, Fault.PAYLOAD_SIZE),
    "packed without room for its directory": (PACKED, cut(PACKED, 4 * TILES), Fault.PAYLOAD_SIZE),
    "no room for a number of rows": (ONCE, cut(ONCE, 0), Fault.PAYLOAD_SIZE),
    "no room for the index": (ONCE, cut(ONCE, 24), Fault.PAYLOAD_SIZE),
    "no room for tiles after the index": (ONCE, cut(ONCE, 28), Fault.PAYLOAD_SIZE),
    "no room for the codebook": (CODED, cut(CODED, 124), Fault.PAYLOAD_SIZE),
    "no room for the strips": (CODED, cut(CODED, 128 + 8), Fault.PAYLOAD_SIZE),
    "segment offset": (PACKED, word(PACKED, 0, lambda w: w + 1), Fault.DIRECTORY),
    "wild segment offset": (PACKED, word(PACKED, 0, lambda w: 0xFFFFFFFF), Fault.DIRECTORY),
    "tile size": (PACKED, tile(3, lambda w: w + 1), Fault.DIRECTORY),
    "last tile's size": (PACKED, tile(TILES - 1, lambda w: w + 1), Fault.DIRECTORY),
    "wild tile size": (PACKED, tile(0, lambda w: w | 0x7FF), Fault.DIRECTORY),
    "tile size of zero": (PACKED, tile(0, lambda w: w & ~0x7FF), Fault.DIRECTORY),
    "tile base": (PACKED, tile(1, lambda w: w + (1 << 11)), Fault.DIRECTORY),
    "kind planes": (PACKED, tile(0, lambda w: w | 7 << 17), Fault.DIRECTORY),
    "tile's reserved bits": (PACKED, tile(0, lambda w: w | 1 << 31), Fault.DIRECTORY),
    "kind": (PACKED, tile(0, lambda w: w | 63 << 11), Fault.GROUP_KIND),
    "mixed group without exceptions": (PACKED, lambda f, s: mixed_mask(f, s, 0), Fault.MIXED_GROUP),
    "mixed group with too many": (PACKED, lambda f, s: mixed_mask(f, s, 0xFFFFFFFF), Fault.MIXED_GROUP),
    "mixed group with too wide codes": (PACKED, lambda f, s: mixed_mask(f, s, 1 << 8), Fault.MIXED_GROUP),
    "no distinct rows": (ONCE, word(ONCE, 0, lambda w: 0), Fault.DISTINCT),
    "more distinct rows than rows": (ONCE, word(ONCE, 0, lambda w: ONCE_ROWS + 1), Fault.DISTINCT),
    "wild number of distinct rows": (ONCE, word(ONCE, 0, lambda w: 0xFFFFFFFF), Fault.DISTINCT),
    "index too large": (ONCE, word(ONCE, 2, lambda w: w | 1 << 4), Fault.INDEX),
    "codebook too long a code": (CODED, byte(CODED, 0, 0x2D), Fault.CODEBOOK),
    "codebook incomplete": (CODED, byte(CODED, 0, 0x22), Fault.CODEBOOK),
    "codebook without an escape": (CODED, byte(CODED, 127, 0x0B), Fault.CODEBOOK),
    "codebook missing": (CODED, head(CODED, "B", 1, 0), Fault.CODEBOOK_MISSING),
    "first strip's offset": (CODED, word(CODED, BOOK, lambda w: w + 1), Fault.DIRECTORY),
    "wild first strip's offset": (CODED, word(CODED, BOOK, lambda w: 0xFFFFFFFF), Fault.DIRECTORY),
    "gap before the first strip": (CODED, gap_before_strips, Fault.DIRECTORY),
    "strip offset": (CODED, word(CODED, BOOK + 2, lambda w: w + 1), Fault.DIRECTORY),
    "wild strip offset": (CODED, word(CODED, BOOK + 2, lambda w: 0xFFFFFFFF), Fault.DIRECTORY),
    "chunk sizes": (CODED, word(CODED, BOOK + 1, lambda w: w + 4), Fault.DIRECTORY),
    "wild chunk size": (CODED, word(CODED, BOOK + 3, lambda w: w | 0xFFFF), Fault.DIRECTORY),
    "size planes": (CODED, word(CODED, BOOK + 1, lambda w: w | 15 << 16), Fault.DIRECTORY),
    "strip's reserved bits": (CODED, word(CODED, BOOK + 1, lambda w: w | 1 << 20), Fault.DIRECTORY),
    "chunk's bits": (CODED, byte(CODED, 128 + 8 * CODED_STRIPS + 60, 0xFF), Fault.STREAM),
    "coded rows: index": (ONCE_CODED, word(ONCE_CODED, BOOK, lambda w: w - 1), Fault.INDEX),
}  # fmt: skip


def mixed_mask(frame: bytearray, starts: list[int], mask: int) -> None:
    """Replaces the mask of group 1 of tile 0, which follows the kind planes and the raw group 0."""
    (entry,) = struct.unpack_from("<I", frame, starts[PACKED] + 4)
    word(PACKED, FIRST_DATA + (entry >> 17 & 7) + 32, lambda old: mask)(frame, starts)


def damaged(edit: Edit) -> Case:
    frame = bytearray(whole().frames[0])
    edit(frame, payload_starts(frame))
    return whole().with_frame(0, bytes(frame))


@pytest.fixture(scope="module")
def shim() -> ShimBackend:
    return ShimBackend(5)


def test_the_frame_is_good_as_it_is(shim: ShimBackend) -> None:
    assert assert_same(whole(), shim).status == 0


@pytest.mark.parametrize("rule", FRAME_RULES)
def test_a_rule_of_the_frame(shim: ShimBackend, rule: str) -> None:
    edit, fault = FRAME_RULES[rule]
    got = assert_same(damaged(edit), shim)
    assert (got.table, Fault(got.fault)) == (0, fault)
    assert bool(torch.isnan(got.values).all())


@pytest.mark.parametrize("rule", HEADER_RULES)
def test_a_rule_of_the_block_headers(shim: ShimBackend, rule: str) -> None:
    table, edit, fault = HEADER_RULES[rule]
    got = assert_same(damaged(edit), shim)
    assert (got.table, Fault(got.fault)) == (table, fault)
    assert bool(torch.isnan(got.values).all())


@pytest.mark.parametrize("rule", PAYLOAD_RULES)
def test_a_rule_of_the_payloads(shim: ShimBackend, rule: str) -> None:
    table, edit, fault = PAYLOAD_RULES[rule]
    got = assert_same(damaged(edit), shim)
    assert (got.table, Fault(got.fault)) == (table, fault)
