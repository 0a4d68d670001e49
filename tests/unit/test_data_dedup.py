"""Deduplicated batches from the loader: the same rows, wherever they are made and wherever they go."""

import pickle
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from numbered import Numbered
from plain_bags import expanded_bags
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.formats.columns import Columns
from tightrec.trainer.control import fingerprint
from tightrec.trainer.data.batch import Batch, padding_batch, to_batch
from tightrec.trainer.data.loader import Loader, LoaderConfig

CONFIG = LoaderConfig(batch_size=8, shuffle_groups=2, seed=5, prefetch=3)


class Repeating(Numbered):
    """Numbered rows of which four at a time hold the same ids."""

    def read(self, group: int) -> Columns:
        columns = super().read(group)
        bags = Numbered([len(columns)]).read(0).take(torch.arange(len(columns)).numpy() // 4).sparse
        return replace(columns, sparse=bags)


def same_rows(batch: Batch, plain: Batch) -> bool:
    return (
        torch.equal(batch.dense, plain.dense)
        and torch.equal(batch.labels, plain.labels)
        and torch.equal(batch.weights, plain.weights)
        and batch.sparse.keys() == plain.sparse.keys()
        and expanded_bags(batch.sparse) == expanded_bags(plain.sparse)
    )


@pytest.fixture
def batch() -> Batch:
    source = Repeating([20])
    return to_batch(source.read(0), source.schema, 24, dedup=True)


def test_a_batch_keeps_distinct_bags_and_the_contract(batch: Batch) -> None:
    assert batch.sparse.stride() == 24
    # Rows 0, 3 and so on hold an empty bag, as the padding does.
    assert batch.sparse.stride_per_key() == [6, 4]
    assert (batch.sparse.values().dtype, batch.sparse.lengths().dtype) == (torch.int64, torch.int32)
    assert batch.sparse.weights_or_none() is None
    assert batch.sparse.inverse_indices()[1].shape == (2, 24)


@pytest.mark.parametrize("workers", [0, 2])
def test_thread_and_workers_make_the_rows_of_the_plain_loader(workers: int) -> None:
    source, config = Repeating([11, 3, 20, 5]), replace(CONFIG, workers=workers)
    plain, loader = Loader(source, config, 0, 1), Loader(source, config, 0, 1, dedup=True)
    start = plain.start(0)
    steps = plain.batches(start) + 2
    pairs: Iterator[tuple[Batch, Batch]] = zip(
        loader.iterate(loader.start(0), steps), plain.iterate(start, steps), strict=True
    )
    stored = 0
    for batch, expected in pairs:
        assert same_rows(batch, expected)
        # Plain and deduplicated batches must not mix: torchrec builds for the first form it sees.
        assert batch.sparse.variable_stride_per_key()
        stored += sum(batch.sparse.stride_per_key())
    assert stored < steps * 2 * 8
    # Positions are exchangeable.
    assert loader.advance(start, [2]) == plain.advance(start, [2])


def test_a_padding_batch_is_one_empty_bag_a_feature() -> None:
    schema = Numbered([1]).schema
    batch = padding_batch(schema, 4, dedup=True)
    assert same_rows(batch, padding_batch(schema, 4))
    assert batch.sparse.stride_per_key() == [1, 1]


def test_it_is_whole_after_pickling_and_copying(batch: Batch) -> None:
    source = Repeating([20])
    plain = to_batch(source.read(0), source.schema, 24)
    for copy in (pickle.loads(pickle.dumps(batch)), batch.to(torch.device("cpu"))):
        assert same_rows(copy, plain)
        assert copy.sparse.stride() == 24
    moved = batch.to(torch.device("meta"), non_blocking=True)
    assert {part.device.type for part in _tensors(moved)} == {"meta"}


def test_inverse_indices_are_pinned_and_recorded(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    recorded: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, _: recorded.append(id(tensor)))
    copy = batch.pin_memory()
    assert {id(part) for part in _tensors(copy)} == {id(part) for part in pinned}
    copy.record_stream(torch.Stream("cpu"))
    assert set(recorded) == {id(part) for part in _tensors(copy)}


def test_a_plain_batch_is_recorded_without_inverse_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, _: recorded.append(id(tensor)))
    plain = padding_batch(Numbered([1]).schema, 4)
    plain.record_stream(torch.Stream("cpu"))
    assert set(recorded) == {id(part) for part in _tensors(plain)}


def test_a_bad_batch_is_identified_by_which_row_uses_which_bag(batch: Batch) -> None:
    sparse = batch.sparse
    keys, inverse = sparse.inverse_indices()
    turned = KeyedJaggedTensor(
        keys=sparse.keys(),
        values=sparse.values(),
        lengths=sparse.lengths(),
        stride_per_key_per_rank=sparse.stride_per_key_per_rank(),
        inverse_indices=(keys, inverse.flip(1)),
    )
    assert fingerprint(batch) == fingerprint(replace(batch))
    assert fingerprint(batch) != fingerprint(replace(batch, sparse=turned))


def _tensors(batch: Batch) -> list[torch.Tensor]:
    sparse = batch.sparse
    parts = [batch.dense, batch.labels, batch.weights, sparse.values(), sparse.lengths()]
    inverse = sparse.inverse_indices_or_none()
    return parts if inverse is None else [*parts, inverse[1]]
