"""Batches on their way to a GPU: pinned wherever they are made, whole after an asynchronous copy."""

import pytest
import torch

from tightrec.trainer.data.loader import Loader, LoaderConfig
from tightrec.trainer.data.synthetic import SyntheticConfig, SyntheticSource

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("workers", [0, 1])
def test_every_batch_is_pinned_and_arrives_whole(workers: int) -> None:
    source = SyntheticSource(SyntheticConfig(train_rows=1_000, row_group_rows=300, multi_hot=2), "train")
    config = LoaderConfig(batch_size=256, workers=workers)
    host, pinned = (Loader(source, config, 0, 1, pin_memory=pin) for pin in (False, True))
    steps = host.batches(host.start(0)) + 1
    stream = torch.cuda.Stream()
    pairs = zip(host.iterate(host.start(0), steps), pinned.iterate(pinned.start(0), steps), strict=True)
    for expected, batch in pairs:
        parts = (batch.dense, batch.sparse.values(), batch.sparse.lengths(), batch.labels, batch.weights)
        assert all(part.is_pinned() for part in parts)
        with torch.cuda.stream(stream):
            moved = batch.to(torch.device("cuda"), non_blocking=True)
        torch.cuda.current_stream().wait_stream(stream)
        moved.record_stream(torch.cuda.current_stream())
        assert torch.equal(moved.dense.cpu(), expected.dense)
        assert torch.equal(moved.labels.cpu(), expected.labels)
        assert torch.equal(moved.weights.cpu(), expected.weights)
        assert torch.equal(moved.sparse.values().cpu(), expected.sparse.values())
        assert torch.equal(moved.sparse.lengths().cpu(), expected.sparse.lengths())
