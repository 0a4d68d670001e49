"""What a golden case holds, and the encoders' arithmetic (docs/FORMAT.md, 3 and 5) to write one."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

import frame_writer as w
import torch
from codec_jobs import from_bits, to_bits

RAW, FLOAT16, BFLOAT16, PACKED, DEDUP, ENTROPY, DEDUP_ENTROPY = range(7)
ASK_RAW, ASK_HALF, ASK_PACKED, ASK_DEDUP, ASK_ENTROPY, ASK_AUTO = range(6)
ABSOLUTE, RANGE, RMS = range(3)
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NAN = {"float32": 0x7FC01234, "float16": 0x7E12, "bfloat16": 0xFFC5}
INF = {"float32": 0xFF800000, "float16": 0x7C00, "bfloat16": 0x7F80}
SIGNALLING = {"float32": 0x7F800001, "float16": 0xFC01, "bfloat16": 0x7F81}
LARGE = {"float32": 0x7F7FFFFF, "float16": 0x7BFF, "bfloat16": 0xFF7F}

BOOK = [0] * 256
"""Codes 0 to 6 and the escapes; 5 and 7 to 253 have no code word."""
BOOK[:7] = [1, 3, 3, 4, 5, 0, 5]
BOOK[254:] = [4, 4]
OTHER_BOOK = [0] * 256
OTHER_BOOK[:3] = [1, 2, 3]
OTHER_BOOK[254:] = [4, 4]
DEEP_BOOK = [0] * 256
"""Lengths up to 12."""
DEEP_BOOK[:11] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
DEEP_BOOK[254:] = [12, 12]


@dataclass
class Asked:
    """What an encoder is asked that must give the frame; lists have one entry for each block."""

    request: list[int]
    bound: list[float]
    kind: list[int]
    input: list[int]
    """Bits of all blocks' values in order."""
    book_ids: list[int] = field(default_factory=list)
    books: list[list[int]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    """Ids of the codebooks that the receiver has."""
    histogram: list[dict[str, int]] | None = None
    """What is counted, for each block: symbol -> count."""


@dataclass
class Case:
    """A frame and what becomes of it."""

    name: str
    about: str
    frame: bytes
    shapes: list[tuple[int, int]]
    dtype: str = "float32"
    values: list[int] | None = None
    """Bits of all blocks' values in order; None where the frame is bad."""
    fault: str | None = None
    """Name of ``format.Fault`` where the frame is bad."""
    after: list[str] = field(default_factory=list)
    """Frames that the same sender sent before."""
    asked: Asked | None = None


def bits_of(values: Sequence[float], dtype: str) -> list[int]:
    """Bits of the values of a type nearest to these."""
    return to_bits(torch.tensor(values, dtype=torch.float64).to(TORCH[dtype])).tolist()


def floats_of(bits: Sequence[int], dtype: str) -> torch.Tensor:
    """Values with these bits, in their own type."""
    unsigned = torch.tensor(bits, dtype=torch.int64).numpy().astype(f"u{w.value_bytes(dtype)}")
    return from_bits(unsigned, TORCH[dtype])


def _decoded(q: torch.Tensor, bound: float, dtype: str) -> torch.Tensor:
    eb2 = torch.tensor(2 * bound, dtype=torch.float32)
    return (q.to(torch.float32) * eb2).to(TORCH[dtype])


def decoded_bits(symbols: Sequence[w.Symbol], bound: float, dtype: str) -> list[int]:
    """Bits of the values that symbols stand for."""
    codes = [0 if isinstance(s, w.Exact) else s for s in symbols]
    q = torch.tensor([u // 2 if u % 2 == 0 else -(u + 1) // 2 for u in codes], dtype=torch.int64)
    values = to_bits(_decoded(q, bound, dtype)).tolist()
    return [s.bits if isinstance(s, w.Exact) else v for s, v in zip(symbols, values, strict=True)]


def quantise(bits: Sequence[int], bound: float, dtype: str) -> list[w.Symbol]:
    """The symbols that an encoder sends for values."""
    x = floats_of(bits, dtype).to(torch.float32)
    limit = torch.tensor(bound, dtype=torch.float32)
    scaled = x * (torch.tensor(1.0) / (2 * limit))
    safe = scaled.abs() < 2.0**22
    q = torch.where(safe, scaled, 0.0).round()
    safe &= (x - _decoded(q, bound, dtype).to(torch.float32)).abs() <= limit
    pairs = zip(bits, q.long().tolist(), safe.tolist(), strict=True)
    return [(2 * k if k >= 0 else -2 * k - 1) if good else w.Exact(own) for own, k, good in pairs]


def symbol_counts(symbols: Sequence[w.Symbol]) -> dict[str, int]:
    """How often each symbol of an alphabet of 256 occurs; codes without a code word count as themselves."""
    counts: dict[str, int] = {}
    for s in symbols:
        number = 255 if isinstance(s, w.Exact) else min(s, 254)
        counts[str(number)] = counts.get(str(number), 0) + 1
    return counts


def packed_block(
    values: list[int], rows: int, dim: int, bound: float, dtype: str, **fields: Any
) -> tuple[w.Block, list[int]]:
    """A block in mode packed as an encoder writes it, and what it decodes to."""
    symbols = quantise(values, bound, dtype)
    decoded = decoded_bits(symbols, bound, dtype)
    payload = w.canonical_packed(symbols, decoded, dtype)
    return w.Block(mode=PACKED, rows=rows, dim=dim, bound=bound, payload=payload, **fields), decoded


def runs(bits: Sequence[int], dtype: str) -> str:
    """Values as text: hex bits, ``hex*count`` for repeated ones."""
    parts, digits, at = [], 2 * w.value_bytes(dtype), 0
    while at < len(bits):
        count = 1
        while at + count < len(bits) and bits[at + count] == bits[at]:
            count += 1
        parts.append(f"{bits[at]:0{digits}x}" + (f"*{count}" if count > 1 else ""))
        at += count
    return " ".join(parts)
