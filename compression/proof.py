"""Whether every value is within its bound of the original, decided in exact arithmetic.

The values and the bound are exact in float64, their difference is not always: 1 - 2^-149 takes 149 bits. Let
d be the difference rounded to float64. Rounding is monotonic and the bound is a float64, so |d| < bound says
that the exact difference is within it and |d| > bound that it is not. At |d| = bound the rounding error
decides; Knuth's two-sum (The Art of Computer Programming, volume 2, 4.2.2) gives it exactly: nothing
overflows as values are below 2^128, and nothing underflows as they are multiples of 2^-149.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_PIECE = 1 << 20
_BITS = {4: torch.int32, 2: torch.int16}


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What a comparison of n values has shown; elements are counted in the order of the flat tensor."""

    values: int
    """Values compared: all of them."""
    special: int
    """NaN and Inf among the originals, which must come back with the same bits."""
    broken: int
    """Values beyond the bound, or of other bits where bits count."""
    first_broken: int | None
    """The first of them."""
    worst_error: float
    """Largest |x - y| among finite pairs, rounded to float64."""
    worst_at: int | None
    """Where it is; None where no pair is finite."""


def prove(original: Tensor, stored: Tensor, bound: float) -> Proof:
    """Compare every value of ``stored`` with ``original``.

    Legal is: NaN and Inf with the same bits; at bound 0 all values with the same bits; else finite and
    |x - y| <= bound.

    Args:
        original: any shape, float32, float16 or bfloat16.
        stored: the same shape and type.
        bound: a float32, 0 or more.

    Raises:
        ValueError: shapes or types differ.
    """
    if original.shape != stored.shape or original.dtype != stored.dtype:
        raise ValueError(
            f"the original is {original.dtype} {tuple(original.shape)}, but {stored.dtype} "
            f"{tuple(stored.shape)} was stored"
        )
    x, y = original.reshape(-1), stored.reshape(-1)
    special = broken = 0
    first: int | None = None
    worst, worst_at = 0.0, None
    for start in range(0, x.numel(), _PIECE):
        wrong, error, finite = _compare(x[start : start + _PIECE], y[start : start + _PIECE], bound)
        special += int((~torch.isfinite(x[start : start + _PIECE])).sum())
        count = int(wrong.sum())
        if count and first is None:
            first = start + int(wrong.nonzero()[0])
        broken += count
        if bool(finite.any()):
            at = int(error.argmax())
            if worst_at is None or float(error[at]) > worst:
                worst, worst_at = float(error[at]), start + at
    return Proof(
        values=x.numel(),
        special=special,
        broken=broken,
        first_broken=first,
        worst_error=worst,
        worst_at=worst_at,
    )


def _compare(x: Tensor, y: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """(broken bool, |x - y| float64 with -1 where not finite, finite pairs bool), all [n]."""
    bits = _BITS[x.element_size()]
    same = x.contiguous().view(bits) == y.contiguous().view(bits)
    finite = torch.isfinite(x) & torch.isfinite(y)
    a, b = x.double(), -y.double()
    d = a + b
    rest = d - a
    rounding = (a - (d - rest)) + (b - rest)
    error = d.abs()
    inside = (error < bound) | ((error == bound) & (d.sign() * rounding <= 0))
    legal = torch.where(finite, inside, same) if bound else same
    return ~legal, error.masked_fill(~finite, -1.0), finite
