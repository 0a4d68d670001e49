"""The tools of the bound proof themselves: the exact check is exact, the generators reach what they name."""

from fractions import Fraction

import adversarial
import codec_jobs
import independent_decoder as independent
import mutations
import numpy as np
import pytest
import torch
from adversarial import GENERATORS
from frame_writer import Block, frame

DTYPES = list(adversarial.FLOATS)


def legal(x: torch.Tensor, y: torch.Tensor, bound: float) -> list[bool]:
    """The definition, in fractions."""
    pairs = zip(
        x.tolist(), y.tolist(), (codec_jobs.to_bits(x) == codec_jobs.to_bits(y)).tolist(), strict=True
    )
    finite = [np.isfinite(a) and np.isfinite(b) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    return [
        abs(Fraction(a) - Fraction(b)) <= Fraction(bound) if ok else same
        for ok, (a, b, same) in zip(finite, pairs, strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_check_is_exact(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    found = [0, 0]
    for bound in [*adversarial.bounds(40, generator)][::2]:
        x = torch.cat([GENERATORS[name](60, dtype, bound, generator) for name in ("uniform", "bit_patterns")])
        y = (x.double() + bound * (1 - 2 * torch.randint(0, 2, x.shape, generator=generator))).to(dtype)
        y = torch.where(torch.rand(x.shape, generator=generator) < 0.1, x, y)
        expected = legal(x, y, bound)
        assert (~adversarial.excess(x, y, bound)).tolist() == expected
        found[0] += expected.count(False)
        found[1] += expected.count(True)
    assert min(found) > 500


def test_a_difference_that_float64_rounds_to_the_bound_is_judged() -> None:
    """The differences are 1 + 2^-100 and 1 - 2^-100, both 1 in float64."""
    x = torch.tensor([1.0, 1.0, -1.0, -1.0])
    y = torch.tensor([-(2.0**-100), 2.0**-100, 2.0**-100, -(2.0**-100)])
    assert ((x.double() - y.double()).abs() == 1).all()
    assert adversarial.excess(x, y, 1.0).tolist() == [True, False, True, False]
    with pytest.raises(AssertionError, match="2 values beyond"):
        adversarial.check_bound(x, y, 1.0)


def test_non_finite_values_must_come_back_with_their_bits() -> None:
    bits = np.array([0x7FC00001, 0x7FC00001, 0x7F800000, 0x7F800000, 0x3F800000], np.uint32)
    other = np.array([0x7FC00001, 0x7FC00000, 0x7F800000, 0x7F7FFFFF, 0x7FC00000], np.uint32)
    x, y = (codec_jobs.from_bits(b, torch.float32) for b in (bits, other))
    assert adversarial.excess(x, y, 2.0**125).tolist() == [False, True, False, True, True]
    assert adversarial.worst_error(x, y, 1.0) == float("inf")
    assert adversarial.worst_error(x[:1], y[:1], 1.0) == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(GENERATORS))
def test_generators_are_seeded_and_of_the_right_form(name: str, dtype: torch.dtype) -> None:
    for bound in (2.0**-126, float(np.float32(0.01)), 2.0**125):
        for count in (0, 1, 33, 1000):
            draws = [
                GENERATORS[name](count, dtype, bound, torch.Generator().manual_seed(7)) for _ in range(2)
            ]
            assert draws[0].shape == (count,) and draws[0].dtype == dtype
            assert np.array_equal(codec_jobs.to_bits(draws[0]), codec_jobs.to_bits(draws[1]))


def test_generators_reach_what_they_name() -> None:
    draw = {}
    for name, make in GENERATORS.items():
        draw[name] = make(20000, torch.float32, 0.25, torch.Generator().manual_seed(7))
    halves = draw["ties"].double() / 0.5
    assert ((halves - halves.floor()) == 0.5).sum() > 1000
    assert (draw["multiples"].double() / 0.5 == (draw["multiples"].double() / 0.5).round()).sum() > 1000
    edge = (draw["safe_range"].double() / 0.5).abs()
    assert (edge == 2.0**22).any() and (edge < 2.0**22).any() and (edge > 2.0**22).any()
    assert ((draw["denormals"].abs() < 2.0**-126) & (draw["denormals"] != 0)).all()
    assert (draw["zeros"] == 0).all() and draw["zeros"].signbit().any() and not draw["zeros"].signbit().all()
    assert (draw["huge"].abs() >= 2.0**126).all() and (
        draw["huge"].abs() == torch.finfo(torch.float32).max
    ).any()
    assert draw["non_finite"].isnan().any() and draw["non_finite"].isinf().any()
    signalling = codec_jobs.to_bits(draw["non_finite"]) & 0x7FC00000 == 0x7F800000
    assert (signalling & draw["non_finite"].isnan().numpy()).any()
    assert (draw["gradients"] == 0).double().mean() > 0.7
    assert len(set(codec_jobs.to_bits(adversarial.every_pattern(torch.bfloat16)).tolist())) == 65536
    rows = draw["zipf_rows"].reshape(-1, 16)
    assert len(rows.unique(dim=0)) < 0.8 * len(rows)


def test_bounds_are_exact_and_legal() -> None:
    for bound in adversarial.bounds(500, torch.Generator().manual_seed(1)):
        assert float(np.float32(bound)) == bound
        assert 2.0**-126 <= bound <= 2.0**125


def test_mutations_are_seeded_and_mostly_pass_the_headers() -> None:
    blocks = [
        Block(mode=0, rows=9, dim=3, payload=bytes(range(108))),
        Block(mode=0, rows=2, dim=2, payload=bytes(16)),
    ]
    good, shapes = frame(blocks), [(9, 3), (2, 2)]
    independent.decode_frame(good, shapes, "float32")
    runs = [
        list(mutations.mutations(good, np.random.default_rng(3), 500, frame(blocks[::-1]))) for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 350
    past = 0
    for damaged in runs[0]:
        try:
            past += bool(independent.read_headers(damaged, shapes, "float32", False))
        except independent.Rejected:
            continue
    assert 250 <= past < 500
