"""Deduplication on a GPU finds what it finds on the CPU, and deduplicated batches arrive whole."""

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.sharding.dedup import dedup_bags
from tightrec.trainer.data.loader import Loader, LoaderConfig
from tightrec.trainer.data.synthetic import SyntheticConfig, SyntheticSource

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def assert_same(on_gpu: KeyedJaggedTensor, on_cpu: KeyedJaggedTensor) -> None:
    assert torch.equal(on_gpu.values().cpu(), on_cpu.values())
    assert torch.equal(on_gpu.lengths().cpu(), on_cpu.lengths())
    assert torch.equal(on_gpu.inverse_indices()[1].cpu(), on_cpu.inverse_indices()[1])
    assert on_gpu.stride_per_key_per_rank() == on_cpu.stride_per_key_per_rank()


@pytest.mark.parametrize(("longest", "weighted"), [(1, False), (6, False), (6, True)])
def test_the_gpu_finds_the_bags_of_the_cpu(longest: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    # With one id a bag the exact keys are at work, else the hash.
    shortest = 1 if longest == 1 else 0
    lengths = torch.randint(shortest, longest + 1, (5 * 1_000,), generator=generator)
    values = torch.randint(0, 4, (int(lengths.sum()),), generator=generator)
    weights = torch.randint(0, 2, values.shape, generator=generator).float() if weighted else None
    batch = KeyedJaggedTensor(keys=list("abcde"), values=values, lengths=lengths, weights=weights)
    on_gpu, on_cpu = dedup_bags(batch.to(torch.device("cuda"))), dedup_bags(batch)
    assert on_gpu.values().is_cuda and on_gpu.inverse_indices()[1].is_cuda
    assert_same(on_gpu, on_cpu)
    if weighted:
        assert torch.equal(on_gpu.weights().cpu(), on_cpu.weights())


@pytest.mark.parametrize("workers", [0, 1])
def test_deduplicated_batches_are_pinned_and_arrive_whole(workers: int) -> None:
    source = SyntheticSource(SyntheticConfig(train_rows=600, row_group_rows=300, multi_hot=2), "train")
    config = LoaderConfig(batch_size=256, workers=workers)
    host, pinned = (Loader(source, config, 0, 1, pin_memory=pin, dedup=True) for pin in (False, True))
    pairs = zip(host.iterate(host.start(0), 4), pinned.iterate(pinned.start(0), 4), strict=True)
    for expected, batch in pairs:
        assert batch.sparse.values().is_pinned() and batch.sparse.inverse_indices()[1].is_pinned()
        moved = batch.to(torch.device("cuda"), non_blocking=True)
        moved.record_stream(torch.cuda.current_stream())
        assert_same(moved.sparse, expected.sparse)
