"""The published baseline: its quantiser, both of its coders byte by byte, and its choice between them."""

import importlib.util
import sys
from math import log2
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays


def script(name: str) -> ModuleType:
    """A module of benchmarks/, which is no package."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


sc24 = script("sc24_baseline")

HEADER_BYTES = 8
CODES = arrays.arrays(
    np.int8,
    arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70),
    # Few values, so that rows repeat; and now and then every value that a byte has.
    elements=st.sampled_from([0, 1, -1]) | st.integers(-128, 127),
)


def of_few_rows(rows: int, dim: int, distinct: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    table = generator.integers(-9, 10, (distinct, dim)).astype(np.int8)
    return table[generator.integers(0, distinct, rows)]


@settings(deadline=None, max_examples=200)
@given(codes=CODES)
def test_both_coders_return_every_code(codes: np.ndarray) -> None:
    rows, dim = codes.shape
    assert (sc24.lz_decode(sc24.lz_encode(codes), rows, dim) == codes).all()
    assert (sc24.huffman_decode(sc24.huffman_encode(codes), rows, dim) == codes).all()


@pytest.mark.parametrize("distinct", [1, 5, 40, 5000])
@pytest.mark.parametrize("dim", [1, 2, 32])
def test_both_coders_return_every_code_of_several_lz_blocks(distinct: int, dim: int) -> None:
    codes = of_few_rows(2 * 2048 + 77, dim, distinct, seed=distinct)
    assert (sc24.lz_decode(sc24.lz_encode(codes), *codes.shape) == codes).all()
    assert (sc24.huffman_decode(sc24.huffman_encode(codes), *codes.shape) == codes).all()


def test_vector_lz_writes_the_bytes_that_its_rules_say() -> None:
    a, b = [1, -2, 3], [4, 5, -6]
    coded = sc24.lz_encode(np.array([a, b, a, a, a, b], np.int8))
    literals = [1, 254, 3, 4, 5, 250]
    # One row two rows back, two rows one row back (overlapping), one row four rows back.
    matches = [1, 0, 1 << 5, 0, 3, 0]
    assert list(coded) == [0b11100, *literals, *matches]


@pytest.mark.parametrize(("distance", "found"), [(1, True), (32, True), (33, False)])
def test_vector_lz_looks_back_32_rows(distance: int, found: bool) -> None:
    codes = np.zeros((distance + 1, 8), np.int8)
    codes[:, 0] = np.arange(distance + 1)
    codes[distance] = codes[0]
    tokens = distance + 1
    assert len(sc24.lz_encode(codes)) == -(-tokens // 8) + 8 * distance + (2 if found else 8)


def test_vector_lz_does_not_look_over_the_border_of_a_block() -> None:
    coded = sc24.lz_encode(np.ones((2048 + 1, 8), np.int8))
    first = 1 + 8 + 2
    assert len(coded) == 4 + first + 1 + 8
    assert int.from_bytes(coded[:4], "little") == first


def test_a_match_of_vector_lz_has_at_most_2048_rows() -> None:
    assert len(sc24.lz_encode(np.ones((2048, 4), np.int8))) == 1 + 4 + 2


def test_huffman_writes_the_bytes_that_its_rules_say() -> None:
    codes = np.array([[0, 0, 0, 0], [1, 1, 3, -2]], np.int8)
    coded = sc24.huffman_encode(codes)
    # Lengths of -2, 0, 1, 3 are 3, 1, 2, 3; their words 110, 0, 10, 111.
    bits = "0000" + "10" + "10" + "111" + "110"
    stream = [int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits), 8)]
    assert list(coded) == [126, 5, 3, 0, 1, 2, 0, 3, *stream]


@settings(deadline=None)
@given(counts=arrays.arrays(np.int64, 256, elements=st.integers(0, 3) | st.integers(0, 10**6)))
def test_huffman_lengths_are_complete_and_within_a_bit_of_the_entropy(counts: np.ndarray) -> None:
    lengths = sc24.code_lengths(counts).astype(int)
    assert ((lengths > 0) == (counts > 0)).all()
    total = int(counts.sum())
    if (counts > 0).sum() < 2:
        return
    assert sum(2.0 ** -int(length) for length in lengths[lengths > 0]) == 1
    entropy = -sum(int(n) / total * log2(int(n) / total) for n in counts[counts > 0])
    mean = float((lengths * counts).sum()) / total
    assert entropy <= mean + 1e-9
    assert mean < entropy + 1


def test_huffman_lengths_are_the_best_ones() -> None:
    counts = np.zeros(256, np.int64)
    counts[[3, 5, 8, 13, 21]] = [1, 1, 2, 4, 8]
    assert sc24.code_lengths(counts)[[3, 5, 8, 13, 21]].tolist() == [4, 4, 3, 2, 1]
    counts[[3, 5, 8, 13, 21]] = 1
    assert sorted(sc24.code_lengths(counts)[counts > 0].tolist()) == [2, 2, 2, 3, 3]


@pytest.mark.parametrize("eb_rel", [0.01, 0.03, 0.05])
def test_the_quantiser_is_the_published_one(eb_rel: float) -> None:
    block = np.random.default_rng(0).standard_normal((512, 32)).astype(np.float32)
    codes, eb = sc24.quantise(block, eb_rel)
    assert eb == pytest.approx(eb_rel * (float(block.max()) - float(block.min())), rel=1e-6)
    assert (codes == np.rint(block / np.float32(2 * eb))).all()
    assert codes.dtype == np.int8
    # The scheme does not check its bound: float32 rounding may pass it by a hair.
    error = np.abs(sc24.dequantise(codes, eb).astype(np.float64) - block)
    assert (error <= eb * (1 + 1e-4)).all()


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (np.zeros((0, 4), np.float32), "empty"),
        (np.array([[0, np.nan]], np.float32), "finite"),
        (np.array([[0, np.inf]], np.float32), "finite"),
        (np.full((4, 4), 3, np.float32), "all equal"),
        (np.array([[1000, 1001]], np.float32), "signed byte"),
    ],
)
def test_what_the_scheme_has_no_form_for_is_refused(block: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sc24.compress(block, 0.03)


def test_the_speed_up_is_the_published_model() -> None:
    assert sc24.speed_up(10, "vector_lz") == pytest.approx(1 / (0.1 + 4 / 45 + 4 / 290))
    assert sc24.speed_up(10, "huffman") == pytest.approx(1 / (0.1 + 4 / 60 + 4 / 40))


def test_the_coder_of_larger_speed_up_is_taken_even_where_the_other_is_smaller() -> None:
    generator = np.random.default_rng(1)
    block = generator.standard_normal((512, 32)).astype(np.float32)
    assert sc24.compress(block, 0.03).coder == "huffman"
    assert sc24.compress(block[generator.integers(0, 10, 512)], 0.03).coder == "vector_lz"
    # A repeat every other row makes LZ a little larger than Huffman, but it is modelled to be faster.
    half = block[np.arange(512) // 2]
    made = sc24.compress(half, 0.01)
    assert made.coder == "vector_lz"
    smaller = sc24.compress(half, 0.03)
    assert smaller.sizes["huffman"] < smaller.sizes["vector_lz"]
    for each, eb_rel in ((made, 0.01), (smaller, 0.03)):
        speeds = {coder: sc24.speed_up(half.nbytes / size, coder) for coder, size in each.sizes.items()}
        assert each.coder == max(speeds, key=lambda coder: speeds[coder]), eb_rel


@pytest.mark.parametrize("distinct", [3, 512])
def test_a_compressed_block_comes_back_as_its_codes_say(distinct: int) -> None:
    block = np.random.default_rng(2).standard_normal((distinct, 32)).astype(np.float32)
    block = block[np.arange(512) * 7 % distinct]
    codes, eb = sc24.quantise(block, 0.03)
    made = sc24.compress(block, 0.03)
    coded = {"vector_lz": sc24.lz_encode(codes), "huffman": sc24.huffman_encode(codes)}
    assert made.sizes == {coder: HEADER_BYTES + len(data) for coder, data in coded.items()}
    assert len(made.payload) == made.sizes[made.coder]
    assert made.payload[HEADER_BYTES:] == coded[made.coder]
    values = sc24.decompress(made.payload, 512, 32)
    assert values.dtype == np.float32
    assert (values == sc24.dequantise(codes, eb)).all()


@pytest.mark.parametrize("distinct", [3, 512])
def test_damage_is_refused(distinct: int) -> None:
    block = np.random.default_rng(3).standard_normal((distinct, 32)).astype(np.float32)
    payload = sc24.compress(block[np.arange(512) % distinct], 0.03).payload
    for size in (0, HEADER_BYTES - 1, HEADER_BYTES, len(payload) - 1):
        with pytest.raises(ValueError, match="payload"):
            sc24.decompress(payload[:size], 512, 32)
    with pytest.raises(ValueError, match="another shape"):
        sc24.decompress(payload, 513, 32)
    data = payload[HEADER_BYTES:]
    for decode in (sc24.lz_decode, sc24.huffman_decode):
        for size in (0, 1, len(data) // 2):
            with pytest.raises(ValueError, match=r"damaged|cut off"):
                decode(data[:size], 512, 32)


@pytest.mark.parametrize(
    ("decode", "data", "rows", "dim"),
    [
        # A match before the first row; one past the last.
        ("lz_decode", [1, 0, 0], 1, 4),
        ("lz_decode", [2, 9, 9, 2 << 5, 0], 2, 2),
        # A byte too many.
        ("lz_decode", [0, 9, 9, 0], 1, 2),
        ("huffman_decode", [128, 1, 1, 1, 0b10, 0], 1, 2),
        # A code that no word stands for; a codebook that goes past the last code.
        ("huffman_decode", [128, 0, 1, *[255] * 16], 1, 2),
        ("huffman_decode", [255, 1, 1, 1, 0b10], 1, 2),
    ],
)
def test_planted_damage_is_refused(decode: str, data: list[int], rows: int, dim: int) -> None:
    with pytest.raises(ValueError, match=r"damaged|cut off"):
        getattr(sc24, decode)(bytes(data), rows, dim)
