"""Slots of the fixed-size exchange: both ends agree on them, they fit steady traffic and follow it down."""

import pytest

from tightrec.kernels.format import FRAME_ALIGNMENT, FRAME_HEADER_BYTES
from tightrec.sharding.slots import FrameSlot


def _after(*sizes: int) -> FrameSlot:
    slot = FrameSlot()
    for size in sizes:
        slot.record(size)
    return slot


def test_sizes_are_told_until_two_frames_have_passed():
    assert _after().capacity is None
    assert _after(160).capacity is None
    assert _after(160, 160).capacity is not None


@pytest.mark.parametrize("sizes", [(32, 32), (160, 4000), (4000, 160), (16, 16), (99_984, 100_000)])
def test_a_slot_holds_the_largest_recent_frame_with_a_little_room(sizes):
    capacity = _after(*sizes).capacity
    assert capacity is not None
    assert capacity % FRAME_ALIGNMENT == 0
    assert capacity >= max(FRAME_HEADER_BYTES, *sizes)
    assert capacity <= max(FRAME_HEADER_BYTES, 1.1 * max(sizes)) + FRAME_ALIGNMENT


def test_steady_traffic_that_varies_by_a_tenth_never_overflows():
    slot = _after(10_000, 10_000)
    for size in [10_960, 10_000, 9_008, 10_992, 10_000, 10_000]:
        assert size <= (slot.capacity or 0)
        slot.record(size)


def test_one_large_frame_does_not_keep_its_slot_large():
    slot = _after(1000, 100_000)
    assert (slot.capacity or 0) >= 100_000
    for _ in range(20):
        slot.record(1008)
    assert (slot.capacity or 0) < 1200
