"""What error-bounded codecs are known to get wrong, one test for each."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from adversarial import check_bound, excess
from codec_jobs import from_bits

from tightrec.compression.bounds import Bound
from tightrec.compression.codebooks import Codebooks, ReceivedCodebooks, code_lengths
from tightrec.compression.codec import MODES, decode, encode
from tightrec.compression.layout import Layout
from tightrec.kernels.format import FRAME_HEADER_BYTES, SYMBOLS
from tightrec.kernels.format import Mode as BlockMode

BACKENDS = ("reference", "cpu")


def round_trip(values: torch.Tensor, bound: float, mode: str = "packed", backend: str = "") -> torch.Tensor:
    layout = Layout.flat([[values.numel()]], [1])
    frames = encode(values, layout, bound, mode, backend=backend)
    return decode(frames, layout, dtype=values.dtype, backend=backend)


def single(number: float) -> float:
    """The number as float32."""
    return float(torch.tensor(number, dtype=torch.float32))


def naive(values: torch.Tensor, bound: float) -> torch.Tensor:
    """The quantiser of most published code: no look at what the decoder gets."""
    step = torch.tensor(2 * bound, dtype=values.dtype)
    return (values / step).round() * step


def test_the_naive_quantiser_breaks_its_own_bound_and_ours_does_not() -> None:
    values = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    bound = single(1e-5)
    assert int(excess(values, naive(values, bound), bound).sum()) > 1000
    for backend in BACKENDS:
        check_bound(values, round_trip(values, bound, backend=backend), bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_bound_is_checked_after_rounding_to_the_16_bit_type(dtype: torch.dtype) -> None:
    values = torch.randn(10**5, generator=torch.Generator().manual_seed(0)).to(dtype)
    bound = single(1e-2)
    before = naive(values.float(), bound).to(dtype)
    assert int(excess(values, before, bound).sum()) > 0
    for backend in BACKENDS:
        check_bound(values, round_trip(values, bound, backend=backend), bound)


def test_a_thread_that_flushes_denormals_writes_the_same_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    exponent = torch.randint(0, 150, (10**4,), generator=generator)
    values = torch.randn(10**4, generator=generator) * 2.0**-exponent
    layout = Layout.flat([[10**4]], [1])
    for mode in ("packed", "dedup"):
        plain = encode(values, layout, 2.0**-126, mode)
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush denormals")
        try:
            flushed = encode(values, layout, 2.0**-126, mode)
            again = decode(flushed, layout)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(plain.frame(0), flushed.frame(0)), mode
        assert torch.equal(again.view(torch.int32), decode(plain, layout).view(torch.int32)), mode


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_conversion_of_nan_inf_or_large_values_to_an_integer(backend: str) -> None:
    bits = [0x7FC00000, 0x7F800001, 0xFFC12345, 0xFF800001, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x4B800000]
    special = from_bits(np.array(bits, dtype=np.uint32), torch.float32)
    values = torch.cat([torch.zeros(10), special, torch.full((50,), 0.3)])
    for mode in MODES:
        again = round_trip(values, 0.25, mode, backend)
        assert torch.equal(again[10:18].view(torch.int32), special.view(torch.int32)), mode
    one = special[1:2]  # a lone signalling NaN, which a detour through a double would make quiet
    for mode in MODES:
        assert torch.equal(round_trip(one, 0.25, mode, backend).view(torch.int32), one.view(torch.int32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_end_at_2_to_the_22(backend: str) -> None:
    """The largest codes still decode within the bound, and what lies beyond comes back exactly."""
    steps = torch.tensor([2.0**22 - 1, 2.0**22 - 0.5, 2.0**22, 2.0**22 + 1, 2.0**23, 1.5 * 2.0**24])
    values = torch.cat([steps, -steps])
    again = round_trip(values, 0.5, backend=backend)
    assert torch.equal(again[[2, 3, 4, 5]], values[[2, 3, 4, 5]])
    check_bound(values, again, 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_round_to_even(backend: str) -> None:
    values = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -3.5])
    again = round_trip(values, 0.5, backend=backend)
    assert again.tolist() == [0.0, 2.0, 2.0, 4.0, 0.0, -2.0, -2.0, -4.0]


def test_bytes_do_not_depend_on_the_run_or_the_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(500, 32, generator=generator)
    values = few[torch.randint(0, 500, (20000,), generator=generator)]
    layout = Layout.flat([[5000, 5000], [5000, 5000]], [32, 32])
    threads = torch.get_num_threads()
    seen = set()
    for count in (1, 2, 3, 2, 1):
        torch.set_num_threads(count)
        for mode in ("packed", "dedup", "auto"):
            frames = encode(values.view(-1), layout, Bound(value=0.02, of="rms"), mode)
            seen.add((mode, frames.buffer[: int(frames.sizes.sum())].numpy().tobytes()))
    torch.set_num_threads(threads)
    assert len(seen) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_value_is_written_even_where_all_codes_are_zero(backend: str) -> None:
    layout = Layout.flat([[3000, 0, 7]], [32, 4, 2048])
    values = torch.full(layout.shape, 1e-9)
    for mode in MODES:
        out = torch.full(layout.shape, float("nan"))
        frames = encode(values, layout, 0.5, mode, backend=backend)
        decode(frames, layout, out, backend=backend)
        assert bool((out.abs() <= 0.5).all()), mode
        if mode in ("packed", "dedup", "entropy", "auto"):
            assert int(frames.sizes[0]) <= 1300, "zeros should cost next to nothing"


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_zero_rows_cost_next_to_nothing(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2048, 128, generator=generator)
    values[torch.rand(2048, generator=generator) < 0.9] = 0
    layout = Layout.flat([[2048]], [128])
    dense = int((values.abs().sum(1) > 0).sum())
    size = int(encode(values.view(-1), layout, 0.05, "packed", backend=backend).sizes[0])
    random = torch.randn(2048 * 128, generator=generator)
    full = int(encode(random, layout, 0.05, "packed", backend=backend).sizes[0])
    zero_rows = size - full * dense / 2048
    assert zero_rows < 8 * (2048 - dense), "a row of zeros, 512 bytes, takes more than 8"


@pytest.mark.parametrize("backend", BACKENDS)
def test_duplicates_are_found_across_the_whole_block(backend: str) -> None:
    """The published scheme looks back 32 rows: here every row repeats after 1,000."""
    few = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    layout = Layout.flat([[2000]], [32])
    once = Layout.flat([[1000]], [32])
    twice = int(encode(few.repeat(2, 1).view(-1), layout, 0.05, "dedup", backend=backend).sizes[0])
    packed = int(encode(few.view(-1), once, 0.05, "packed", backend=backend).sizes[0])
    indices = 2000 * 10 / 8
    assert twice - packed == pytest.approx(indices, rel=0.03), "more than 2,000 indices of 10 bits are added"


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_with_equal_codes_and_huge_values_are_not_replaced_by_one_anothers_bits(backend: str) -> None:
    """Raw groups of a row that stands for others must hold what it decodes to, not what it was."""
    values = torch.empty(64, 32)
    values[:, :30] = float("inf")
    values[:, 30:] = torch.linspace(-0.99, 0.99, 64)[:, None]
    layout = Layout.flat([[64]], [32])
    for mode in ("dedup", "auto", "entropy"):
        frames = encode(values.view(-1), layout, 1.0, mode, backend=backend)
        check_bound(values.view(-1), decode(frames, layout, backend=backend), 1.0)
        assert int(frames.sizes[0]) < 400, "the rows decode to the same bits and should be sent once"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stale_codebook_is_only_less_dense(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = Layout.flat([[20000]], [1])
    early = torch.randn(20000, generator=generator)
    sizes = {}
    for name, scale in {"same": 1.0, "wider": 2.0, "far": 100.0}.items():
        sender, receiver = Codebooks(1, 1), ReceivedCodebooks(1, 1)
        encode(early, layout, 0.1, "entropy", codebooks=sender, backend=backend)
        sender.refresh()
        late = torch.randn(20000, generator=generator) * scale
        frames = encode(late, layout, 0.1, "entropy", codebooks=sender, backend=backend)
        check_bound(late, decode(frames, layout, codebooks=receiver, backend=backend), single(0.1))
        fresh = Codebooks(1, 1)
        encode(late, layout, 0.1, "entropy", codebooks=fresh, backend=backend)
        fresh.refresh()
        best = encode(late, layout, 0.1, "entropy", codebooks=fresh, backend=backend)
        sizes[name] = int(frames.sizes[0]) / int(best.sizes[0])
    assert sizes["same"] < 1.005, "a book of earlier values should be as good as one of these"
    assert 1.0 <= sizes["wider"] < 1.3 and sizes["far"] < 1.3, sizes


def test_code_lengths_are_optimal_limited_and_complete() -> None:
    generator = torch.Generator().manual_seed(0)
    for spread in (0.3, 2.0, 10.0, 60.0, 1000.0):
        codes = (torch.randn(10**5, generator=generator).abs() * spread).long().clamp(max=255)
        counts = torch.bincount(codes, minlength=SYMBOLS)
        lengths = code_lengths(counts.tolist())
        assert max(lengths) <= 12 and lengths[254] and lengths[255]
        assert sum(2.0**-length for length in lengths if length) == 1.0
        assert all(length for length, count in zip(lengths, counts.tolist(), strict=True) if count)
        p = counts[counts > 0] / counts.sum()
        entropy = float(-(p * p.log2()).sum())
        mean = float((counts * torch.tensor(lengths)).sum() / counts.sum())
        redundancy = float(p.max()) + 0.15  # Gallager 1978: p + 0.086; the limit of 12 bits costs a little
        assert entropy <= mean <= entropy + redundancy
    assert sum(1 for length in code_lengths([0] * SYMBOLS) if length) == 3


def test_length_limited_codes_are_shortest() -> None:
    """Fibonacci counts make Huffman's tree as deep as it gets: the limit binds and the cost stays optimal."""
    counts = [0] * SYMBOLS
    a, b = 1, 1
    for symbol in range(24):
        counts[symbol] = a
        a, b = b, a + b
    lengths = code_lengths(counts)
    assert max(lengths) == 12
    assert sum(2.0**-length for length in lengths if length) == 1.0
    cost = sum(max(c, 1) * n for c, n in zip(counts, lengths, strict=True) if n)
    # No exchange of one bit between two symbols that keeps Kraft's sum is cheaper.
    used = [s for s in range(SYMBOLS) if lengths[s]]
    assert all(lengths[x] <= lengths[y] for x in used for y in used if max(counts[x], 1) > max(counts[y], 1))
    entropy_cost = -sum(c * math.log2(c / sum(counts)) for c in counts if c)
    assert cost < 1.05 * entropy_cost


def test_importing_the_codec_starts_neither_cuda_nor_a_compiler() -> None:
    code = (
        "import sys, torch, tightrec.compression.codec;"
        "torch.ops.tightrec.encode_, torch.ops.tightrec.decode_;"
        "assert not torch.cuda.is_initialized();"
        "loaded = {'numba', 'cupy', 'torchrec', 'hydra', 'fbgemm_gpu'} & set(sys.modules);"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("backend", BACKENDS)
def test_codebooks_are_told_apart_over_many_refreshes(backend: str) -> None:
    """Each refresh has an id of its own, also where ids start again after 2^31 - 1."""
    layout = Layout.flat([[3000]], [4])
    sender, receiver = Codebooks(1, 1), ReceivedCodebooks(1, 1)
    ids = []
    for step in range(7):
        scale = (0.3, 0.45)[step % 2]
        values = torch.randn(12000, generator=torch.Generator().manual_seed(step)) * scale
        frames = encode(values, layout, 0.05, "entropy", codebooks=sender, backend=backend)
        again = decode(frames, layout, codebooks=receiver, backend=backend)
        check_bound(values, again, single(0.05))
        assert int(receiver.ids[0]) == int(sender.ids[0]), "the book was not used: nothing is tested"
        sender.refresh()
        ids.append(int(sender.ids[0]))
        if step == 2:
            sender.ids.fill_(2**31 - 3)
    assert ids == [1, 2, 3, 2**31 - 2, 2**31 - 1, 1, 2]


def test_rows_whose_hashes_are_equal_are_still_told_apart() -> None:
    """Half a million distinct rows hold some thirty pairs that agree in any 32-bit hash."""
    count, generator = 500_000, torch.Generator().manual_seed(0)
    values = torch.zeros(count, 16)
    values[:, :2] = torch.randint(-(2**20), 2**20, (count, 2), generator=generator).float()
    layout = Layout.flat([[count]], [16])
    frames = encode(values.view(-1), layout, 0.25, "dedup")
    assert int(frames.frame(0)[FRAME_HEADER_BYTES]) == BlockMode.DEDUP
    check_bound(values.view(-1), decode(frames, layout), 0.25)


@pytest.mark.parametrize("backend", BACKENDS)
def test_auto_sends_a_codebook_that_pays_later(backend: str) -> None:
    """A block that is smallest in 16 bits only because its codebook is due must not stay so for ever."""
    values = torch.randn(128, generator=torch.Generator().manual_seed(0)) * 0.05
    values[torch.rand(128, generator=torch.Generator().manual_seed(1)) < 0.3] = 0
    layout = Layout.flat([[4]], [32])
    sender, receiver = Codebooks(1, 1), ReceivedCodebooks(1, 1)
    sizes = []
    for step in range(4):
        frames = encode(values, layout, 0.001, "auto", codebooks=sender, backend=backend)
        check_bound(values, decode(frames, layout, codebooks=receiver, backend=backend), single(0.001))
        sizes.append(int(frames.sizes[0]))
        if step == 0:
            sender.refresh()
    assert sizes[1] > sizes[0] > sizes[2] == sizes[3], sizes
