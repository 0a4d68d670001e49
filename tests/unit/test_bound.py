"""The bound holds for every value, in exact arithmetic: 1e8 adversarial values through the CPU backend."""

import pytest
import torch
from bound_proof import Proof, prove_round

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUND_VALUES = 8_500_000
MODES = ("packed", "dedup", "entropy", "auto")


def test_1e8_values_keep_the_bound() -> None:
    proof = Proof()
    for seed, (mode, dtype) in enumerate((mode, dtype) for mode in MODES for dtype in DTYPES):
        proof.add(prove_round(ROUND_VALUES, dtype, mode, seed))
    assert proof.beyond == 0, proof.where[:10]
    assert proof.values >= 10**8
    assert {"RAW", "PACKED", "DEDUP", "ENTROPY", "DEDUP_ENTROPY"} <= set(proof.blocks), proof.blocks


@pytest.mark.parametrize("mode", ["raw", "half", *MODES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_keeps_the_bound(mode: str, dtype: torch.dtype) -> None:
    proof = prove_round(100_000, dtype, mode, 100, "reference", every=4)
    assert proof.values > 100_000 and proof.beyond == 0, proof.where[:10]


@pytest.mark.parametrize("mode", ["raw", "half"])
def test_raw_is_bit_exact_and_half_keeps_the_bound_on_cpu(mode: str) -> None:
    proof = prove_round(2_000_000, torch.float32, mode, 101)
    assert proof.beyond == 0, proof.where[:10]
    assert set(proof.blocks) == ({"RAW", "FLOAT16", "BFLOAT16"} if mode == "half" else {"RAW"})
