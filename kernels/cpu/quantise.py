"""The quantiser and its inverse over groups of 32 values (docs/FORMAT.md, sections 3 and 5).

Loops have a fixed trip count of 32 so that LLVM vectorises them; without fastmath it never contracts a
product and a sum, which the bound depends on. A code with ``EXCEPTION`` set (and nothing else) stands for a
value that is sent by its own bits.
"""

import numpy as np

from tightrec.kernels.cpu.floats import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Words,
    f32,
    i32,
    narrow_bfloat16,
    narrow_float16,
    u32,
    widen_float16,
)
from tightrec.kernels.cpu.jit import inner
from tightrec.kernels.format import GROUP_VALUES, SAFE_CODE

EXCEPTION_BIT = 31
EXCEPTION = u32(1 << EXCEPTION_BIT)
_SAFE = f32(SAFE_CODE)
_ROUNDER = f32(1.5 * 2**23)
"""Adding it rounds |s| < 2^22 to an integer, half to even: the sum lies where floats are 1 apart."""
_ROUNDER_BITS = i32(0x4B400000)


@inner
def _kept(value: np.float32, decoded: np.float32, scaled: np.float32, bound: np.float32) -> bool:
    """Whether a value is sent as the code that decodes to ``decoded``."""
    return (abs(scaled) < _SAFE) & (abs(f32(value - decoded)) <= bound)


@inner
def _code(
    value: np.float32, decoded: np.float32, scaled: np.float32, sum_: np.float32, bound: np.float32
) -> u32:
    """Zig-zag code of a value whose code decodes to ``decoded``, or ``EXCEPTION``."""
    q = i32(f32(sum_).view(i32) - _ROUNDER_BITS)
    code = u32(i32(q << i32(1)) ^ i32(q >> i32(31)))
    return code if _kept(value, decoded, scaled, bound) else EXCEPTION


@inner
def code_group(
    bits: Words, codes: Words, at: int, dtype: int, inverse: np.float32, step: np.float32, bound: np.float32
) -> np.uint32:
    """Codes of the 32 values from ``at`` on, given as float32 bits; returns the codes' bitwise or."""
    source = bits[at : at + GROUP_VALUES].view(f32)
    target = codes[at : at + GROUP_VALUES]
    every = u32(0)
    if dtype == FLOAT32:
        for i in range(GROUP_VALUES):
            scaled = f32(source[i] * inverse)
            sum_ = f32(scaled + _ROUNDER)
            decoded = f32(f32(sum_ - _ROUNDER) * step)
            code = _code(source[i], decoded, scaled, sum_, bound)
            target[i] = code
            every = u32(every | code)
    elif dtype == FLOAT16:
        for i in range(GROUP_VALUES):
            scaled = f32(source[i] * inverse)
            sum_ = f32(scaled + _ROUNDER)
            product = f32(f32(sum_ - _ROUNDER) * step)
            decoded = u32(widen_float16(narrow_float16(f32(product).view(u32)))).view(f32)
            code = _code(source[i], decoded, scaled, sum_, bound)
            target[i] = code
            every = u32(every | code)
    else:
        for i in range(GROUP_VALUES):
            scaled = f32(source[i] * inverse)
            sum_ = f32(scaled + _ROUNDER)
            product = f32(f32(sum_ - _ROUNDER) * step)
            decoded = u32(u32(narrow_bfloat16(f32(product).view(u32))) << u32(16)).view(f32)
            code = _code(source[i], decoded, scaled, sum_, bound)
            target[i] = code
            every = u32(every | code)
    return every


@inner
def code_values(
    bits: Words, codes: Words, count: int, dtype: int, step: np.float32, bound: np.float32
) -> np.uint32:
    """Codes of ``count`` values and the zeros that fill their last group; returns the codes' bitwise or."""
    inverse = f32(f32(1.0) / step)
    every = u32(0)
    for at in range(0, count, GROUP_VALUES):
        every = u32(every | code_group(bits, codes, at, dtype, inverse, step, bound))
    return every


@inner
def _product(code: np.uint32, step: np.float32) -> np.uint32:
    """Bits of the float32 that a code decodes to before it is rounded to a 16-bit type."""
    q = i32(i32(code >> u32(1)) ^ i32(-i32(code & u32(1))))
    return f32(f32(q) * step).view(u32)


@inner
def decode_group(codes: Words, patterns: Words, at: int, dtype: int, step: np.float32) -> None:
    """Patterns, in the values' own dtype, of the 32 codes from ``at`` on."""
    source = codes[at : at + GROUP_VALUES]
    target = patterns[at : at + GROUP_VALUES]
    if dtype == FLOAT32:
        for i in range(GROUP_VALUES):
            target[i] = _product(source[i], step)
    elif dtype == FLOAT16:
        for i in range(GROUP_VALUES):
            target[i] = narrow_float16(_product(source[i], step))
    else:
        for i in range(GROUP_VALUES):
            target[i] = narrow_bfloat16(_product(source[i], step))


@inner
def receive_values(
    bits: Words, patterns: Words, count: int, dtype: int, step: np.float32, bound: np.float32
) -> None:
    """Patterns that values, given as float32 bits, are received as; the last group of 32 is whole."""
    inverse = f32(f32(1.0) / step)
    for at in range(0, count, GROUP_VALUES):
        own = bits[at : at + GROUP_VALUES]
        source = own.view(f32)
        target = patterns[at : at + GROUP_VALUES]
        if dtype == FLOAT32:
            for i in range(GROUP_VALUES):
                scaled = f32(source[i] * inverse)
                product = f32(f32(f32(scaled + _ROUNDER) - _ROUNDER) * step)
                kept = _kept(source[i], product, scaled, bound)
                target[i] = f32(product).view(u32) if kept else own[i]
        elif dtype == FLOAT16:
            for i in range(GROUP_VALUES):
                scaled = f32(source[i] * inverse)
                product = f32(f32(f32(scaled + _ROUNDER) - _ROUNDER) * step)
                half = u32(narrow_float16(f32(product).view(u32)))
                kept = _kept(source[i], u32(widen_float16(half)).view(f32), scaled, bound)
                target[i] = half if kept else narrow_float16(own[i])
        else:
            for i in range(GROUP_VALUES):
                scaled = f32(source[i] * inverse)
                product = f32(f32(f32(scaled + _ROUNDER) - _ROUNDER) * step)
                half = u32(narrow_bfloat16(f32(product).view(u32)))
                kept = _kept(source[i], u32(half << u32(16)).view(f32), scaled, bound)
                target[i] = half if kept else u32(own[i] >> u32(16))


@inner
def half_misses(bits: Words, count: int, kind: int, bound: np.float32) -> bool:
    """Whether float16 or bfloat16 (``kind``) moves one of ``count`` float32 values by more than the bound."""
    values = bits.view(f32)
    missed = u32(0)
    for i in range(count):
        if kind == BFLOAT16:
            wide = u32(u32(narrow_bfloat16(bits[i])) << u32(16))
        else:
            wide = u32(widen_float16(narrow_float16(bits[i])))
        half = u32(wide).view(f32)
        kept = (abs(f32(values[i] - half)) <= bound) | (values[i] == half)
        missed = u32(missed | (u32(0) if kept else u32(1)))
    return missed != u32(0)
