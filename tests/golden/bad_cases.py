"""The bad golden frames: for each rule marked (R) in docs/FORMAT.md, frames that break it and no other."""

import struct
from collections.abc import Iterator
from typing import Any

import cases as c
import frame_writer as w
from cases import Case

Bad = Iterator[tuple[str, str, bytes]]
"""Name, fault and frame."""

ROWS, DIM, BOUND = 40, 2, 0.5
CODES: list[w.Symbol] = [i % 5 for i in range(ROWS * DIM)]
ZEROS = [0] * (ROWS * DIM)
ID = 7


def block(payload: bytes, mode: int = c.PACKED, **fields: Any) -> w.Block:
    ordinary: dict[str, Any] = {"mode": mode, "rows": ROWS, "dim": DIM, "bound": BOUND, "payload": payload}
    return w.Block(**(ordinary | fields))


GOOD = block(w.canonical_packed(CODES, ZEROS, "float32"))
TO_16 = -(48 + len(GOOD.payload)) % 16
"""Bytes of padding in a frame of that block."""


def header_cases() -> Bad:
    """Section 1."""
    good = w.frame([GOOD])
    yield "no_frame", "TRUNCATED", b""
    yield "header_cut", "TRUNCATED", good[:16]
    yield "magic", "MAGIC", w.frame([GOOD], magic=b"TREc")
    yield "version_0", "VERSION", w.frame([GOOD], version=0)
    yield "version_2", "VERSION", w.frame([GOOD], version=2)
    yield "dtype_other", "DTYPE", w.frame([GOOD], dtype_code=1)
    yield "dtype_reserved", "DTYPE", w.frame([GOOD], dtype_code=3)
    yield "flags_reserved", "RESERVED", w.frame([GOOD], flags=2)
    yield "flags_reserved_high", "RESERVED", w.frame([GOOD], flags=0x80)
    yield "byte_7_reserved", "RESERVED", w.frame([GOOD], reserved=1)
    yield "blocks_fewer", "BLOCKS", w.frame([GOOD], count=0)
    yield "blocks_more", "BLOCKS", w.frame([GOOD], count=2)
    yield "blocks_many", "BLOCKS", w.frame([GOOD], count=0xFFFFFFFF)
    yield "checksum_unasked", "CHECKSUM", w.frame([GOOD], checksum=1)
    yield "checksum_wrong", "CHECKSUM", w.frame([GOOD], flags=1, checksum=1)
    yield "size_small", "FRAME_SIZE", w.frame([GOOD], size=len(good) - 16)
    yield "size_large", "FRAME_SIZE", w.frame([GOOD], size=len(good) + 16)
    yield "size_2_to_32_more", "FRAME_SIZE", w.frame([GOOD], size=len(good) + 2**32)
    yield "frame_cut", "FRAME_SIZE", good[:-16]
    yield "frame_longer", "FRAME_SIZE", good + bytes(16)
    yield "size_not_of_16", "FRAME_SIZE", w.frame([GOOD], padding=b"\0" * 4)
    empty = w.Block(mode=c.RAW, rows=ROWS, dim=DIM, bound=BOUND)
    whole = w.frame([empty])
    yield "block_header_cut", "TRUNCATED", whole[:16] + struct.pack("<Q", 32) + whole[24:32]


def block_header_cases() -> Bad:
    """Section 2."""

    def frame(**fields: Any) -> bytes:
        return w.frame([block(**({"payload": GOOD.payload} | fields))])

    halves = bytes(2 * ROWS * DIM)
    yield "mode_7", "MODE", frame(mode=7)
    yield "mode_255", "MODE", frame(mode=255)
    yield "block_codebook_flag", "RESERVED", frame(flags=1)
    yield "block_flag_reserved", "RESERVED", frame(flags=2)
    yield "block_flag_reserved_entropy", "RESERVED", w.frame([coded(flags=3)])
    yield "dim_less", "DIM", frame(dim=DIM - 1)
    yield "dim_more", "DIM", frame(dim=DIM + 1)
    yield "rows_less", "ROWS", frame(rows=ROWS - 1)
    yield "rows_more", "ROWS", frame(rows=ROWS + 1)
    for name, bits in (
        ("zero", 0),
        ("denormal", 0x007FFFFF),
        ("large", 0x7E000001),
        ("inf", 0x7F800000),
        ("nan", 0x7FC00000),
        ("negative", 0xBF000000),
    ):
        yield f"bound_{name}", "BOUND", frame(bound_bits=bits)
    raw = bytes(4 * ROWS * DIM)
    yield "bound_raw_denormal", "BOUND", frame(mode=c.RAW, payload=raw, bound_bits=1)
    yield "bound_raw_negative", "BOUND", frame(mode=c.RAW, payload=raw, bound_bits=0xBF000000)
    yield "codebook_in_packed", "CODEBOOK", frame(codebook=ID)
    yield "codebook_zero", "CODEBOOK", w.frame([coded(codebook=0)])
    yield "payload_not_of_4", "PAYLOAD_SIZE", frame(payload=GOOD.payload + bytes(1))
    yield (
        "sizes_less_than_frame",
        "PAYLOAD_SIZE",
        w.frame([GOOD], padding=bytes(TO_16 + 16)),
    )
    yield "sizes_more_than_frame", "PAYLOAD_SIZE", frame(size=len(GOOD.payload) + 16)
    yield "size_overflows", "PAYLOAD_SIZE", frame(size=2**64 - 4)
    yield "padding", "PADDING", w.frame([GOOD], padding=bytes(TO_16 - 1) + b"\1")
    full = w.Block(mode=c.RAW, rows=0, dim=DIM, payload=bytes(16))
    yield "empty_packed", "MODE", w.frame([w.Block(mode=c.PACKED, rows=0, dim=DIM, bound=BOUND)])
    yield "empty_with_payload", "PAYLOAD_SIZE", w.frame([full])
    yield "raw_short", "PAYLOAD_SIZE", frame(mode=c.RAW, payload=raw[4:])
    yield "raw_long", "PAYLOAD_SIZE", frame(mode=c.RAW, payload=raw + bytes(4))
    yield "half_short", "PAYLOAD_SIZE", frame(mode=c.FLOAT16, payload=halves[4:])
    yield "half_long", "PAYLOAD_SIZE", frame(mode=c.BFLOAT16, payload=halves + bytes(4))


def groups() -> list[w.Group]:
    return [w.plain([u for u in CODES[at : at + 32] if isinstance(u, int)]) for at in range(0, 80, 32)]


def packed_cases() -> Bad:
    """Section 4.2; three groups of width 3 in one tile."""

    def frame(*tiles: w.Tile, tail: bytes = b"") -> bytes:
        return w.frame([block(w.packed(tiles) + tail)])

    words = 9
    exact: list[w.Symbol] = [w.Exact(0x3F800000), *[0] * 31]
    yield "packed_empty", "PAYLOAD_SIZE", w.frame([block(b"")])
    yield "packed_cut", "DIRECTORY", w.frame([block(GOOD.payload[:-4])])
    yield "packed_tail", "PAYLOAD_SIZE", frame(w.tile(groups()), tail=bytes(4))
    yield "tile_words_less", "DIRECTORY", w.frame([block(w.packed([w.tile(groups(), size=words - 1)])[:-4])])
    yield "tile_words_more", "DIRECTORY", frame(w.tile(groups(), size=words + 1), tail=bytes(4))
    yield "tile_words_zero", "DIRECTORY", w.frame([block(w.packed([w.tile(groups(), size=0)])[:4])])
    yield "tile_planes_7", "DIRECTORY", frame(w.tile(groups(), planes=7))
    yield "tile_planes_past_it", "DIRECTORY", frame(w.Tile(1 | 2 << 17, [0]))
    yield "tile_reserved", "RESERVED", frame(w.tile(groups(), reserved=1))
    yield "tile_reserved_high", "RESERVED", frame(w.tile(groups(), reserved=0x800))
    for kind in (56, 63):
        wide = w.Group(kind, [1] * 32)
        yield f"kind_{kind}", "GROUP_KIND", frame(w.tile([wide] * 3))
    sums = w.tile([w.Group(126, [0] * 32), *groups()[1:]], base=63, planes=6, plane_words=[7, 7, 7, 7, 7, 7])
    yield "kind_126", "GROUP_KIND", frame(sums)
    for name, group in (
        ("mask_empty", w.mixed([0] * 32, "float32", width=3)),
        ("planes_negative", w.mixed([w.Exact(1)] * 3 + [0] * 29, "float32", kind=27)),
        ("planes_25", w.Group(24 + 27, [1, *[0] * 26])),
    ):
        data = w.Group(group.kind, group.words[: group.kind - 24])
        yield f"mixed_{name}", "MIXED_GROUP", frame(w.tile([data, *groups()[1:]]))
    mixed = w.mixed(exact, "float32", width=3)
    short = w.tile([w.Group(mixed.kind, mixed.words)] * 3, size=len(mixed.words) * 3 - 1)
    yield "mixed_past_the_tile", "DIRECTORY", frame(w.Tile(short.entry, short.words[:-1]))


def segment_cases() -> Iterator[Case]:
    """The segment offset of 33 tiles, all zero but one group."""
    zero, one = w.tile([w.plain([0] * 32)] * 32), w.tile([w.plain([1] * 32)] * 32)
    tiles = [one, *[zero] * 31, one]
    for name, offset in (("less", 31), ("more", 33), ("zero", 0), ("high", 0x80000020)):
        fields = w.Block(mode=c.PACKED, rows=33, dim=1024, bound=1.0, payload=w.packed(tiles, [offset]))
        yield Case(f"segment_offset_{name}", "", w.frame([fields]), [(33, 1024)], fault="DIRECTORY")


def dedup_cases() -> Bad:
    """Section 4.3."""
    index = [i % 5 for i in range(ROWS)]
    rows = w.canonical_packed(CODES[:10], ZEROS, "float32")

    def frame(start: bytes, rest: bytes = rows) -> bytes:
        return w.frame([block(start + rest, c.DEDUP)])

    yield "dedup_empty", "PAYLOAD_SIZE", frame(b"", b"")
    yield "distinct_0", "DISTINCT", frame(w.dedup([0] * ROWS, 0))
    yield "distinct_41", "DISTINCT", frame(w.dedup(index, ROWS + 1))
    yield "distinct_huge", "DISTINCT", frame(w.dedup(index, 0x80000001, width=3))
    yield "index_planes_cut", "PAYLOAD_SIZE", frame(w.dedup(index)[:-4], b"")
    yield "index_5_of_5", "INDEX", frame(w.dedup([5, *index[1:]], 5))
    yield "index_7_of_5", "INDEX", frame(w.dedup([*index[:-1], 7], 5))
    yield "index_5_for_4", "INDEX", frame(w.dedup([5 if i == 4 else i for i in index], 5))
    yield "row_unused", "INDEX", frame(w.dedup([0 if i == 3 else i for i in index], 5))
    last = w.canonical_packed(CODES[:12], ZEROS, "float32")
    yield "row_unused_last", "INDEX", frame(w.dedup(index, 6), last)
    yield "dedup_tail", "PAYLOAD_SIZE", frame(w.dedup(index), rows + bytes(4))


def coded(payload: bytes | None = None, book: list[int] = c.BOOK, **fields: Any) -> w.Block:
    """A block in mode entropy with its codebook."""
    payload = w.canonical_coded(CODES, c.BOOK, "float32") if payload is None else payload
    return block(w.codebook(book) + payload, **({"mode": c.ENTROPY, "flags": 1, "codebook": ID} | fields))


def entropy_cases() -> Bad:
    """Section 4.4."""
    data = w.canonical_coded(CODES, c.BOOK, "float32")
    for name, changes in (
        ("length_13", {}),
        ("no_code_escape", {254: 0, 5: 4}),
        ("no_raw_escape", {255: 0, 5: 4}),
        ("incomplete", {0: 2}),
        ("oversubscribed", {5: 5}),
        ("empty", dict.fromkeys(range(256), 0)),
    ):
        book = [*c.BOOK]
        if name == "length_13":  # complete: 12, 13 and 13 bits in place of 11
            book, changes = [*c.DEEP_BOOK], {10: 12, 11: 13, 12: 13}
        for symbol, length in changes.items():
            book[symbol] = length
        yield f"codebook_{name}", "CODEBOOK", w.frame([coded(data, book)])
    cut = block(w.codebook(c.BOOK)[:-4], c.ENTROPY, flags=1, codebook=ID)
    yield "codebook_cut", "PAYLOAD_SIZE", w.frame([cut])
    yield "codebook_missing", "CODEBOOK_MISSING", w.frame([block(data, c.ENTROPY, codebook=ID)])
    yield "coded_empty", "PAYLOAD_SIZE", w.frame([coded(b"")])
    yield "strip_entry_cut", "PAYLOAD_SIZE", w.frame([coded(data[:4])])
    yield "coded_tail", "PAYLOAD_SIZE", w.frame([coded(data + bytes(4))])
    yield "coded_cut", "DIRECTORY", w.frame([coded(data[:-4])])
    bits = w.stream(CODES, c.BOOK, "float32")
    size = -(-len(bits) // 8)
    for name, fault, strip in (
        ("planes_12", "DIRECTORY", w.strip([w.chunk(bits)], planes=12)),
        ("planes_past_it", "DIRECTORY", w.Strip(size | 11 << 16, bytes(4))),
        ("reserved", "RESERVED", w.strip([w.chunk(bits)], reserved=1)),
        ("reserved_high", "RESERVED", w.strip([w.chunk(bits)], reserved=0x800)),
        ("chunk_1409", "STREAM", w.strip([w.chunk(bits, 1409)])),
        ("chunk_65535", "STREAM", w.strip([w.chunk(bits, 65535)])),
        ("chunk_longer", "STREAM", w.strip([w.chunk(bits, size + 1)])),
        ("chunk_shorter", "STREAM", w.strip([w.chunk(bits)[:-1]])),
        ("chunk_of_nothing", "STREAM", w.strip([b""])),
    ):
        if name == "chunk_65535":
            strip = w.Strip(strip.entry, w.pad(w.chunk(bits), 4))
        yield f"strip_{name}", fault, w.frame([coded(w.coded([strip]))])
    for name, offset in (("1", 1), ("high", 0x80000000)):
        strip = w.strip([w.chunk(bits)])
        yield f"strip_offset_{name}", "DIRECTORY", w.frame([coded(w.coded([strip], [offset]))])
    none = block(w.codebook(c.BOOK) + w.dedup([0] * ROWS, 0), c.DEDUP_ENTROPY, flags=1, codebook=ID)
    yield "dedup_entropy_distinct_0", "DISTINCT", w.frame([none])


def strip_cases() -> Iterator[Case]:
    """The second strip's offset, and a chunk that reads into its neighbour."""
    zeros: list[w.Symbol] = [0] * 8448
    chunks = [w.chunk(w.stream(zeros[:256], c.BOOK, "bfloat16"))] * 33
    strips = [w.strip(chunks[:32]), w.strip(chunks[32:])]
    words = len(strips[0].data) // 4
    for name, offset in (("less", words - 1), ("more", words + 1), ("zero", 0)):
        payload = w.codebook(c.BOOK) + w.coded(strips, [0, offset])
        fields: dict[str, Any] = {"rows": 33, "dim": 256, "bound": 1.0, "flags": 1, "codebook": ID}
        frame = w.frame([w.Block(mode=c.ENTROPY, payload=payload, **fields)], "bfloat16")
        yield Case(f"strip_2_offset_{name}", "", frame, [(33, 256)], "bfloat16", fault="DIRECTORY")
    first, second = (w.chunk(w.stream([1] * 256, c.BOOK, "float32")) for _ in range(2))
    strip = w.strip([first[:-1], first[-1:] + second])
    payload = w.codebook(c.BOOK) + w.coded([strip])
    frame = w.frame(
        [w.Block(mode=c.ENTROPY, rows=512, dim=1, bound=1.0, flags=1, codebook=ID, payload=payload)]
    )
    yield Case("chunk_into_the_next", "", frame, [(512, 1)], fault="STREAM")


def bad() -> list[Case]:
    """All bad cases; the name says what is wrong."""
    plain = [*header_cases(), *block_header_cases(), *packed_cases(), *dedup_cases(), *entropy_cases()]
    cases = [Case(name, "", frame, [(ROWS, DIM)], fault=fault) for name, fault, frame in plain]
    for case in cases:
        if case.name.startswith("empty_"):
            case.shapes = [(0, DIM)]
    data = w.canonical_coded(CODES, c.BOOK, "float32")
    other = w.frame([block(data, c.ENTROPY, codebook=ID + 1)])
    missing = "CODEBOOK_MISSING"
    cases.append(Case("codebook_other", "", other, [(ROWS, DIM)], fault=missing, after=["entropy_float32"]))
    half = w.Block(mode=c.FLOAT16, rows=2, dim=2, bound=BOUND, payload=bytes(8))
    for dtype in ("float16", "bfloat16"):
        cases.append(Case(f"half_of_{dtype}", "", w.frame([half], dtype), [(2, 2)], dtype, fault="MODE"))
    return [*cases, *segment_cases(), *strip_cases()]
