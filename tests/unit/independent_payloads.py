"""The payloads of docs/FORMAT.md (3, 4.2 to 4.4) for ``independent_decoder``: numpy, one rule a line."""

import numpy as np

BIT = np.arange(32, dtype=np.uint32)


class Rejected(ValueError):
    """The frame breaks an (R) rule; ``fault`` is a name of ``tightrec.kernels.format.Fault``."""

    def __init__(self, fault: str, where: str) -> None:
        super().__init__(f"{fault}: {where}")
        self.fault, self.where = fault, where


def need(holds: bool, fault: str, where: str) -> None:
    if not holds:
        raise Rejected(fault, where)


def value_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def reconstruct(codes: np.ndarray, bound: float, dtype: str) -> np.ndarray:
    """Bits of the values that codes stand for (3); ``codes`` is int64."""
    q = (codes >> 1) ^ -(codes & 1)
    with np.errstate(over="ignore", under="ignore"):
        product = q.astype(np.float32) * np.float32(2 * bound)
        if dtype == "float16":
            return product.astype(np.float16).view(np.uint16)
    bits = product.view(np.uint32)
    if dtype == "bfloat16":  # nearest even: the lower half rounds up from a half, and at a half if odd
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return bits


def plane_values(planes: np.ndarray) -> np.ndarray:
    """The 32 numbers whose bit j is in word j of ``planes``, as int64."""
    bits = (planes[:, None] >> BIT & 1).astype(np.int64)
    return (bits << np.arange(len(planes))[:, None]).sum(axis=0)


def decode_group(kind: int, data: np.ndarray, width: int, where: str) -> tuple[np.ndarray, int, np.ndarray]:
    """A group's codes [32], its exception mask, and the bits of its exceptions (4.2)."""
    if kind <= 24:
        return plane_values(data), 0, np.empty(0, np.uint32)
    if kind == 25:
        return np.zeros(32, np.int64), 0xFFFFFFFF, data.view(f"<u{width}")
    mask = int(data[0])
    count = mask.bit_count()
    words = -(-count * width // 4)
    planes = len(data) - 1 - words
    need(count > 0, "MIXED_GROUP", f"{where}: empty mask")
    need(0 <= planes <= 24, "MIXED_GROUP", f"{where}: {planes} planes")
    return plane_values(data[1 : 1 + planes]), mask, data[1 + planes :].view(f"<u{width}")[:count]


def decode_packed(words: np.ndarray, n: int, bound: float, dtype: str) -> np.ndarray:
    """The bits of ``n`` values of a packed payload (4.2), which ``words`` must hold exactly."""
    width = value_bytes(dtype)
    tiles = -(-n // 1024)
    segments = -(-tiles // 32)
    first = segments - 1 + tiles
    need(len(words) >= first, "PAYLOAD_SIZE", "packed: tile entries")
    codes = np.zeros(tiles * 1024, np.int64)
    exceptional = np.zeros(tiles * 1024, bool)
    exceptions = np.zeros(tiles * 1024, f"<u{width}")
    at = first
    for tile in range(tiles):
        where = f"tile {tile}"
        if tile and tile % 32 == 0:
            need(int(words[tile // 32 - 1]) == at - first, "DIRECTORY", f"{where}: segment offset")
        entry = int(words[segments - 1 + tile])
        size, base, planes = entry & 0x7FF, entry >> 11 & 0x3F, entry >> 17 & 7
        need(entry >> 20 == 0, "RESERVED", where)
        need(planes <= 6, "DIRECTORY", f"{where}: planes")
        data = words[at : at + size]
        need(len(data) == size, "DIRECTORY", f"{where}: data past the payload")
        need(size >= planes, "DIRECTORY", f"{where}: smaller than its planes")
        kinds = base + plane_values(data[:planes])
        inner = planes
        for group in range(min(32, -(-(n - 1024 * tile) // 32))):
            kind, here = int(kinds[group]), f"{where}, group {group}"
            need(kind <= 55, "GROUP_KIND", here)
            length = kind if kind <= 24 else 8 * width if kind == 25 else kind - 24
            need(inner + length <= size, "DIRECTORY", f"{here}: past the tile")
            part, mask, bits = decode_group(kind, data[inner : inner + length], width, here)
            span = slice(1024 * tile + 32 * group, 1024 * tile + 32 * group + 32)
            codes[span] = part
            exceptional[span] = np.uint32(mask) >> BIT & 1 != 0
            exceptions[span][exceptional[span]] = bits
            inner += length
        need(inner == size, "DIRECTORY", f"{where}: words after the last group")
        at += size
    need(at == len(words), "PAYLOAD_SIZE", "packed: words after the last tile")
    return np.where(exceptional, exceptions, reconstruct(codes, bound, dtype))[:n]


def read_indices(words: np.ndarray, rows: int) -> tuple[int, np.ndarray, np.ndarray]:
    """How many distinct rows there are, each row's index, and the words that follow (4.3)."""
    need(len(words) >= 1, "PAYLOAD_SIZE", "dedup: empty")
    distinct = int(words[0])
    need(1 <= distinct <= rows, "DISTINCT", f"{distinct} of {rows} rows")
    b, groups = (distinct - 1).bit_length(), -(-rows // 32)
    need(len(words) >= 1 + groups * b, "PAYLOAD_SIZE", "dedup: index planes")
    planes = words[1 : 1 + groups * b].reshape(groups, b)
    index = np.concatenate([plane_values(group) for group in planes])[:rows]
    need(int(index.max()) < distinct, "INDEX", "too large")
    need(len(np.unique(index)) == distinct, "INDEX", "a distinct row is not used")
    return distinct, index, words[1 + groups * b :]


def read_codebook(data: bytes) -> bytes:
    """256 code lengths out of 128 bytes (4.4)."""
    need(len(data) == 128, "PAYLOAD_SIZE", "codebook cut off")
    lengths = bytes(half for byte in data for half in (byte & 15, byte >> 4))
    need(max(lengths) <= 12, "CODEBOOK", "length above 12")
    need(lengths[254] > 0 and lengths[255] > 0, "CODEBOOK", "an escape has no code")
    need(sum(4096 >> length for length in lengths if length) == 4096, "CODEBOOK", "not complete")
    return lengths


def lookup_table(lengths: bytes) -> list[tuple[int, int]]:
    """(symbol, length) for each value of the next 12 bits of the stream; the first bit is bit 0."""
    table, code = [(0, 0)] * 4096, 0
    for length in range(1, 13):
        code <<= 1
        for symbol in (s for s in range(256) if lengths[s] == length):
            in_stream_order = int(f"{code:0{length}b}"[::-1], 2)
            for rest in range(0, 4096, 1 << length):
                table[in_stream_order | rest] = (symbol, length)
            code += 1
    return table


def decode_chunk(data: bytes, count: int, width: int, table: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(code, -1) or (0, exception bits) for ``count`` values whose stream ``data`` holds exactly."""
    stream, at, values = int.from_bytes(data, "little"), 0, []
    for _ in range(count):
        symbol, length = table[stream >> at & 0xFFF]
        at += length
        if symbol < 254:
            values.append((symbol, -1))
        elif symbol == 254:
            values.append((stream >> at & 0xFFFFFF, -1))
            at += 24
        else:
            values.append((0, stream >> at & (1 << 8 * width) - 1))
            at += 8 * width
    need(-(-at // 8) == len(data), "STREAM", f"{at} bits in a chunk of {len(data)} bytes")
    return values


def decode_coded(words: np.ndarray, n: int, bound: float, dtype: str, lengths: bytes) -> np.ndarray:
    """The bits of ``n`` values of a coded payload (4.4), which ``words`` must hold exactly."""
    width, table = value_bytes(dtype), lookup_table(lengths)
    strips, values = -(-n // 8192), list[tuple[int, int]]()
    need(len(words) >= 2 * strips, "PAYLOAD_SIZE", "coded: strip entries")
    at = 2 * strips
    for strip in range(strips):
        where, entry = f"strip {strip}", int(words[2 * strip + 1])
        base, planes = entry & 0xFFFF, entry >> 16 & 15
        need(int(words[2 * strip]) == at - 2 * strips, "DIRECTORY", f"{where}: offset")
        need(entry >> 20 == 0, "RESERVED", where)
        need(planes <= 11, "DIRECTORY", f"{where}: planes")
        need(at + planes <= len(words), "DIRECTORY", f"{where}: planes past the payload")
        left = n - len(values)
        sizes = (base + plane_values(words[at : at + planes]))[: -(-min(left, 8192) // 256)]
        at += planes
        need(int(sizes.max()) <= 1408, "STREAM", f"{where}: chunk size")
        end = at + -(-int(sizes.sum()) // 4)
        need(end <= len(words), "DIRECTORY", f"{where}: data past the payload")
        data, start = words[at:end].tobytes(), 0
        for size in sizes.tolist():
            values += decode_chunk(data[start : start + size], min(256, n - len(values)), width, table)
            start += size
        at = end
    need(at == len(words), "PAYLOAD_SIZE", "coded: words after the last strip")
    codes, exceptions = np.array(values, np.int64).T
    bits = reconstruct(codes, bound, dtype)
    return np.where(exceptions >= 0, exceptions.astype(bits.dtype), bits)
