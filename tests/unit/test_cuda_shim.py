"""The shim that runs CUDA sources on the CPU: it runs right kernels and finds wrong ones."""

from pathlib import Path

import cuda_shim
import pytest
import torch
from cuda_shim import Recorder, ShimError, ShimExecutor

pytestmark = cuda_shim.requires_compiler
SOURCES = [cuda_shim.SHIM / "selftest.cu"]


def values(count: int) -> torch.Tensor:
    return torch.randint(0, 1000, (count,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("seed", range(3))
def test_scans_over_warps_and_blocks_are_right(seed: int) -> None:
    given, out = values(5 * 256), torch.zeros(5 * 256, dtype=torch.int32)
    ShimExecutor(SOURCES, seed).launch("selftest_scan", 5, 256, [given, out])
    rows = given.view(5, 256)
    assert torch.equal(out.view(5, 256), (rows.cumsum(1) - rows).to(torch.int32))


def test_collectives_of_half_warps_are_apart() -> None:
    given, out = values(256), torch.zeros(256, dtype=torch.int32)
    ShimExecutor(SOURCES).launch("selftest_halves", 1, 256, [given, out])
    odd = (given & 1).view(8, 2, 16) << torch.arange(32).view(1, 2, 16)
    expected = odd.sum(2)[:, :, None].expand(8, 2, 16).reshape(-1)
    assert torch.equal(out.to(torch.int64) & 0xFFFFFFFF, expected)


def test_threads_interleave() -> None:
    totals = set()
    for seed in range(5):
        total, turns = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        ShimExecutor(SOURCES, seed).launch("selftest_race", 4, 64, [total, turns])
        assert turns.item() == 256
        totals.add(int(total))
    assert len(totals) > 1
    assert min(totals) < 256


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("selftest_missing_lane", "collective"),
        ("selftest_outside_mask", "leaves out"),
        ("selftest_missing_thread", "barrier"),
        ("selftest_divergent_warps", "collective"),
        ("selftest_nowhere", "no kernel"),
    ],
)
def test_faults_end_with_a_message(kernel: str, message: str) -> None:
    out = torch.zeros(1, dtype=torch.int32)
    executor = ShimExecutor(SOURCES)
    with pytest.raises(ShimError, match=message):
        executor.launch(kernel, 2, 64, [out])
    given, sums = values(64), torch.zeros(64, dtype=torch.int32)
    executor.launch("selftest_scan", 1, 64, [given, sums])
    assert torch.equal(sums, (given.cumsum(0) - given).to(torch.int32))


def test_recorded_launches_run_under_the_sanitizers(tmp_path: Path) -> None:
    given, out = values(512), torch.zeros(512, dtype=torch.int32)
    recorder = Recorder(SOURCES)
    recorder.launch("selftest_scan", 1, 256, [given, out])
    recorder.launch("selftest_scan", 1, 256, [given[256:], out[256:]])
    recorder.run(tmp_path)
    rows = given.view(2, 256)
    assert torch.equal(out.view(2, 256), (rows.cumsum(1) - rows).to(torch.int32))


@pytest.mark.parametrize(
    ("kernel", "number", "message"),
    [
        ("selftest_past_the_end", 8, "heap-buffer-overflow"),
        ("selftest_past_shared", 0, "heap-buffer-overflow"),
        ("selftest_wide_shift", 40, "shift exponent"),
    ],
)
def test_what_the_sanitizers_find_is_told(kernel: str, number: int, message: str, tmp_path: Path) -> None:
    recorder = Recorder(SOURCES)
    recorder.launch(kernel, 1, 32, [torch.zeros(8, dtype=torch.int32), number])
    with pytest.raises(ShimError, match=message):
        recorder.run(tmp_path)
