"""Values and bounds chosen to break an error-bounded codec, and an exact check of the bound.

A generator is called with (count, dtype, bound, generator) and returns ``count`` values [count] of a float32,
float16 or bfloat16 ``dtype``; the same seed gives the same values. ``GENERATORS`` names them all.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from codec_jobs import from_bits

Make = Callable[[int, torch.dtype, float, torch.Generator], torch.Tensor]

FLOATS = {torch.float32: (8, 23), torch.float16: (5, 10), torch.bfloat16: (8, 7)}
"""Bits of exponent and of mantissa."""


def _draw(low: int, high: int, count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(low, high, (count,), generator=generator, dtype=torch.int64)


def _bits(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values whose bits are the low bits of int64 words."""
    unsigned = words.numpy().astype(np.uint32 if dtype == torch.float32 else np.uint16)
    return from_bits(unsigned, dtype)


def _fields(
    sign: torch.Tensor, exponent: torch.Tensor, mantissa: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Values with these fields, each int64 [count]."""
    exponent_bits, mantissa_bits = FLOATS[dtype]
    return _bits((sign << exponent_bits | exponent) << mantissa_bits | mantissa, dtype)


def _nudge(values: torch.Tensor, ulps: torch.Tensor) -> torch.Tensor:
    """Values moved by so many units in the last place, away from zero for positive ones."""
    kind = torch.int32 if values.element_size() == 4 else torch.int16
    bits = values.view(kind)
    zero = bits & torch.iinfo(kind).max == 0
    return torch.where(zero, bits, bits + ulps.to(kind)).view(values.dtype)


def normal(count: int, dtype: torch.dtype, bound: float, generator: torch.Generator) -> torch.Tensor:
    """Normal values, each group of 32 at its own scale from 2^-4 to 2^24 bounds."""
    scale = 2.0 ** _draw(-4, 25, -(-count // 32), generator).double()
    scale = scale.repeat_interleave(32)[:count] * bound
    return (torch.randn(count, generator=generator, dtype=torch.float64) * scale).to(dtype)


def uniform(count: int, dtype: torch.dtype, bound: float, generator: torch.Generator) -> torch.Tensor:
    """Uniform values within 100 bounds of zero."""
    values = torch.rand(count, generator=generator, dtype=torch.float64)
    return ((values * 200 - 100) * bound).to(dtype)


def _near_multiples(
    shift: float, count: int, dtype: torch.dtype, bound: float, generator: torch.Generator
) -> torch.Tensor:
    """Values at and up to two ulps around (k + shift) * 2 * bound, for k of 0 to 23 bits and both signs."""
    k = _draw(0, 2**23, count, generator) >> _draw(0, 24, count, generator)
    sign = 1 - 2 * _draw(0, 2, count, generator)
    values = (sign * (k + shift).double() * (2 * float(bound))).to(dtype)
    return _nudge(values, _draw(-2, 3, count, generator))


def ties(count: int, dtype: torch.dtype, bound: float, generator: torch.Generator) -> torch.Tensor:
    """Values around (k + 0.5) * 2 * bound, where the quantiser has to choose."""
    return _near_multiples(0.5, count, dtype, bound, generator)


def multiples(count: int, dtype: torch.dtype, bound: float, generator: torch.Generator) -> torch.Tensor:
    """Values around k * 2 * bound, which the decoder hits exactly or nearly."""
    return _near_multiples(0.0, count, dtype, bound, generator)


def safe_range(count: int, dtype: torch.dtype, bound: float, generator: torch.Generator) -> torch.Tensor:
    """Values within 64 steps and 2 ulps of +-2^22 * 2 * bound, the last that may be sent as codes."""
    steps = 2.0**22 + _draw(-64, 65, count, generator).double() / 2
    sign = 1 - 2 * _draw(0, 2, count, generator)
    values = (sign * steps * (2 * float(bound))).to(dtype)
    return _nudge(values, _draw(-2, 3, count, generator))


def powers_of_two(count: int, dtype: torch.dtype, bound: float, generator: torch.Generator) -> torch.Tensor:
    """Powers of two from the whole range of the type, both signs."""
    top = (1 << FLOATS[dtype][0]) - 1
    sign, exponent = _draw(0, 2, count, generator), _draw(1, top, count, generator)
    return _fields(sign, exponent, torch.zeros_like(sign), dtype)


def denormals(count: int, dtype: torch.dtype, bound: float, generator: torch.Generator) -> torch.Tensor:
    """Denormal values of every size, both signs."""
    width = FLOATS[dtype][1]
    mantissa = _draw(1, 2**width, count, generator) >> _draw(0, width, count, generator)
    mantissa = mantissa.clamp_min(1)
    return _fields(_draw(0, 2, count, generator), torch.zeros_like(mantissa), mantissa, dtype)


def zeros(count: int, dtype: torch.dtype, bound: float, generator: torch.Generator) -> torch.Tensor:
    """+0 and -0."""
    nothing = torch.zeros(count, dtype=torch.int64)
    return _fields(_draw(0, 2, count, generator), nothing, nothing, dtype)


def constant(count: int, dtype: torch.dtype, bound: float, generator: torch.Generator) -> torch.Tensor:
    """One value everywhere, some bounds large."""
    value = torch.randn(1, generator=generator, dtype=torch.float64) * 100 * bound
    return value.to(dtype).expand(count).clone()


def one_outlier(count: int, dtype: torch.dtype, bound: float, generator: torch.Generator) -> torch.Tensor:
    """Values below a few bounds and, in each 1,000, one near the largest of the type."""
    values = (torch.randn(count, generator=generator, dtype=torch.float64) * 3 * bound).to(dtype)
    for start in range(0, count, 1000):
        at = start + int(_draw(0, min(1000, count - start), 1, generator))
        values[at] = torch.finfo(dtype).max * 0.99
    return values


def non_finite(count: int, dtype: torch.dtype, bound: float, generator: torch.Generator) -> torch.Tensor:
    """Inf and NaN of any sign and payload, quiet and signalling, among ordinary values."""
    exponent_bits, width = FLOATS[dtype]
    mantissa = _draw(0, 2**width, count, generator)
    mantissa = torch.where(
        _draw(0, 3, count, generator) == 0, 0, mantissa >> _draw(0, width, count, generator)
    )
    top = torch.full_like(mantissa, (1 << exponent_bits) - 1)
    special = _fields(_draw(0, 2, count, generator), top, mantissa, dtype)
    share = 2.0 ** -_draw(0, 7, -(-count // 32), generator).double().repeat_interleave(32)[:count]
    chosen = torch.rand(count, generator=generator, dtype=torch.float64) < share
    return torch.where(chosen, special, uniform(count, dtype, bound, generator))


def huge(count: int, dtype: torch.dtype, bound: float, generator: torch.Generator) -> torch.Tensor:
    """Values from the two topmost exponents of the type, its largest among them."""
    exponent_bits, width = FLOATS[dtype]
    top = (1 << exponent_bits) - 2
    mantissa = _draw(0, 2**width, count, generator) | (2**width - 1) * _draw(0, 2, count, generator)
    exponent = top - _draw(0, 2, count, generator)
    return _fields(_draw(0, 2, count, generator), exponent, mantissa, dtype)


def gradients(count: int, dtype: torch.dtype, bound: float, generator: torch.Generator) -> torch.Tensor:
    """Mostly zeros, the rest heavy-tailed: a normal over the cube of a uniform, some bounds large."""
    values = torch.randn(count, generator=generator, dtype=torch.float64)
    values /= torch.rand(count, generator=generator, dtype=torch.float64).clamp_min(1e-4) ** 3
    sparse = torch.rand(count, generator=generator, dtype=torch.float64) < 0.8
    largest = torch.finfo(dtype).max
    return (values.masked_fill(sparse, 0.0) * bound).clamp(-largest, largest).to(dtype)


def bit_patterns(count: int, dtype: torch.dtype, bound: float, generator: torch.Generator) -> torch.Tensor:
    """Random bits."""
    return _bits(_draw(0, 2 ** (1 + sum(FLOATS[dtype])), count, generator), dtype)


def zipf_rows(
    count: int, dtype: torch.dtype, bound: float, generator: torch.Generator, dim: int = 16
) -> torch.Tensor:
    """Rows of ``dim`` values drawn by Zipf's law from few, some nudged by less than the bound."""
    rows = -(-count // dim)
    known = max(1, rows // 4)
    weights = 1.0 / torch.arange(1, known + 1, dtype=torch.float64)
    drawn = torch.multinomial(weights, max(rows, 1), replacement=True, generator=generator)[:rows]
    table = torch.randn(known, dim, generator=generator, dtype=torch.float64) * 50 * bound
    nudge = (torch.rand(rows, dim, generator=generator, dtype=torch.float64) - 0.5) * bound
    nudge *= (_draw(0, 2, rows, generator) == 0).double()[:, None]
    return (table[drawn] + nudge).reshape(-1)[:count].to(dtype)


def equal_codes_apart(
    count: int, dtype: torch.dtype, bound: float, generator: torch.Generator, dim: int = 32
) -> torch.Tensor:
    """Rows of ``dim`` that get the same codes but lie up to two bounds apart, in groups that are large.

    A row that stands for its equals must be sent as what it decodes to, in a raw group too: its own bits
    keep the bound only for itself.
    """
    rows = -(-count // dim)
    values = (torch.rand(rows, dim, generator=generator, dtype=torch.float64) * 1.98 - 0.99) * bound
    values[:, : dim // 3] = torch.finfo(dtype).max
    values[:, dim // 3] = 2.0**20 * bound
    return values.reshape(-1)[:count].to(dtype)


def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 values of a 16-bit type."""
    return _bits(torch.arange(65536), dtype)


GENERATORS: dict[str, Make] = {
    make.__name__: make
    for make in (
        normal,
        uniform,
        ties,
        multiples,
        safe_range,
        powers_of_two,
        denormals,
        zeros,
        constant,
        one_outlier,
        non_finite,
        huge,
        gradients,
        bit_patterns,
        zipf_rows,
        equal_codes_apart,
    )
}


def bounds(count: int, generator: torch.Generator) -> Iterator[float]:
    """Bounds exact in float32, from 2^-126 to 2^125: the ends, round ones, then ``count`` random ones."""
    yield from (2.0**-126, 2.0**125, float(np.nextafter(np.float32(2.0**125), np.float32(0))))
    yield from (float(np.float32(10.0**exponent)) for exponent in range(-5, 3))
    for exponent in (-125, -100, -24, -14, -1, 0, 1, 15, 100, 124):
        exact = np.float32(2.0**exponent)
        yield from (float(np.nextafter(exact, np.float32(way))) for way in (0, exact, np.inf))
    words = _draw(1, 252, count, generator) << 23 | _draw(0, 2**23, count, generator)
    yield from _bits(words, torch.float32).tolist()


def excess(x: torch.Tensor, y: torch.Tensor, bound: float) -> torch.Tensor:
    """Where ``y`` is no legal decoding of ``x`` [any shape, the same type]: bool, in exact arithmetic.

    Legal: NaN and Inf with identical bits, else finite and |x - y| <= bound. d = RN(|x - y|) is taken in
    float64, in which x, y and bound are exact. Rounding is monotonic: d < bound implies |x - y| < bound
    and d > bound implies |x - y| > bound. At d == bound the rounding error decides, which Knuth's
    two-sum gives exactly (no overflow: |x| < 2^128; no underflow: multiples of 2^-149).
    """
    kind = torch.int32 if x.element_size() == 4 else torch.int16
    assert x.dtype == y.dtype and x.shape == y.shape
    same = x.view(kind) == y.view(kind)
    a, b = x.double(), -y.double()
    d = a + b
    rest = d - a
    error = (a - (d - rest)) + (b - rest)
    limit = torch.tensor(bound, dtype=torch.float32).double()
    assert float(limit) == float(bound), "the bound is not exact in float32"
    inside = (d.abs() < limit) | ((d.abs() == limit) & (d.sign() * error <= 0))
    finite = torch.isfinite(x) & torch.isfinite(y)
    return ~torch.where(finite, inside, same)


def worst_error(x: torch.Tensor, y: torch.Tensor, bound: float) -> float:
    """The largest |x - y| / bound over finite pairs, rounded; inf where a NaN or Inf does not match."""
    finite = torch.isfinite(x) & torch.isfinite(y)
    if bool((excess(x, y, bound) & ~finite).any()):
        return float("inf")
    errors = (x.double() - y.double())[finite].abs()
    return float(errors.max()) / bound if errors.numel() else 0.0


def check_bound(x: torch.Tensor, y: torch.Tensor, bound: float) -> None:
    """Assert that every value of ``y`` is a legal decoding of ``x``."""
    wrong = excess(x, y, bound)
    if bool(wrong.any()):
        at = int(wrong.reshape(-1).nonzero()[0])
        pair = x.reshape(-1)[at].item(), y.reshape(-1)[at].item()
        raise AssertionError(f"{int(wrong.sum())} values beyond {bound!r}; the first, value {at}: {pair}")
