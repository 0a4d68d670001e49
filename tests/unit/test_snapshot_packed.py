"""Rows keep the error that their type promises, at any magnitude, or are refused by number."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tightrec.snapshot.packed import pack, row_bytes, stored_integers, unpack
from tightrec.snapshot.precision import ROW_SEARCHES, TABLE_TYPES

DIMS = (4, 8, 12, 16, 20, 32, 64, 100, 128)
INTEGERS = ("int8", "int4", "int2")
STEPS = {"int8": 255, "int4": 15, "int2": 3}


def normal(rows: int, dim: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)) * scale


def squared_error(rows: Tensor, kind: str, row_search: str) -> Tensor:
    return (unpack(pack(rows, kind, row_search), kind, rows.shape[1]).double() - rows).square().sum(dim=1)


@pytest.mark.parametrize("kind", TABLE_TYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_sizes_are_those_of_the_layout(kind: str, dim: int) -> None:
    expected = {"fp32": 4 * dim, "fp16": 2 * dim, "int8": dim + 4, "int4": dim // 2 + 4, "int2": dim // 4 + 4}
    assert row_bytes(kind, dim) == expected[kind]
    for rows in (0, 1, 3):
        packed = pack(normal(rows, dim), kind)
        assert packed.dtype == torch.uint8 and packed.shape == (rows, expected[kind])
        assert unpack(packed, kind, dim).shape == (rows, dim)


def test_a_row_is_scale_bias_and_codes_byte_by_byte() -> None:
    # A step of 0.5 from -1, exact in fp16: little-endian 0x3800 and 0xBC00.
    ramp = torch.arange(4) * 0.5 - 1
    rows = torch.cat([ramp.repeat(3), torch.tensor([6.5])])[-4:][None]
    assert rows.tolist() == [[-0.5, 0.0, 0.5, 6.5]]
    rows[0, 0] = -1.0
    assert pack(rows, "int4", "min_max").tolist() == [[0x00, 0x38, 0x00, 0xBC, 0x20, 0xF3]]
    assert pack(ramp[None], "int2", "min_max").tolist() == [[0x00, 0x38, 0x00, 0xBC, 0b11100100]]
    rows[0, 3] = 126.5
    assert pack(rows, "int8").tolist() == [[0x00, 0x38, 0x00, 0xBC, 0, 2, 3, 255]]
    assert pack(ramp[None], "fp16").tolist() == [[0x00, 0xBC, 0x00, 0xB8, 0x00, 0x00, 0x00, 0x38]]


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("scale", [1e-9, 1e-7, 1e-6, 3e-4, 0.05, 1.0, 5e3])
def test_min_max_is_half_a_step_off_at_most_at_any_magnitude(kind: str, dim: int, scale: float) -> None:
    rows = normal(200, dim, seed=dim, scale=scale)
    rows[::2] += scale * 2  # rows of one sign too
    packed = pack(rows, kind, "min_max")
    error = (unpack(packed, kind, dim).double() - rows).abs().amax(dim=1)
    largest = rows.abs().amax(dim=1)
    _, step, bias = (part.double() for part in stored_integers(packed, kind))
    assert (error <= step[:, 0] / 2 + largest * 2.0**-22).all()
    # The step is not coarser than fp16 makes it: what the bias adds to the range, and one fp16 rounding up.
    low, high = rows.double().aminmax(dim=1)
    assert (bias[:, 0] <= low).all()
    assert (low - bias[:, 0] <= (low.abs() * 2.0**-10).clamp(min=2.0**-24)).all()
    finest = (high - bias[:, 0]) / STEPS[kind]
    assert (step[:, 0] <= (finest * (1 + 2.0**-10)).clamp(min=0) + 2.0**-24).all()


@pytest.mark.parametrize("kind", ["int4", "int2"])
@pytest.mark.parametrize("draw", ["normal", "uniform", "heavy tails"])
def test_the_greedy_search_never_loses_and_gains_on_a_table(kind: str, draw: str) -> None:
    rows = normal(150, 64, seed=5)
    if draw == "uniform":
        rows = torch.rand(150, 64, generator=torch.Generator().manual_seed(5)) - 0.5
    elif draw == "heavy tails":
        rows = rows / normal(150, 64, seed=6).abs().clamp(min=0.01)
    greedy, plain = squared_error(rows, kind, "greedy"), squared_error(rows, kind, "min_max")
    assert (greedy <= plain).all()
    gain = {"int4": 0.9, "int2": 0.7}[kind]
    assert greedy.sum() < plain.sum() * gain


def test_the_greedy_search_is_the_same_on_several_threads() -> None:
    rows = normal(301, 16)
    one = pack(rows, "int4")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(pack(rows, "int4"), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", TABLE_TYPES)
@pytest.mark.parametrize("row_search", ROW_SEARCHES)
def test_rows_at_the_edges_come_back(kind: str, row_search: str) -> None:
    dim, narrow = 16, normal(1, 16, scale=1e-3)
    outlier = narrow.clone()
    outlier[0, 7] = 6e4
    edges = {
        "zeros": torch.zeros(1, dim),
        "negative zeros": torch.full((1, dim), -0.0),
        "one value": torch.full((1, dim), 0.3),
        "one negative value": torch.full((1, dim), -1000.3),
        "far from zero": 1000 + narrow,
        "an outlier": outlier,
        "subnormal": narrow * 1e-38,
        "the smallest float": torch.full((1, dim), 1e-45) * (torch.arange(dim) % 2),
        "up to fp16's largest": torch.linspace(-65504, 65504, dim)[None],
    }
    for name, rows in edges.items():
        packed = pack(rows, kind, row_search)
        found = unpack(packed, kind, dim)
        allowed = rows.abs() * 2.0**-11 + 2.0**-25  # fp16
        if kind in INTEGERS:
            step = stored_integers(packed, kind)[1]
            # A greedy row may clip, where that costs less in sum than a coarser step.
            clipped = dim**0.5 if row_search == "greedy" and kind != "int8" else 1.0
            allowed = step / 2 * clipped * 1.2 + rows.abs().max() * 2.0**-22
        assert ((found - rows).abs() <= allowed).all(), (name, found, rows)
        if "zeros" in name:
            assert not found.view(torch.int32).any()


def test_the_table_is_not_copied_and_chunks_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = normal(100, 8)
    whole = {kind: pack(rows, kind) for kind in TABLE_TYPES}
    assert whole["fp32"].data_ptr() == rows.data_ptr()
    monkeypatch.setattr("tightrec.snapshot.packed._CHUNK_VALUES", 8 * 7)
    for kind, expected in whole.items():
        assert torch.equal(pack(rows, kind), expected)
        once = unpack(expected, kind, 8)
        # A slice that starts where no float may, and columns of a wider tensor.
        wide = torch.zeros(100, expected.shape[1] + 3, dtype=torch.uint8)
        wide[:, 3:] = expected
        assert torch.equal(unpack(wide[:, 3:], kind, 8), once)
    wide = normal(100, 16)[:, 4:12]
    assert torch.equal(pack(wide, "int4"), pack(wide.contiguous(), "int4"))


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        *(
            (kind, value, "holds NaN or Inf")
            for kind in TABLE_TYPES
            for value in (float("nan"), float("-inf"))
        ),
        ("fp16", 65520.0, "goes beyond fp16"),
        ("int8", -65505.0, "bias and scale of int8"),
        ("int8", 2e7, "bias and scale of int8"),
        ("int4", 1.1e6, "bias and scale of int4"),
        ("int2", 2.1e5, "bias and scale of int2"),
    ],
)
def test_a_row_that_cannot_be_held_is_refused_by_number(
    kind: str, value: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tightrec.snapshot.packed._CHUNK_VALUES", 8 * 3)
    rows = normal(9, 8)
    rows[7, 2] = value
    with pytest.raises(ValueError, match=rf"^row 7 .*{message}"):
        pack(rows, kind)


def test_what_just_fits_fp16_is_held() -> None:
    rows = normal(3, 8)
    rows[1, 2] = 65519.0
    assert unpack(pack(rows, "fp16"), "fp16", 8)[1, 2] == 65504
    for kind, steps in STEPS.items():
        rows[1, 2] = 65000.0 * steps  # the scale fits, though the value is beyond fp16
        step = stored_integers(pack(rows, kind), kind)[1][1].item()
        assert abs(unpack(pack(rows, kind), kind, 8)[1, 2].item() - rows[1, 2].item()) <= step / 2
    above = torch.linspace(70_000, 1e6, 8)[None]  # no value fits, a bias of 65504 does
    _, step, bias = stored_integers(pack(above, "int8"), "int8")
    assert bias == 65504 and ((unpack(pack(above, "int8"), "int8", 8) - above).abs() <= step / 2).all()


def test_wrong_words_and_shapes_are_refused() -> None:
    rows = normal(2, 8)
    with pytest.raises(ValueError, match="'int3' is unknown: choose one of fp32"):
        pack(rows, "int3")
    with pytest.raises(ValueError, match="'best' is unknown: choose one of min_max"):
        pack(rows, "int4", "best")
    with pytest.raises(ValueError, match="dim 6 cannot be stored"):
        pack(rows[:, :6], "fp32")
    for other in (rows.double(), rows[0]):
        with pytest.raises(ValueError, match="float32"):
            pack(other, "int8")
    with pytest.raises(ValueError, match=r"uint8 \[R, 12\]"):
        unpack(pack(rows, "int4"), "int8", 8)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(INTEGERS),
    row_search=st.sampled_from(ROW_SEARCHES),
    values=st.lists(st.floats(-65504, 65504, width=32, allow_subnormal=True), min_size=4, max_size=4),
)
def test_any_four_values_keep_half_a_step_or_a_lower_sum(
    kind: str, row_search: str, values: list[float]
) -> None:
    rows = torch.tensor([values])
    packed = pack(rows, kind, "min_max")
    error = (unpack(packed, kind, 4).double() - rows).abs().max()
    assert (
        error <= stored_integers(packed, kind)[1].double().item() / 2 + rows.abs().max().double() * 2.0**-22
    )
    assert squared_error(rows, kind, row_search) <= squared_error(rows, kind, "min_max")
