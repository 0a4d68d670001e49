"""The good golden frames with deduplicated rows and with entropy codes."""

import cases as c
import frame_writer as w
from cases import Asked, Case

DTYPES = tuple(c.TORCH)
ID, OTHER_ID = 0x1234567, 3


def dedup_cases() -> list[Case]:
    cases = []
    for dtype in DTYPES:
        rows = [c.bits_of(row, dtype) for row in ([1.0, -0.0, 2.5], [0.5, 0.0, 0.0], [1.0, 0.0, -2.5])]
        rows.append([c.NAN[dtype], c.INF[dtype], 0])
        rows.append([c.NAN[dtype] ^ 1, c.INF[dtype], 0])
        # 0.1 away from row 0: other bits, the same codes.
        rows.append(c.bits_of([1.1, 0.1, 2.4], dtype))
        order = [0, 5, 1, 0, 3, 2, 5, 4, 3, 4] + [1] * 30
        own, index = [0, 1, 3, 2, 4], {0: 0, 5: 0, 1: 1, 3: 2, 2: 3, 4: 4}
        values = [x for r in order for x in rows[r]]
        distinct = [x for r in own for x in rows[r]]
        symbols = c.quantise(distinct, 0.25, dtype)
        decoded = c.decoded_bits(symbols, 0.25, dtype)
        payload = w.dedup([index[r] for r in order]) + w.canonical_packed(symbols, decoded, dtype)
        block = w.Block(mode=c.DEDUP, rows=len(order), dim=3, bound=0.25, payload=payload)
        expected = [x for r in order for x in decoded[3 * index[r] : 3 * index[r] + 3]]
        asked = Asked(request=[c.ASK_DEDUP], bound=[0.25], kind=[c.ABSOLUTE], input=values)
        about = (
            "five distinct rows of 40; NaN that differ in a bit are distinct, values with equal codes are not"
        )
        frame = w.frame([block], dtype)
        cases.append(Case(f"dedup_{dtype}", about, frame, [(40, 3)], dtype, expected, asked=asked))
    cases += [raw_group_case(dtype) for dtype in DTYPES]
    values = c.bits_of([1.0, 2.0], "float32") * 70
    symbols = c.quantise(values[:2], 0.5, "float32")
    payload = w.dedup([0] * 70) + w.canonical_packed(symbols, values[:2], "float32")
    block = w.Block(mode=c.DEDUP, rows=70, dim=2, bound=0.5, payload=payload)
    expected = c.decoded_bits(symbols, 0.5, "float32") * 70
    about = "one distinct row: no index planes"
    for name, request in (("dedup_one_row", c.ASK_DEDUP), ("auto_one_row", c.ASK_AUTO)):
        asked = Asked(request=[request], bound=[0.5], kind=[c.ABSOLUTE], input=values)
        cases.append(Case(name, about, w.frame([block]), [(70, 2)], values=expected, asked=asked))
    return cases


def raw_group_case(dtype: str) -> Case:
    """Rows with equal codes and exceptions, 0.4 apart, in a raw group: all decode to what the codes say."""
    exceptions = [c.LARGE[dtype]] * 31
    rows = [[*exceptions, *c.bits_of([x], dtype)] for x in (0.2, -0.2, 0.0, 0.1)] * 3
    symbols = c.quantise(rows[0], 0.25, dtype)
    decoded = c.decoded_bits(symbols, 0.25, dtype)
    payload = w.dedup([0] * 12) + w.canonical_packed(symbols, decoded, dtype)
    block = w.Block(mode=c.DEDUP, rows=12, dim=32, bound=0.25, payload=payload)
    values = [x for row in rows for x in row]
    asked = Asked(request=[c.ASK_DEDUP], bound=[0.25], kind=[c.ABSOLUTE], input=values)
    about = "rows that decode alike are one, sent in a raw group with what its codes decode to"
    name = f"dedup_raw_group_{dtype}"
    return Case(name, about, w.frame([block], dtype), [(12, 32)], dtype, decoded * 12, asked=asked)


def entropy_values(dtype: str, first: int, count: int) -> list[int]:
    """Mostly zeros, codes with and without a code word, large codes, and exceptions."""
    numbers = [0.0] * count
    numbers[first::9] = [0.5] * len(numbers[first::9])
    numbers[first + 1 :: 17] = [-0.5] * len(numbers[first + 1 :: 17])
    numbers[first + 2 :: 31] = [1.0] * len(numbers[first + 2 :: 31])
    numbers[5], numbers[70], numbers[71], numbers[200] = -1.5, 63.5, -63.5, 200.0
    values = c.bits_of(numbers, dtype)
    values[100], values[101] = c.NAN[dtype], c.INF[dtype]
    return values


def entropy_case(
    name: str,
    about: str,
    dtype: str,
    values: list[int],
    book: list[int],
    book_id: int,
    sent: int,
    after: list[str],
    dim: int = 1,
) -> Case:
    symbols = c.quantise(values, 0.25, dtype)
    included = sent != book_id
    payload = (w.codebook(book) if included else b"") + w.canonical_coded(symbols, book, dtype)
    shape = (len(values) // dim, dim)
    block = w.Block(
        mode=c.ENTROPY,
        rows=shape[0],
        dim=shape[1],
        bound=0.25,
        flags=int(included),
        codebook=book_id,
        payload=payload,
    )
    asked = Asked(
        request=[c.ASK_ENTROPY],
        bound=[0.25],
        kind=[c.ABSOLUTE],
        input=values,
        book_ids=[book_id],
        books=[book],
        sent=[sent],
        histogram=[c.symbol_counts(symbols)],
    )
    decoded = c.decoded_bits(symbols, 0.25, dtype)
    return Case(name, about, w.frame([block], dtype), [shape], dtype, decoded, after=after, asked=asked)


def entropy_cases() -> list[Case]:
    cases = []
    for dtype in DTYPES:
        values = entropy_values(dtype, 3, 700)
        first = f"entropy_{dtype}"
        about = "with its codebook; both escapes; chunks of different sizes, the last short"
        cases.append(entropy_case(first, about, dtype, values, c.BOOK, ID, 0, []))
        values = entropy_values(dtype, 4, 300)
        about = "after another frame: without the codebook, which the receiver has"
        cases.append(entropy_case(f"entropy_kept_{dtype}", about, dtype, values, c.BOOK, ID, ID, [first]))
    values = c.bits_of([0.0, 0.0, 0.5, 0.0, -0.5] * 180, "float32")
    about = "another codebook replaces the kept one"
    after = ["entropy_float32"]
    cases.append(
        entropy_case("entropy_replaced", about, "float32", values, c.OTHER_BOOK, OTHER_ID, ID, after, 900)
    )
    strip_numbers = [0.0] * 8300
    for at, x in ((0, 2.5), (8191, 1.0), (8192, -1.0), (8299, 0.5)):
        strip_numbers[at] = x
    strip_numbers[1000:1011] = [0.5 * i for i in range(11)]
    values = c.bits_of(strip_numbers, "bfloat16")
    # Zeros pack better: encoders do not write this one.
    symbols = c.quantise(values, 0.25, "bfloat16")
    payload = w.codebook(c.DEEP_BOOK) + w.canonical_coded(symbols, c.DEEP_BOOK, "bfloat16")
    block = w.Block(
        mode=c.ENTROPY, rows=83, dim=100, bound=0.25, flags=1, codebook=0xFFFFFFFF, payload=payload
    )
    about, decoded = "two strips; codes of up to 12 bits", c.decoded_bits(symbols, 0.25, "bfloat16")
    strips = Case("entropy_strips", about, w.frame([block], "bfloat16"), [(83, 100)], "bfloat16", decoded)
    return [*cases, strips, *dedup_entropy_cases(), uncommon_case()]


def dedup_entropy_cases() -> list[Case]:
    cases = []
    for dtype in ("float32", "float16"):
        # 40 distinct rows of 16, told apart by their last value; one in nine of the others is not zero.
        rows = [[0.5 * ((i * 5 + r * 3) % 9 == 0) for i in range(15)] + [0.5 * r] for r in range(40)]
        order = [0, 0, 1, 2, 1, *range(40), *[39, 3] * 20]
        index = [[*dict.fromkeys(order)].index(r) for r in order]
        distinct = c.bits_of([x for r in dict.fromkeys(order) for x in rows[r]], dtype)
        symbols = c.quantise(distinct, 0.25, dtype)
        payload = w.codebook(c.BOOK) + w.dedup(index) + w.canonical_coded(symbols, c.BOOK, dtype)
        block = w.Block(
            mode=c.DEDUP_ENTROPY, rows=len(order), dim=16, bound=0.25, flags=1, codebook=ID, payload=payload
        )
        decoded = c.decoded_bits(symbols, 0.25, dtype)
        expected = [x for i in index for x in decoded[16 * i : 16 * i + 16]]
        about = "distinct rows coded; a codebook before the count of rows"
        frame = w.frame([block], dtype)
        name, shapes = f"dedup_entropy_{dtype}", [(len(order), 16)]
        asked = Asked(
            request=[c.ASK_ENTROPY],
            bound=[0.25],
            kind=[c.ABSOLUTE],
            input=c.bits_of([x for r in order for x in rows[r]], dtype),
            book_ids=[ID],
            books=[c.BOOK],
            sent=[0],
            histogram=[c.symbol_counts(symbols)],
        )
        cases.append(Case(name, about, frame, shapes, dtype, expected, asked=asked))
    return cases


def uncommon_case() -> Case:
    """Codes with a code word sent through the escape, idle size planes, noise in ignored bits."""
    symbols: list[w.Symbol] = [0, 1, 2, 6, 254, 255, 2**24 - 1, w.Exact(0x7FA00001)]
    bits = w.stream(symbols, c.BOOK, "float32", escape=True)
    size = -(-len(bits) // 8)
    noise = bits + "1" * (8 * size - len(bits))
    plain = w.strip([w.chunk(noise)], base=size - 5, planes=11, fill=0xEE)
    planes = w.words_to_bytes([5 & 1, 0, 5 >> 2, *[0] * 8])
    noisy_planes = bytes(b | (0xFE if i % 4 == 0 else 0xFF) for i, b in enumerate(planes))
    strip = w.Strip(plain.entry, noisy_planes + plain.data[len(planes) :])
    payload = w.codebook(c.BOOK) + w.coded([strip])
    block = w.Block(mode=c.ENTROPY, rows=8, dim=1, bound=1.0, flags=1, codebook=1, payload=payload)
    values = c.decoded_bits(symbols, 1.0, "float32")
    about = "every code escaped, eleven size planes, ones where bits are ignored"
    return Case("entropy_uncommon", about, w.frame([block]), [(8, 1)], values=values)
