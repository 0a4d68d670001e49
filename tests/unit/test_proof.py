"""Proofs of a bound: decided as rational numbers decide it, for every pair of awkward values."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from tightrec.compression.proof import prove


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """Values around 1 and at the ends of the type."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    ends = [0.0, -0.0, tiny, -tiny, torch.finfo(dtype).max, -torch.finfo(dtype).max]
    around = [1.0, 1 + torch.finfo(dtype).eps, 1 - torch.finfo(dtype).eps, 0.5, 2.0, -1.0]
    return torch.tensor([*ends, *around, math.nan, math.inf, -math.inf], dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bound", [1.0, 0.5, 2.0**-126, float(np.float32(0.1)), 2.0**125, 0.0])
def test_a_proof_agrees_with_fractions(dtype: torch.dtype, bound: float) -> None:
    values = special_values(dtype)
    bits = values.view(torch.int32 if dtype == torch.float32 else torch.int16)
    for x, x_bits in zip(values, bits, strict=True):
        for y, y_bits in zip(values, bits, strict=True):
            if bound and x.isfinite() and y.isfinite():
                legal = abs(Fraction(float(x)) - Fraction(float(y))) <= Fraction(bound)
            else:
                legal = bool(x_bits == y_bits)
            proof = prove(x[None], y[None], bound)
            assert (proof.broken, proof.first_broken) == ((0, None) if legal else (1, 0)), (x, y, bound)


def test_a_difference_that_rounds_to_the_bound_is_beyond_it() -> None:
    smallest = 2.0**-149
    x = torch.tensor([1.0, 1.0, -1.0, -1.0])
    y = torch.tensor([-smallest, smallest, smallest, -smallest])
    assert [prove(x[i : i + 1], y[i : i + 1], 1.0).broken for i in range(4)] == [1, 0, 1, 0]


def test_a_proof_counts_and_places_across_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tightrec.compression.proof._PIECE", 100)
    x = torch.zeros(5, 61)
    y = x.clone()
    y.view(-1)[[130, 250, 301]] = torch.tensor([0.5, 3.0, 2.0])
    x.view(-1)[7] = y.view(-1)[7] = math.inf
    proof = prove(x, y, 1.0)
    assert (proof.values, proof.special, proof.broken, proof.first_broken) == (305, 1, 2, 250)
    assert (proof.worst_error, proof.worst_at) == (3.0, 250)
    with pytest.raises(ValueError, match=r"the original is torch\.float32 \(5, 61\)"):
        prove(x, y.half(), 1.0)
