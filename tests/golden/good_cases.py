"""The good golden frames: what an encoder writes for an input, and legal frames that none of ours writes."""

import cases as c
import frame_writer as w
from cases import Asked, Case

DTYPES = tuple(c.TORCH)


def ask(request: int, bound: float, values: list[int], kind: int = c.ABSOLUTE) -> Asked:
    return Asked(request=[request], bound=[bound], kind=[kind], input=values)


def raw_cases() -> list[Case]:
    cases = []
    for dtype in DTYPES:
        ordinary = c.bits_of([0.0, -0.0, 1.0, -2.5, 3e-5, 6e-8, 0.1], dtype)
        values = [
            *ordinary,
            c.NAN[dtype],
            c.SIGNALLING[dtype],
            c.INF[dtype],
            c.LARGE[dtype],
            1,
            *ordinary[2:5],
        ]
        payload = w.pad(w.values_to_bytes(values, dtype), 4)
        frame = w.frame([w.Block(mode=c.RAW, rows=5, dim=3, payload=payload)], dtype)
        about = "lossless: every bit comes back, NaN payloads too; 15 values of 2 bytes are padded"
        asked = ask(c.ASK_RAW, 0.01, values)
        cases.append(Case(f"raw_{dtype}", about, frame, [(5, 3)], dtype, values, asked=asked))
    values = c.bits_of([0.1], "float32")
    frame = w.frame(
        [w.Block(mode=c.RAW, rows=1, dim=1, bound=0.5, payload=w.values_to_bytes(values, "float32"))]
    )
    about = "packed, a tile entry without data, is not smaller than raw; the bound stays"
    asked = ask(c.ASK_PACKED, 0.5, c.bits_of([0.1], "float32"))
    cases.append(Case("raw_fallback", about, frame, [(1, 1)], values=values, asked=asked))
    return cases


def half_cases() -> list[Case]:
    cases = []
    for name, mode, numbers, bound in (
        ("float16", c.FLOAT16, [1.0001, -0.0, 0.33333, 1e-7, 2000.01, float("inf"), -7.3], 0.5),
        ("bfloat16", c.BFLOAT16, [1e6, -70000.0, 3e38, 0.1, -0.0], 1e36),
    ):
        values = c.bits_of(numbers, "float32")
        halves = c.bits_of([float(x) for x in c.floats_of(values, "float32")], name)
        decoded = c.bits_of([float(x) for x in c.floats_of(halves, name)], "float32")
        exact = float(c.floats_of(c.bits_of([bound], "float32"), "float32"))
        payload = w.pad(w.values_to_bytes(halves, name), 4)
        frame = w.frame([w.Block(mode=mode, rows=len(values), dim=1, bound=exact, payload=payload)])
        asked = ask(c.ASK_HALF, exact, values)
        about = f"{name} keeps the bound" + (", float16 would overflow" if mode == c.BFLOAT16 else "")
        cases.append(Case(f"half_{name}", about, frame, [(len(values), 1)], values=decoded, asked=asked))
    return cases


def packed_values(dtype: str) -> list[int]:
    """1,085 values: groups of width 0 to 6, mixed ones, one nearly all exceptions, a short last one."""
    numbers = [0.0] * 1085
    for group in range(7):
        for i in range(32):
            numbers[32 * group + i] = ((i * 7 + group) % (1 << group)) * 0.5 - (0.4 if group else 0.0)
    numbers[1083:] = [1.5, -1.5]
    values = c.bits_of(numbers, dtype)
    values[300], values[305] = c.NAN[dtype], c.INF[dtype]
    values[340] = c.LARGE[dtype]
    values[1084] = c.SIGNALLING[dtype]
    # Value 420 is a code, 0.1 away from what it decodes to, in a group that goes raw.
    values[416:448] = [c.NAN[dtype] + i % 3 for i in range(32)]
    values[420] = c.bits_of([0.6], dtype)[0]
    return values


def packed_cases() -> list[Case]:
    cases = []
    for dtype in DTYPES:
        values = packed_values(dtype)
        block, decoded = c.packed_block(values, 35, 31, 0.25, dtype)
        about = "plain, mixed and raw groups, two tiles, a short group and tile"
        asked = ask(c.ASK_PACKED, 0.25, values)
        frame = w.frame([block], dtype)
        cases.append(Case(f"packed_{dtype}", about, frame, [(35, 31)], dtype, decoded, asked=asked))

        zeros = c.bits_of([0.0, -0.0] * 1000, dtype)
        block, decoded = c.packed_block(zeros, 100, 20, 2.0**-126, dtype)
        asked = ask(c.ASK_PACKED, 2.0**-126, zeros)
        about = "all zeros: tile entries and no data; the smallest bound"
        frame = w.frame([block], dtype)
        cases.append(Case(f"packed_zeros_{dtype}", about, frame, [(100, 20)], dtype, decoded, asked=asked))
    numbers = [0.0] * (33 * 1024 + 5)
    for at, x in ((3, 1.0), (1024 * 31, -4.0), (1024 * 32, 9.0), (33 * 1024 + 4, 2.0)):
        numbers[at] = x
    values = c.bits_of(numbers, "float16")
    block, decoded = c.packed_block(values, len(values), 1, 0.125, "float16")
    asked = ask(c.ASK_PACKED, 0.125, values)
    about = "34 tiles: a segment offset"
    frame = w.frame([block], "float16")
    cases.append(Case("packed_segments", about, frame, [(len(values), 1)], "float16", decoded, asked=asked))
    return cases + relative_cases()


def relative_cases() -> list[Case]:
    cases = []
    for name, kind, share, bound in (("range", c.RANGE, 0.0625, 0.5), ("rms", c.RMS, 0.0625, 0.125)):
        # From -4 to 4; the root mean square of -+2 alone is 2, and NaN does not count.
        numbers = [4.0, -4.0, 1.0, 0.25] * 16 if kind == c.RANGE else [2.0, -2.0] * 32
        values = c.bits_of(numbers, "float32")
        values[7] = c.NAN["float32"]
        block, decoded = c.packed_block(values, 4, 16, bound, "float32")
        asked = ask(c.ASK_PACKED, share, values, kind)
        about = f"the bound is {share} of the {name} of the finite values"
        cases.append(Case(f"bound_{name}", about, w.frame([block]), [(4, 16)], values=decoded, asked=asked))
    return cases + limit_cases()


def limit_cases() -> list[Case]:
    """Bounds that are raised to 2^-126 or lowered to 2^125."""
    cases = []
    for name, kind, asked_bound, bound, numbers in (
        ("raised", c.ABSOLUTE, 1e-42, 2.0**-126, [0.0, -0.0] * 32),
        ("lowered", c.ABSOLUTE, 3e38, 2.0**125, [1e38, -3e38] * 32),
        ("of_zeros", c.RMS, 0.5, 2.0**-126, [0.0, -0.0] * 32),
        ("of_a_constant", c.RANGE, 0.5, 2.0**-126, [1.0] * 4),
        ("of_nothing_finite", c.RANGE, 0.5, 2.0**-126, [float("inf")] * 4),
        ("of_the_whole_range", c.RANGE, 1.0, 2.0**125, [3e38, -3e38, *[0.0] * 6] * 8),
    ):
        values = c.bits_of(numbers, "float32")
        block, decoded = c.packed_block(values, len(values), 1, bound, "float32")
        if len(values) == 4:  # all exceptions: raw
            payload = w.values_to_bytes(values, "float32")
            block = w.Block(mode=c.RAW, rows=4, dim=1, bound=bound, payload=payload)
        asked = ask(
            c.ASK_PACKED, float(c.floats_of(c.bits_of([asked_bound], "float32"), "float32")), values, kind
        )
        about = f"{asked_bound} of kind {kind} gives a bound of {bound}"
        shapes = [(len(values), 1)]
        cases.append(Case(f"bound_{name}", about, w.frame([block]), shapes, values=decoded, asked=asked))
    return cases


def uncommon_cases() -> list[Case]:
    """Legal frames that our encoders never write."""
    codes = list(range(8))
    short = [*codes, *[0xFFFFFF] * 24]  # behind the 8 values of the block: ignored
    noisy_mixed = w.mixed([w.Exact(0x40490FDB), *[5] * 31], "float32", width=24)
    noisy_mixed.words[1] |= 1  # a code at an exception: ignored
    groups = [w.plain([2**24 - 1] * 32, 24), noisy_mixed, w.plain(short, 24)]
    tile = w.tile(groups, base=3, planes=6, plane_words=[])
    kinds = [group.kind - 3 for group in groups] + [0x3F] * 29  # groups that do not exist: ignored
    words = w.planes_of(kinds, 6) + tile.words
    tile = w.Tile((len(words) | 3 << 11 | 6 << 17), words)
    symbols: list[w.Symbol] = [*[2**24 - 1] * 32, w.Exact(0x40490FDB), *[5] * 31, *codes]
    block = w.Block(mode=c.PACKED, rows=72, dim=1, bound=2.0**125, payload=w.packed([tile]))
    about = "base below the smallest kind, six planes, 24 code planes, noise in ignored bits, overflow to Inf"
    cases = [
        Case(
            "packed_uncommon",
            about,
            w.frame([block]),
            [(72, 1)],
            values=c.decoded_bits(symbols, 2.0**125, "float32"),
        )
    ]
    for dtype in ("float16", "bfloat16"):
        codes16 = [0, 1, 2, 3, 2**24 - 1, 2**24 - 2, 2**17, 131007, *[7] * 24]
        payload = w.packed([w.tile([w.plain(codes16)])])
        block = w.Block(mode=c.PACKED, rows=32, dim=1, bound=0.375, payload=payload)
        about = "plain groups wider than a raw one; products rounded to the type, some to Inf"
        decoded = c.decoded_bits(codes16, 0.375, dtype)
        cases.append(Case(f"packed_wide_{dtype}", about, w.frame([block], dtype), [(32, 1)], dtype, decoded))
    rows = [[6, 6], [2, 4]]
    index = [1, 0, 1, *[0] * 31]
    header = w.dedup([*index, *[1] * 30], 2)  # indices of rows that do not exist: ignored
    flat: list[w.Symbol] = [u for row in rows for u in row]
    payload = header + w.canonical_packed(flat, [0] * 4, "float32")
    block = w.Block(mode=c.DEDUP, rows=34, dim=2, bound=0.5, payload=payload)
    values = c.decoded_bits([u for r in index for u in rows[r]], 0.5, "float32")
    about = "distinct rows not in the order of first use, noise behind the last index"
    cases.append(Case("dedup_uncommon", about, w.frame([block]), [(34, 2)], values=values))
    padded = w.values_to_bytes([0x3C00, 0x3C01, 0x3C02], "float16") + b"\x12\x34"
    block = w.Block(mode=c.RAW, rows=1, dim=3, bound=2.0, payload=padded)
    about = "the padding of a payload is not looked at"
    cases.append(
        Case("raw_padding", about, w.frame([block], "float16"), [(1, 3)], "float16", [0x3C00, 0x3C01, 0x3C02])
    )
    return cases


def frame_cases() -> list[Case]:
    """Frames of several blocks, of empty ones, and one with a checksum."""
    empty = w.Block(mode=c.RAW, rows=0, dim=7)
    values = [*c.bits_of([1.0, 2.0, -3.0, 2.25] * 10, "float32")]
    block, decoded = c.packed_block(values, 40, 1, 0.5, "float32")
    asked = Asked(
        request=[c.ASK_AUTO, c.ASK_PACKED, c.ASK_DEDUP],
        bound=[0.5] * 3,
        kind=[c.ABSOLUTE, c.ABSOLUTE, c.RMS],
        input=values,
    )
    frame = w.frame([empty, block, empty])
    shapes = [(0, 7), (40, 1), (0, 7)]
    summed = w.frame([block], flags=1)
    return [
        Case("empty_blocks", "blocks without rows around one", frame, shapes, values=decoded, asked=asked),
        Case(
            "empty",
            "nothing but blocks without rows",
            w.frame([empty], "bfloat16"),
            [(0, 7)],
            "bfloat16",
            [],
            asked=ask(c.ASK_ENTROPY, 0.5, []),
        ),
        Case("checksum", "a frame with its checksum", summed, [(40, 1)], values=decoded),
    ]
