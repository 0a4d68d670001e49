"""Checksums of frames in a buffer: docs/FORMAT.md's CRC, and no damaged bit goes unseen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tightrec.compression.frames import checksum_matches, checksummed
from tightrec.sharding.checksums import mismatched, stamp


def _frame(size: int, seed: int) -> torch.Tensor:
    drawn = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    drawn[6] = 0
    drawn[12:16] = 0
    return drawn


def _stamped() -> tuple[torch.Tensor, list[int], list[int]]:
    """Three frames with gaps between them, as slots leave."""
    sizes, offsets = [32, 208, 64], [0, 48, 272]
    buffer = torch.full((400,), 7, dtype=torch.uint8)
    for seed, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        buffer[offset : offset + size] = _frame(size, seed)
    stamp(buffer, offsets, sizes)
    return buffer, offsets, sizes


def test_stamps_are_those_of_stored_frames_and_touch_nothing_else():
    buffer, offsets, sizes = _stamped()
    for seed, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        written = bytes(buffer[offset : offset + size].numpy())
        assert written == checksummed(bytes(_frame(size, seed).numpy()))
        assert checksum_matches(written)
    assert buffer[32:48].eq(7).all()
    assert buffer[336:].eq(7).all()
    assert mismatched(buffer, offsets, sizes) == []


@given(st.integers(0, 208 * 8 - 1))
def test_every_flipped_bit_is_seen_and_blamed_on_its_frame(bit):
    buffer, offsets, sizes = _stamped()
    buffer[offsets[1] + bit // 8] ^= 1 << bit % 8
    assert mismatched(buffer, offsets, sizes) == [1]


@pytest.mark.parametrize(("sizes", "bad"), [([32, 192, 64], [1]), ([32, 208, 16], [2]), ([16, 208, 64], [0])])
def test_cut_frames_are_seen(sizes, bad):
    buffer, offsets, _ = _stamped()
    assert mismatched(buffer, offsets, sizes) == bad


def test_a_frame_without_a_checksum_is_seen_whatever_stands_in_its_field():
    buffer, offsets, sizes = _stamped()
    buffer[offsets[2] : offsets[2] + sizes[2]] = _frame(64, seed=9)
    assert mismatched(buffer, offsets, sizes) == [2]
    buffer[offsets[0] : offsets[0] + sizes[0]] = 0
    assert mismatched(buffer, offsets, sizes) == [0, 2]
