"""What arrives is within the bound of what was sent, in both directions; lossless bounds change no bit."""

from dataclasses import replace

import pytest
from exchange_cases import FEATURES, Case, Worst, against_exact, each, lossy, worst_of
from exchange_errors import Block, all_errors
from ranks import run_ranks

from tightrec.sharding.config import CodecConfig

pytestmark = pytest.mark.multiprocess

WIDE = tuple((names, rows, 256) for names, rows, _ in FEATURES)
MIX = Case(kinds="tcrhkd", steps=2)
ROUNDING = 1.0001
"""Sums of float32 that are within the bound, and their own last bits."""

# Largest error as a share of the block's largest value, by the steps of each format; and the least that shows
# that the format was used at all. Partial sums and two legs double the error.
FORMATS = {"fp16": (1e-3, 1e-5), "bf16": (8e-3, 3e-4), "int8": (1.6e-2, 5e-4), "mx4": (0.5, 0.02)}


def _by_name(blocks: list[Block]) -> dict[str, list[Block]]:
    found: dict[str, list[Block]] = {}
    for block in blocks:
        if not block.own:
            found.setdefault(block.name, []).append(block)
    return found


def _ways(found: list[list[tuple[list[Block], list[Block]]]], case: int) -> list[dict[str, list[Block]]]:
    """Forward and backward blocks of all ranks, by name."""
    return [_by_name([block for rank in found for block in rank[case][way]]) for way in (0, 1)]


def test_errors_stay_within_absolute_bounds_and_shares_of_the_range():
    absolute = lossy("absolute:1e-2", "absolute:3e-2")
    cases = [
        replace(MIX, codec=absolute),
        replace(MIX, kinds="g", shapes=WIDE, codec=absolute, steps=1),
        replace(MIX, kinds="tcrkt", codec=lossy("range:0.03", "range:0.01")),
        replace(MIX, kinds="tcrkt", codec=replace(lossy("range:0.03", "range:0.01"), dedup=False), steps=1),
    ]
    found = run_ranks(4, all_errors, cases, 2, timeout=240)
    for number, bounds in enumerate([(1e-2, 3e-2), (1e-2, 3e-2)]):
        for blocks, bound in zip(_ways(found, number), bounds, strict=True):
            for name, some in blocks.items():
                worst = max(block.error for block in some)
                # Half: a leg of two shares the bound, and of a table with few rows little is sent.
                assert bound / 4 < worst <= bound * ROUNDING, (cases[number].kinds, name)
    for number in (2, 3):
        for blocks, share in zip(_ways(found, number), (0.03, 0.01), strict=True):
            for name, some in blocks.items():
                assert max(b.error / b.range for b in some if b.range) > share / 4, name
                for block in some:
                    assert block.error <= share * block.range * ROUNDING + 1e-7, (number, block)
    spread = [b for rank in found for b in rank[2][1] if b.own]
    assert spread and not any(b.error for b in spread), "what a rank sends to itself is exact"


def test_torchrecs_formats_keep_their_error_on_every_type_of_sharding():
    cases = [replace(MIX, codec=CodecConfig(forward=n, backward=n), steps=1) for n in FORMATS]
    mixed = [CodecConfig(forward="fp16"), CodecConfig(backward="int8", dedup=False, forward="lossy")]
    cases += [replace(MIX, kinds="tr", codec=codec, steps=1) for codec in mixed]
    found = run_ranks(4, all_errors, cases, 2, timeout=240)
    for number, (name, (most, least)) in enumerate(FORMATS.items()):
        for blocks in _ways(found, number):
            # Data-parallel tables, of which there are none among the first five, send nothing.
            for of, some in blocks.items():
                assert least < max(b.error / b.largest for b in some if b.largest) < most, (name, of)
    fp16, int8 = _ways(found, len(FORMATS)), _ways(found, len(FORMATS) + 1)
    assert all(b.error == 0 for some in fp16[1].values() for b in some), "backward=none is exact"
    assert all(max(b.error / b.largest for b in some) < 1.6e-2 for some in int8[1].values())
    assert all(max(b.error for b in some) > 5e-3 for some in int8[0].values())


def test_lossless_bounds_are_bit_identical_to_dedup_alone():
    cases = [
        replace(MIX, codec=lossy("lossless"), batches=(13, 0, 7, 1), turning=True, steps=4, optimizer=o)
        for o in ("sgd", "rowwise")
    ]
    cases += [replace(MIX, kinds="gh", shapes=WIDE, codec=lossy("lossless"))]
    cases += [replace(MIX, kinds=kind, codec=lossy("lossless")) for kind in ("ttc", "rh")]
    found: list[list[Worst]] = run_ranks(4, each, against_exact, cases, 2, timeout=240)
    for case, worst in zip(cases, worst_of(found), strict=True):
        assert worst == dict.fromkeys(worst, 0.0), case.kinds
