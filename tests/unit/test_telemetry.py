"""What is read from frames' headers, and errors measured against the bounds in them."""

import math
import struct

import numpy as np
import pytest
import torch
from codec_example import LAYOUT, TABLES, rows

from tightrec.compression.bounds import Bound
from tightrec.compression.codebooks import Codebooks
from tightrec.compression.codec import MODES, decode, encode
from tightrec.compression.frames import Frames
from tightrec.compression.layout import Block, Layout
from tightrec.compression.telemetry import FrameTables, frame_tables, worst_error_over_bound
from tightrec.kernels.format import Mode

BOUNDS = {"user": 0.5, "item": Bound(value=0.01, of="range"), "genre": Bound(value=0.05, of="rms")}


def tables_of(frames: Frames, layout: Layout = LAYOUT) -> FrameTables:
    return frame_tables(frames.buffer, frames.offsets, frames.sizes, layout)


def worst(exact: torch.Tensor, again: torch.Tensor, bounds: list[list[float]]) -> list[float]:
    layout = Layout.flat([[2, 1], [0, 2]], [3, 2], ("a", "b"))
    return worst_error_over_bound(exact, again, layout, torch.tensor(bounds)).tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_headers_are_read_as_the_format_says(mode: str, dtype: torch.dtype) -> None:
    values = rows(dtype=dtype)
    books = Codebooks(4, 3)
    encode(values, LAYOUT, BOUNDS, mode, codebooks=books)
    books.refresh()
    for first in (True, False):  # the first brings the codebooks
        frames = encode(values, LAYOUT, BOUNDS, mode, codebooks=books)
        found = tables_of(frames)
        for peer in range(4):
            frame = bytes(frames.frame(peer).numpy())
            at = 24 + 24 * len(TABLES)
            for table in range(len(TABLES)):
                header = struct.unpack_from("<BBHIfIQ", frame, 24 + 24 * table)
                kind, flags, dim, count, bound, _, size = header
                block = (peer, table)
                assert found.mode[block] == kind
                assert found.rows[block] == count
                assert found.values[block] == count * dim
                assert found.bound[block] == bound
                assert found.bytes[block] == size + 24
                assert found.brings_codebook[block] == bool(flags)
                distinct = count
                if kind in (Mode.DEDUP, Mode.DEDUP_ENTROPY):
                    (distinct,) = struct.unpack_from("<I", frame, at + 128 * flags)
                assert found.distinct[block] == distinct
                at += size
            assert found.overhead[peer] == 24 + len(frame) - at
        if mode == "entropy":
            assert found.brings_codebook.any() == first


def test_distinct_rows_are_those_that_decode_differently() -> None:
    values = rows()
    frames = encode(values, LAYOUT, 0.1, "dedup")
    found, again = tables_of(frames), decode(frames, LAYOUT)
    assert found.mode[2].tolist() == [Mode.DEDUP] * 3
    first = 0
    for table, dim in enumerate((1, 33, 64)):
        part = again[5:75, first : first + dim]
        assert found.distinct[2, table] == len(part.unique(dim=0)) < 70
        first += dim
    assert found.mode_names() == ["dedup"] * 3


def test_bytes_of_the_tables_add_up_to_the_frames_and_to_those_of_some_peers() -> None:
    frames = encode(rows(), LAYOUT, 0.1)
    found = tables_of(frames)
    assert found.table_bytes().sum() == pytest.approx(int(frames.sizes.sum()))
    others = np.array([True, True, False, True])
    assert found.table_bytes(others).sum() == pytest.approx(int(frames.sizes.sum() - frames.sizes[2]))
    assert (found.table_bytes() > found.bytes.sum(0)).all()


def test_frames_with_room_between_them_and_anywhere_in_a_buffer_are_read() -> None:
    frames = encode(rows(), LAYOUT, 0.1, "dedup")
    expected = tables_of(frames)
    slot = int(frames.sizes.max()) + 7
    buffer = torch.full((3 + 4 * slot,), 255, dtype=torch.uint8)
    offsets = torch.arange(4) * slot + 3
    for peer in range(4):
        frame = frames.frame(peer)
        buffer[offsets[peer] : offsets[peer] + len(frame)] = frame
    found = frame_tables(buffer, offsets, frames.sizes, LAYOUT)
    for name in ("mode", "rows", "distinct", "bytes", "bound", "overhead"):
        assert (getattr(found, name) == getattr(expected, name)).all()


def test_what_is_no_frame_of_these_tables_is_refused_by_peer() -> None:
    frames = encode(rows(), LAYOUT, 0.1)
    with pytest.raises(ValueError, match="3 offsets"):
        frame_tables(frames.buffer, frames.offsets[:3], frames.sizes, LAYOUT)
    with pytest.raises(ValueError, match="peer 3 is said to be bytes"):
        frame_tables(frames.buffer[: int(frames.sizes.sum()) - 1], frames.offsets, frames.sizes, LAYOUT)
    moved = frames.offsets + torch.tensor([0, 16, 0, 0])
    with pytest.raises(ValueError, match="peer 1 there is no frame"):
        frame_tables(frames.buffer, moved, frames.sizes, LAYOUT)
    with pytest.raises(ValueError, match="peer 0 there is no frame of 2 tables"):
        tables_of(frames, Layout.columns([5, 0, 70, 1], [1, 33]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_codec_stays_within_its_bounds_with_values_that_are_not_finite(
    mode: str, dtype: torch.dtype
) -> None:
    values = rows(dtype=dtype)
    values[7, 3], values[8, 3], values[9, 40] = math.nan, math.inf, -math.inf
    frames = encode(values, LAYOUT, BOUNDS, mode)
    bound = torch.from_numpy(tables_of(frames).bound)
    again = decode(frames, LAYOUT, dtype=dtype)
    share = worst_error_over_bound(values, again, LAYOUT, bound)
    assert share.dtype == torch.float64
    assert bool((share <= 1.0).all())
    if mode == "raw":
        assert share.tolist() == [0.0, 0.0, 0.0]
    if mode == "packed":
        assert bool((share > 0.9).all())
    # The same, table by table, in blocks that do not lie together.
    again[70, 1] += 1.0
    expected = 1.0 / float(bound[2, 1]) if mode != "raw" else math.inf
    assert worst_error_over_bound(values, again, LAYOUT, bound)[1] == pytest.approx(expected, rel=0.1)


def test_the_worst_value_of_any_peer_counts_against_its_own_bound() -> None:
    exact, again = torch.zeros(12), torch.zeros(12)
    again[1], again[6], again[9] = 0.5, -0.25, 0.25  # table a of peer 0, b of peer 0, b of peer 1
    assert worst(exact, again, [[1.0, 0.5], [1.0, 0.125]]) == [0.5, 2.0]
    assert worst(exact, again, [[1.0, 0.125], [1.0, 0.5]]) == [0.5, 2.0]


@pytest.mark.parametrize(
    "blocks",
    [
        [(1, 2, 3, 3), (9, 1, 2, 2)],  # with elements between the blocks
        [(0, 2, 3, 3), (6, 2, 4, 2)],  # between rows
        [(5, 2, 3, 3), (0, 2, 2, 2)],  # in another order
    ],
)
def test_blocks_may_lie_anywhere_in_the_tensor(blocks: list[tuple[int, int, int, int]]) -> None:
    described = [Block(offset=at, rows=n, stride=stride, dim=dim) for at, n, stride, dim in blocks]
    layout = Layout((12,), (tuple(described),), ("a", "b"))
    changed = torch.full((17,), 100.0)
    changed[:5] = 1e9  # before the tensor starts
    again = changed[5:]
    for block, step in zip(described, (1.0, 3.0), strict=True):
        for row in range(block.rows):
            again[block.offset + row * block.stride :][: block.dim] = step * (1 + row)
    found = worst_error_over_bound(torch.zeros(12), again, layout, torch.tensor([[1.0, 1.0]]))
    assert found.tolist() == [2.0, 3.0 * described[1].rows]


def test_a_value_that_is_nan_on_one_side_has_an_infinite_error() -> None:
    exact, again = torch.zeros(12), torch.zeros(12)
    exact[0] = again[0] = math.nan
    exact[6] = again[6] = math.inf
    assert worst(exact, again, [[1.0, 1.0], [1.0, 1.0]]) == [0.0, 0.0]
    again[1], exact[7] = math.nan, math.nan
    assert worst(exact, again, [[1.0, 1.0], [1.0, 1.0]]) == [math.inf, math.inf]


def test_a_lossless_block_may_not_change_a_bit() -> None:
    exact, again = torch.ones(12), torch.ones(12)
    assert worst(exact, again, [[0.0, 0.0], [1.0, 0.0]]) == [0.0, 0.0]
    exact[6], again[6] = 0.0, -0.0
    assert worst(exact, again, [[0.0, 0.0], [1.0, 0.0]]) == [0.0, math.inf]
    assert worst(exact, again, [[0.0, 1.0], [1.0, 0.0]]) == [0.0, 0.0]


def test_tensors_that_do_not_fit_are_refused() -> None:
    values, bound = rows(), torch.ones(4, 3)
    with pytest.raises(ValueError, match="decoded has shape"):
        worst_error_over_bound(values, values[:3], LAYOUT, bound)
    with pytest.raises(ValueError, match="of one type"):
        worst_error_over_bound(values, values.half(), LAYOUT, bound)
    with pytest.raises(ValueError, match="bounds_abs has shape"):
        worst_error_over_bound(values, values, LAYOUT, bound[:2])
