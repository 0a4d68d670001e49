"""The codec on a GPU: the reference's bytes and values, the bound, and the manners of a call.

Needs torch, CuPy, numpy and pytest alone, so that it runs wherever benchmarks/gpu.py does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from tightrec.compression.bounds import Bound, Bounds
from tightrec.compression.codebooks import Codebooks, ReceivedCodebooks
from tightrec.compression.codec import (
    MODES,
    Mode,
    Modes,
    decode,
    decode_scratch_bytes,
    encode,
    encode_scratch_bytes,
)
from tightrec.compression.frames import FrameError, Frames
from tightrec.compression.layout import Layout

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICE = torch.device("cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BOUND = 0.02
LAYOUTS = {
    "columns": Layout.columns(rows=[70, 0, 301], dims=[16, 1, 33, 128]),
    "flat": Layout.flat(rows=[[1, 31, 33, 2, 0], [700, 5, 1, 40, 3]], dims=[64, 3, 2, 2048, 5]),
    "long": Layout.flat(rows=[[5000]], dims=[20]),
    "empty": Layout.flat(rows=[[0], [0]], dims=[4]),
}


def values_of(layout: Layout, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values on the CPU: most near zero, some repeated, some large, NaN, Inf, denormal or on a tie."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(torch.Size(layout.shape).numel(), generator=generator) * 0.05
    if len(values) > 400:
        values[:200] *= 1000
        values[200:300] = (torch.arange(100.0) + 0.5) * 2 * BOUND
        values[300:350] = torch.arange(50.0) * 1e-41
        values[350:360] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 3e38] * 2)
        half = len(values) // 2
        values[half:] = values[:half][torch.arange(len(values) - half) % 256]
    return values.to(dtype).view(layout.shape)


def small_values(layout: Layout, dtype: torch.dtype, seed: int) -> Tensor:
    """Values on the CPU whose codes are mostly 0 to 3 at a bound of 0.3: worth a codebook."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(layout.shape, generator=generator) * 0.4).to(dtype)


def bits(values: Tensor) -> np.ndarray:
    values = values.detach().cpu().contiguous()
    return values.view(torch.int32 if values.element_size() == 4 else torch.int16).numpy()


def frame_bytes(frames: Frames) -> list[bytes]:
    """Every peer's frame."""
    peers = frames.sizes.numel()
    return [frames.frame(peer).cpu().numpy().tobytes() for peer in range(peers)]


def received(frames: list[bytes], device: torch.device) -> Frames:
    data = torch.frombuffer(bytearray(b"".join(frames)), dtype=torch.uint8).clone()
    sizes = torch.tensor([len(frame) for frame in frames])
    return Frames.received(data.to(device), sizes.to(device))


@contextmanager
def forbidden_to_wait() -> Iterator[None]:
    """Raises where anything waits for the device through torch."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Call:
    """Everything that an encode and a decode need, made before."""

    def __init__(self, layout: Layout, dtype: torch.dtype, mode: Mode, codebooks: bool = False) -> None:
        peers, tables = layout.totals.peers, layout.totals.tables
        self.layout = layout
        self.bounds, self.modes = Bounds.of(BOUND, layout.tables), Modes.of(mode, layout.tables)
        self.frames = Frames.empty(layout, dtype, DEVICE)
        self.codebooks = Codebooks(peers, tables, DEVICE) if codebooks else None
        self.known = ReceivedCodebooks(peers, tables, DEVICE)
        self.out = torch.zeros(layout.shape, dtype=dtype, device=DEVICE)
        self.status = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        given = (layout, dtype, self.bounds, self.modes)
        self.scratch = torch.empty(
            encode_scratch_bytes(*given, codebooks=codebooks, device=DEVICE), dtype=torch.uint8, device=DEVICE
        )
        self.scratch_back = torch.empty(
            decode_scratch_bytes(layout, dtype, device=DEVICE), dtype=torch.uint8, device=DEVICE
        )

    def encode(self, values: Tensor) -> None:
        encode(
            values, self.layout, self.bounds, self.modes, self.frames, self.scratch, codebooks=self.codebooks
        )

    def decode(self) -> None:
        decode(
            self.frames, self.layout, self.out, self.scratch_back, codebooks=self.known, status=self.status
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_and_values_equal_the_reference(name: str, mode: Mode, dtype: torch.dtype) -> None:
    layout = LAYOUTS[name]
    values = values_of(layout, dtype)
    expected = encode(values, layout, BOUND, mode, backend="reference")
    frames = encode(values.to(DEVICE), layout, BOUND, mode)
    assert frame_bytes(frames) == frame_bytes(expected)
    again = decode(frames, layout, dtype=dtype)
    assert np.array_equal(bits(again), bits(decode(expected, layout, dtype=dtype, backend="reference")))


@pytest.mark.parametrize("of", ["range", "rms"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_relative_bounds_are_resolved_alike(of: str, dtype: torch.dtype) -> None:
    for name, layout in LAYOUTS.items():
        values = values_of(layout, dtype, seed=len(name))
        bound = Bound(value=0.01, of=of)  # type: ignore[arg-type]
        expected = encode(values, layout, bound, "packed", backend="reference")
        assert frame_bytes(encode(values.to(DEVICE), layout, bound, "packed")) == frame_bytes(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", [2.0**-126, 1e-6, 0.02, 0.5, 100.0])
def test_every_value_keeps_the_bound(dtype: torch.dtype, bound: float) -> None:
    layout = Layout.columns(rows=[3000, 3000], dims=[64, 33])
    values = values_of(layout, dtype, seed=3)
    again = decode(encode(values.to(DEVICE), layout, bound, "packed"), layout, dtype=dtype).cpu()
    finite = torch.isfinite(values)
    assert np.array_equal(bits(again)[~finite.numpy()], bits(values)[~finite.numpy()])
    error = (again[finite].to(torch.float64) - values[finite].to(torch.float64)).abs()
    assert bool((error <= float(np.float32(bound))).all()), error.max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_codebooks_are_made_sent_once_and_kept(dtype: torch.dtype) -> None:
    layout = Layout.columns(rows=[900, 600], dims=[16, 33])
    values = small_values(layout, dtype, seed=4)
    ours, theirs = Codebooks(2, 2, DEVICE), Codebooks(2, 2)
    known = ReceivedCodebooks(2, 2, DEVICE)
    sizes = []
    for _ in range(3):
        frames = encode(values.to(DEVICE), layout, 0.3, "entropy", codebooks=ours)
        expected = encode(values, layout, 0.3, "entropy", codebooks=theirs, backend="reference")
        assert frame_bytes(frames) == frame_bytes(expected)
        assert torch.equal(ours.histogram.cpu(), theirs.histogram)
        assert torch.equal(ours.sent.cpu(), theirs.sent)
        again = decode(frames, layout, dtype=dtype, codebooks=known)
        error = (again.cpu().float() - values.float()).abs()
        assert bool((error <= float(np.float32(0.3))).all())
        sizes.append(int(frames.sizes.sum()))
        if len(sizes) == 1:
            ours.refresh()
            theirs.refresh()
    assert sizes[0] > sizes[1] > sizes[2]


def damaged(frame: bytes, generator: np.random.Generator) -> bytes:
    """Some bits or bytes changed, mostly behind the headers."""
    data = np.frombuffer(frame, np.uint8).copy()
    tables = int.from_bytes(frame[8:12], "little")
    first = 24 + 24 * tables if generator.random() < 0.8 else 0
    for _ in range(generator.integers(1, 4)):
        near = generator.random() < 0.5
        at = int(first + generator.integers(min(160, len(data) - first) if near else len(data) - first))
        if generator.random() < 0.5:
            data[at] ^= 1 << generator.integers(8)
        else:
            data[at] = generator.choice([0, 1, 0x7F, 0x80, 0xFF])
    return data.tobytes()


@pytest.mark.parametrize("mode", ["raw", "packed", "dedup", "entropy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_damaged_frames_are_judged_like_by_the_reference(mode: Mode, dtype: torch.dtype) -> None:
    """Sixty-four damaged frames at once, as if from as many peers."""
    peers, dims = 64, [16, 3, 33]
    one, all_of_them = (Layout.columns(rows=[60] * count, dims=dims) for count in (1, peers))
    values = small_values(one, dtype, seed=5)
    books = Codebooks(1, 3)
    encode(values, one, 0.3, mode, codebooks=books, backend="reference")
    books.refresh()
    (good,) = frame_bytes(encode(values, one, 0.3, mode, codebooks=books, backend="reference"))
    assert good[24] == {"raw": 0, "packed": 3, "dedup": 4, "entropy": 5}[mode]
    generator = np.random.default_rng(DTYPES.index(dtype))
    for _ in range(2):
        sent = [good, *(damaged(good, generator) for _ in range(peers - 1))]
        outcomes = []
        for device, backend in ((DEVICE, ""), (torch.device("cpu"), "reference")):
            known = ReceivedCodebooks(peers, 3, device)
            status = torch.zeros(1, dtype=torch.int64, device=device)
            frames = received(sent, device)
            out = decode(frames, all_of_them, dtype=dtype, codebooks=known, status=status, backend=backend)
            outcomes.append((bits(out), int(status), known.lengths.cpu(), known.ids.cpu()))
        assert np.array_equal(outcomes[0][0], outcomes[1][0])
        assert outcomes[0][1] >> 8 == outcomes[1][1] >> 8
        assert torch.equal(outcomes[0][2], outcomes[1][2])
        assert torch.equal(outcomes[0][3], outcomes[1][3])


@pytest.mark.parametrize(
    ("offset", "size"), [(-16, 0), (2**62, 0), (2**63 - 16, 0), (0, -(2**63)), (0, 2**62), (16, 0), (1, 0)]
)
def test_wild_offsets_and_sizes_are_refused(offset: int, size: int) -> None:
    layout = LAYOUTS["flat"]
    frames = encode(values_of(layout, torch.float32).to(DEVICE), layout, BOUND, "auto")
    offsets, sizes = frames.offsets.clone(), frames.sizes.clone()
    offsets[1] = offset
    if size:
        sizes[1] = size
    out = torch.zeros(layout.shape, device=DEVICE)
    with pytest.raises(FrameError, match="peer 1"):
        decode(Frames(frames.buffer, sizes, offsets), layout, out)
    first = sum(block.rows * block.dim for block in layout.blocks[0])
    assert bool(torch.isnan(out[first:]).all())
    expected = decode(frames, layout)
    assert np.array_equal(bits(out[:first]), bits(expected[:first]))


@pytest.mark.parametrize("mode", MODES)
def test_a_call_neither_waits_nor_allocates(mode: Mode) -> None:
    layout = LAYOUTS["columns"]
    values = values_of(layout, torch.float32).to(DEVICE)
    call = Call(layout, torch.float32, mode, codebooks=True)
    for _ in range(2):
        call.encode(values)
        call.decode()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with forbidden_to_wait():
        call.encode(values)
        call.decode()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert call.status.item() == 0
    assert bool(((call.out - values).abs()[torch.isfinite(values)] <= BOUND).all())


def test_work_is_queued_on_the_current_stream() -> None:
    layout = LAYOUTS["columns"]
    values = values_of(layout, torch.float32)
    expected = frame_bytes(encode(values, layout, BOUND, "auto", backend="reference"))
    call = Call(layout, torch.float32, "auto")
    given, pinned = torch.zeros(layout.shape, device=DEVICE), values.pin_memory()
    call.encode(given)
    call.decode()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        given.copy_(pinned, non_blocking=True)
        call.encode(given)
        call.decode()
    assert not side.query(), "the call waited for its stream"
    torch.cuda.default_stream().synchronize()
    assert not side.query(), "the work was queued on another stream"
    side.synchronize()
    assert frame_bytes(call.frames) == expected
    again = decode(call.frames, layout)
    assert np.array_equal(bits(call.out), bits(again))


@pytest.mark.parametrize("mode", ["packed", "auto"])
def test_a_captured_graph_gives_what_a_call_gives(mode: Mode) -> None:
    layout = LAYOUTS["columns"]
    call = Call(layout, torch.float32, mode, codebooks=mode == "auto")
    given = values_of(layout, torch.float32).to(DEVICE)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call.encode(given)
        call.decode()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.encode(given)
        call.decode()
    for seed in (7, 8):
        values = values_of(layout, torch.float32, seed)
        given.copy_(values)
        graph.replay()
        expected = encode(values, layout, BOUND, mode, codebooks=None, backend="reference")
        assert frame_bytes(call.frames) == frame_bytes(expected)
        assert call.status.item() == 0
        assert np.array_equal(bits(call.out), bits(decode(expected, layout, backend="reference")))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current() -> None:
    layout = LAYOUTS["flat"]
    values = values_of(layout, torch.float32)
    frames = encode(values.to("cuda:1"), layout, BOUND, "auto")
    assert frames.buffer.device.index == 1
    assert torch.cuda.current_device() == 0
    assert frame_bytes(frames) == frame_bytes(encode(values, layout, BOUND, "auto", backend="reference"))
    assert np.array_equal(bits(decode(frames, layout)), bits(decode(frames, layout, backend="")))
