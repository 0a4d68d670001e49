"""The public interface: layouts, bounds, modes, frames, buffers, operators."""

import tracemalloc
from dataclasses import astuple

import pytest
import torch
from codec_example import BACKENDS, LAYOUT, TABLES, modes_of, rows

from tightrec.compression.bounds import Bound, Bounds
from tightrec.compression.codebooks import Codebooks, ReceivedCodebooks
from tightrec.compression.codec import (
    MODES,
    Modes,
    decode,
    decode_scratch_bytes,
    encode,
    encode_scratch_bytes,
)
from tightrec.compression.frames import (
    FrameError,
    Frames,
    checksum_matches,
    checksummed,
    frame_bytes_limits,
    max_frame_bytes,
    raise_for_status,
)
from tightrec.compression.layout import Block, Layout
from tightrec.kernels import ops
from tightrec.kernels.format import BLOCK_HEADER_BYTES, FRAME_HEADER_BYTES, Fault
from tightrec.kernels.format import Mode as BlockMode


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_mode_and_type_keeps_the_bound_of_every_table(
    backend: str, mode: str, dtype: torch.dtype
) -> None:
    values = rows(dtype=dtype)
    bounds = {"user": 0.5, "item": Bound(value=0.01, of="range"), "genre": Bound(value=0.05, of="rms")}
    frames = encode(values, LAYOUT, bounds, mode, backend=backend)
    again = decode(frames, LAYOUT, dtype=dtype, backend=backend)
    error = (values.double() - again.double()).abs()
    if mode == "raw":
        assert torch.equal(values, again)
        return
    assert bool((error[:, 0] <= 0.5).all())
    first = 0
    for peer, blocks in enumerate(LAYOUT.blocks):
        used = frames.frame(peer)[FRAME_HEADER_BYTES:].clone()
        for table, block in enumerate(blocks):
            bound = used[BLOCK_HEADER_BYTES * table :][8:12].view(torch.float32).double()
            column = block.offset % LAYOUT.shape[1]
            assert bool((error[first : first + block.rows, column : column + block.dim] <= bound).all())
            if table and block.rows:
                part = values[first : first + block.rows, column : column + block.dim].double()
                whole = part.max() - part.min() if table == 1 else (part**2).mean().sqrt()
                assert float(bound) == pytest.approx(float(whole) * (0.01 if table == 1 else 0.05), rel=1e-6)
        first += blocks[0].rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_forced_modes_are_used_and_auto_takes_the_smallest(backend: str) -> None:
    values = rows()
    sizes = {}
    for mode in MODES:
        frames = encode(values, LAYOUT, 0.02, mode, backend=backend)
        sizes[mode] = int(frames.sizes[2])
        if mode in ("raw", "packed", "dedup"):
            assert modes_of(frames, 2) == [BlockMode[mode.upper()]] * 3
    assert sizes["dedup"] < sizes["packed"] < sizes["half"] < sizes["raw"]
    assert sizes["auto"] <= min(sizes.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_codebook_travels_once_and_a_stale_one_stays_correct(backend: str) -> None:
    sent, received = Codebooks(4, 3), ReceivedCodebooks(4, 3)
    sizes = []
    for step in range(4):
        values = rows() if step < 3 else rows(7) * 30  # the last step's codes are far outside the book
        frames = encode(values, LAYOUT, 0.02, "entropy", codebooks=sent, backend=backend)
        again = decode(frames, LAYOUT, codebooks=received, backend=backend)
        assert bool(((values - again).abs().double() <= float(torch.tensor(0.02))).all())
        sizes.append(frames.sizes.tolist())
        if step == 0:
            assert BlockMode.DEDUP_ENTROPY not in modes_of(frames, 2)
            sent.refresh()
        if step == 1:
            assert BlockMode.DEDUP_ENTROPY in modes_of(frames, 2)
    assert sizes[2][2] < sizes[1][2], "the second frame with a book carried it again"
    assert sizes[2][2] < sizes[0][2], "entropy coding with the sent book gains nothing"


def test_a_frame_without_its_codebook_is_refused_by_name() -> None:
    sent = Codebooks(4, 3)
    encode(rows(), LAYOUT, 0.02, "entropy", codebooks=sent)
    sent.refresh()
    encode(rows(), LAYOUT, 0.02, "entropy", codebooks=sent)
    later = encode(rows(), LAYOUT, 0.02, "entropy", codebooks=sent)
    with pytest.raises(FrameError, match=r"peer 0, table 'item'.*codebook that has not been received"):
        decode(later, LAYOUT)
    sent.forget_receivers()
    decode(encode(rows(), LAYOUT, 0.02, "entropy", codebooks=sent), LAYOUT)


def test_codebooks_survive_a_checkpoint_and_are_sent_again() -> None:
    sent, restored = Codebooks(4, 3), Codebooks(4, 3)
    encode(rows(), LAYOUT, 0.02, "entropy", codebooks=sent)
    sent.refresh()
    first = encode(rows(), LAYOUT, 0.02, "entropy", codebooks=sent)
    restored.load_state_dict(sent.state_dict())
    again = encode(rows(), LAYOUT, 0.02, "entropy", codebooks=restored)
    assert torch.equal(first.frame(2), again.frame(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_buffers_are_used_and_the_same_bytes_come_out(backend: str) -> None:
    values = rows()
    bounds, modes = Bounds.of(0.02, TABLES), Modes.of("auto", TABLES)
    fresh = encode(values, LAYOUT, bounds, modes, backend=backend)
    out = Frames.empty(LAYOUT, values.dtype)
    needed = encode_scratch_bytes(LAYOUT, values.dtype, bounds, modes, backend=backend)
    scratch = torch.full((needed,), 0xA5, dtype=torch.uint8)
    out.buffer.fill_(0xA5)
    given = encode(values, LAYOUT, bounds, modes, out, scratch, backend=backend)
    assert given is out
    for peer in range(4):
        assert torch.equal(given.frame(peer), fresh.frame(peer))
    assert int(given.sizes.sum()) <= max_frame_bytes(LAYOUT, values.dtype)
    assert given.offsets.tolist() == (given.sizes.cumsum(0) - given.sizes).tolist()

    target = torch.full(LAYOUT.shape, 7.0)
    scratch = torch.full((decode_scratch_bytes(LAYOUT, values.dtype, backend=backend),), 0xA5).to(torch.uint8)
    again = decode(given, LAYOUT, target, scratch, backend=backend)
    assert again is target and torch.equal(again, decode(fresh, LAYOUT, backend=backend))


@pytest.mark.parametrize("mode", MODES)
def test_given_buffers_nothing_in_proportion_to_the_values_is_allocated(mode: str) -> None:
    layout = Layout.flat([[4096, 4096]] * 4, [64, 64])
    values = torch.randn(layout.shape, generator=torch.Generator().manual_seed(0))
    bounds, modes = Bounds.of(0.1, layout.tables), Modes.of(mode, layout.tables)
    sender, receiver = Codebooks(4, 2), ReceivedCodebooks(4, 2)
    encode(values, layout, bounds, modes, codebooks=sender)
    sender.refresh()
    needed = encode_scratch_bytes(layout, values.dtype, bounds, modes, codebooks=True)
    scratch = torch.empty(needed, dtype=torch.uint8)
    back = torch.empty(decode_scratch_bytes(layout, values.dtype), dtype=torch.uint8)
    frames, target = Frames.empty(layout, values.dtype), torch.empty(layout.shape)
    status = torch.zeros(1, dtype=torch.int64)

    def both() -> None:
        encode(values, layout, bounds, modes, frames, scratch, codebooks=sender)
        decode(frames, layout, target, back, codebooks=receiver, status=status)

    both()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        tracemalloc.start()
        both()
        python_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    torch_bytes = sum(max(event.self_cpu_memory_usage, 0) for event in seen.key_averages())
    assert torch_bytes == 0 and int(status) == 0
    assert python_peak < values.numel() * 4 / 20, "8 MiB of values were copied"


def test_frames_received_in_another_buffer_decode_the_same() -> None:
    frames = encode(rows(), LAYOUT, 0.02)
    used = int(frames.sizes.sum())
    received = Frames.received(frames.buffer[:used].clone(), frames.sizes.clone())
    assert torch.equal(decode(received, LAYOUT), decode(frames, LAYOUT))


def test_decode_leaves_what_is_outside_all_blocks() -> None:
    layout = Layout((100,), ((Block(offset=10, rows=3, stride=20, dim=5),),))
    values = torch.arange(100.0)
    out = torch.full((100,), -1.0)
    decode(encode(values, layout, 0.25), layout, out)
    inside = torch.zeros(100, dtype=torch.bool)
    for row in range(3):
        inside[10 + 20 * row : 15 + 20 * row] = True
    assert bool((out[~inside] == -1).all())
    assert bool(((out - values)[inside].abs() <= 0.25).all())


def test_a_bad_frame_is_told_when_asked_and_its_blocks_are_nan() -> None:
    frames = encode(rows(), LAYOUT, 0.02, "packed")
    frames.buffer[int(frames.offsets[2]) + FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES + 4] ^= 1  # rows of "item"
    status = torch.zeros(1, dtype=torch.int64)
    again = decode(frames, LAYOUT, status=status)
    assert bool(again[5:75].isnan().all()) and not bool(again[:5].isnan().any())
    with pytest.raises(FrameError, match=r"peer 2, table 'item'.*number of rows") as caught:
        raise_for_status(status, LAYOUT)
    assert (caught.value.fault, caught.value.peer, caught.value.table) == (Fault.ROWS, 2, "item")
    with pytest.raises(FrameError):
        decode(frames, LAYOUT)


def test_every_fault_has_a_sentence() -> None:
    sentences = {str(FrameError(fault, 1, "item")) for fault in Fault if fault != Fault.NONE}
    assert len(sentences) == len(Fault) - 1
    assert all("peer 1" in sentence for sentence in sentences)


def test_frame_limits_hold_for_noise_and_add_up() -> None:
    values = torch.empty(LAYOUT.shape, dtype=torch.int32).random_(-(2**31), 2**31 - 1).view(torch.float32)
    for mode in MODES:
        frames = encode(values, LAYOUT, 2.0**-126, mode)
        limits = frame_bytes_limits(LAYOUT, values.dtype)
        assert all(size <= limit for size, limit in zip(frames.sizes.tolist(), limits, strict=True))
        assert modes_of(frames, 2) == [BlockMode.RAW] * 3
    assert sum(limits) == max_frame_bytes(LAYOUT, values.dtype) == frames.buffer.numel()


def test_checksums_find_a_flipped_bit_and_a_missing_checksum() -> None:
    frame = bytes(encode(rows(), LAYOUT, 0.1).frame(2).tolist())
    stored = checksummed(frame)
    assert checksum_matches(stored) and not checksum_matches(frame)
    for place in (4, 13, 20, 30, len(stored) // 2, len(stored) - 1):
        flipped = bytearray(stored)
        flipped[place] ^= 1
        assert not checksum_matches(bytes(flipped)), place
    assert not checksum_matches(stored[:20])
    received = torch.frombuffer(bytearray(stored), dtype=torch.uint8)
    layout = Layout.flat([[block.rows for block in LAYOUT.blocks[2]]], [1, 33, 64], TABLES)
    decode(Frames.received(received, torch.tensor([len(stored)])), layout)


def operator_arguments(backend: str) -> tuple[tuple, tuple]:
    """Arguments of tightrec::encode and ::decode."""
    values = rows()
    bounds, modes = Bounds.of(0.02, TABLES), Modes.of("dedup", TABLES)
    blocks, totals = LAYOUT.on(values.device), list(astuple(LAYOUT.totals))
    stages = modes.stages(bounds, False).bits
    settings = (*bounds.on(values.device), modes.on(values.device))
    encoding = (values, blocks, totals, stages, *settings, backend)
    buffer, offsets, sizes = torch.ops.tightrec.encode(*encoding)
    shape = list(LAYOUT.shape)
    return encoding, (buffer, offsets, sizes, blocks, totals, shape, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_pass_opcheck(backend: str) -> None:
    encoding, decoding = operator_arguments(backend)
    torch.library.opcheck(torch.ops.tightrec.encode.default, encoding)
    torch.library.opcheck(torch.ops.tightrec.decode.default, decoding)

    frames = Frames.empty(LAYOUT, torch.float32)
    books, received = Codebooks(4, 3), ReceivedCodebooks(4, 3)
    known = (books.lengths, books.ids, books.sent, books.histogram)
    scratch = torch.zeros(10**7, dtype=torch.uint8)
    into = (frames.buffer.zero_(), frames.offsets, frames.sizes, scratch)
    torch.library.opcheck(torch.ops.tightrec.encode_.default, (*encoding[:-1], *known, *into, backend))
    status = torch.zeros(1, dtype=torch.int64)
    out = (received.lengths, received.ids, rows(), status, scratch)
    torch.library.opcheck(torch.ops.tightrec.decode_.default, (*decoding[:5], *out, backend))


def test_operators_tell_their_shapes_without_running() -> None:
    encoding, decoding = operator_arguments("")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        buffer, offsets, sizes = torch.ops.tightrec.encode(*encoding)
        values, status = torch.ops.tightrec.decode(*decoding)
    assert buffer.shape[0] >= max_frame_bytes(LAYOUT, torch.float32) and buffer.dtype == torch.uint8
    assert offsets.shape == sizes.shape == (4,)
    assert values.shape == LAYOUT.shape and status.shape == (1,)


def test_stage_bits_are_read_back_in_order() -> None:
    bounds = Bounds.of([Bound(value=0.1, of="rms"), 0.1, 0.1], TABLES)
    for mode in MODES:
        for codebooks in (False, True):
            stages = Modes.of(mode, TABLES).stages(bounds, codebooks)
            assert ops._stages(stages.bits) == stages


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_tables_and_one_peer_without_any_row(backend: str) -> None:
    layout = Layout.flat([[t % 3 for t in range(1000)], [0] * 1000], [t % 40 + 1 for t in range(1000)])
    values = torch.randn(layout.shape, generator=torch.Generator().manual_seed(3))
    frames = encode(values, layout, Bound(value=0.01, of="range"), backend=backend)
    assert bool(((decode(frames, layout, backend=backend) - values).abs() < 0.1).all())
    assert int(frames.sizes[1]) == 24024 + 8  # headers, padded to 16
