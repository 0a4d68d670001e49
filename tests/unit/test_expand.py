"""Expansion of distinct rows: columns of any order, repeats of bags, and gradients of equal bags added up."""

import pytest
import torch
from torch import Tensor

from tightrec.sharding.expand import Expansion
from tightrec.sharding.parts import Slot

CPU = torch.device("cpu")


def slot(name: str, dim: int, column: int = 0, feature: str = "") -> Slot:
    return Slot(name=name, feature=feature or name, table="t", dim=dim, column=column, mean=False)


def by_hand(
    slots: list[Slot], names: list[str], blocks: list[Tensor], inverse: dict[str, list[int]]
) -> Tensor:
    """The pooled output, one column block after another."""
    columns = []
    for name in names:
        mine = sorted((s.column, i) for i, s in enumerate(slots) if s.name == name)
        columns += [blocks[i][inverse[slots[i].feature]] for _, i in mine]
    return torch.cat(columns, dim=1)


CASES = {
    "one dim, features in order": ([slot("a", 4), slot("b", 4)], ["a", "b"]),
    "columns of b come from two ranks, in reverse": (
        [slot("b", 4, 4), slot("a", 6), slot("b", 4, 0)],
        ["a", "b"],
    ),
    "a feature in two tables": (
        [slot("a@t", 8, 0, "a"), slot("b", 12), slot("a@u", 4, 0, "a")],
        ["a@t", "a@u", "b"],
    ),
    "one dim, features swapped": ([slot("b", 4), slot("a", 4)], ["b", "a"]),
    "one dim, b has no table": ([slot("a", 4)], ["a"]),
    "one dim, a has no table": ([slot("b", 4)], ["b"]),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_and_gradients_are_those_of_plain_indexing(case: str) -> None:
    slots, names = CASES[case]
    inverse = {"a": [0, 1, 1, 2, 0], "b": [0, 0, 0, 1, 0]}
    # Slots of a feature have the distinct rows of the feature; a third one is no row's.
    rows = [{"a": 3, "b": 2}[s.feature] for s in slots]
    blocks = [torch.randn(count, s.dim, requires_grad=True) for count, s in zip(rows, slots, strict=True)]
    expected = by_hand(slots, names, blocks, inverse)
    expansion = Expansion(slots, names, ["a", "b"])
    flat = torch.cat([block.detach().flatten() for block in blocks])
    index = expansion.index(rows, torch.tensor([inverse["a"], inverse["b"]]), 5, CPU)
    pooled = expansion.expand(flat, index, 5)
    assert torch.equal(pooled, expected)
    upstream = torch.randn_like(pooled)
    (expected * upstream).sum().backward()
    wanted = torch.cat([block.grad.flatten() for block in blocks if block.grad is not None])
    # Whatever the buffer held before, and however the gradient lies in memory.
    found = expansion.collect(upstream.t().contiguous().t(), index, torch.full_like(flat, float("nan")))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_without_inverse_indices_every_bag_is_its_own() -> None:
    slots = [slot("b", 4), slot("a", 8)]
    expansion = Expansion(slots, ["a", "b"], ["a", "b"])
    blocks = [torch.randn(3, 4), torch.randn(3, 8)]
    index = expansion.index([3, 3], None, 3, CPU)
    pooled = expansion.expand(torch.cat([block.flatten() for block in blocks]), index, 3)
    assert torch.equal(pooled, torch.cat([blocks[1], blocks[0]], dim=1))


def test_a_batch_without_rows_gives_a_matrix_without_rows() -> None:
    expansion = Expansion([slot("a", 4), slot("b", 8)], ["a", "b"], ["a", "b"])
    index = expansion.index([0, 0], torch.zeros(2, 0, dtype=torch.int64), 0, CPU)
    assert expansion.expand(torch.zeros(0), index, 0).shape == (0, 12)
    assert expansion.collect(torch.zeros(0, 12), index, torch.zeros(0)).shape == (0,)


def test_the_unit_is_the_largest_run_that_all_slots_share() -> None:
    assert Expansion([slot("a", 12), slot("b", 8)], ["a", "b"], ["a", "b"]).unit == 4
    assert Expansion([slot("a", 16)], ["a"], ["a"]).unit == 16
