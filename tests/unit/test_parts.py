"""Geometry of a step: what is taken from one rank's tensors lands where another rank expects it."""

import numpy as np
import pytest

from tightrec.sharding.parts import Part, Peers, Slot, held_cells, leg_steps, widest

WORLD = 4
# Rows of each rank's batch by feature: of different sizes, some none.
ROWS = [{"a": 3, "b": 1}, {"a": 0, "b": 4}, {"a": 2, "b": 2}, {"a": 5, "b": 0}]


def slot(name: str, dim: int, column: int = 0) -> Slot:
    return Slot(name=name, feature=name, table=f"t_{name}", dim=dim, column=column, mean=False)


A, B, B2 = slot("a", 2), slot("b", 3), slot("b", 1, 3)
SOURCES = {
    "spread": ((A,), (), (B, B2), (slot("a", 4, 2),)),
    "sum": ((A, B),),
    "two_level": ((A, B), ()),
    "two_level, both machines": ((B,), (A, B2)),
}


def peers(rank: int, members: list[int]) -> Peers:
    return Peers(group=None, rank=members.index(rank), size=len(members), ranks=tuple(members))


def part_of(case: str, rank: int) -> Part:
    """Rank's view of four ranks, or of two machines of two."""
    kind, machine = case.split(",")[0], rank // 2
    groups = [peers(rank, list(range(WORLD)))]
    if kind == "two_level":
        groups = [peers(rank, [2 * machine, 2 * machine + 1]), peers(rank, [rank % 2, rank % 2 + 2])]
    source = {"spread": rank, "sum": 0, "two_level": machine}[kind]
    return Part(sharding_type=kind, kind=kind, sources=SOURCES[case], source=source, peers=tuple(groups))


def order(part: Part) -> list[int]:
    """Ranks in the order in which their rows lie in a lookup's output."""
    return [0, 2, 1, 3] if part.kind == "two_level" else [0, 1, 2, 3]


def held_rows(part: Part) -> np.ndarray:
    rows = [[ROWS[rank][one.feature] for one in part.held] for rank in order(part)]
    return np.array(rows, dtype=np.int64).reshape(WORLD, len(part.held))


def block(one: Slot, rank: int) -> np.ndarray:
    """Values of a rank's rows of a slot, found nowhere else."""
    count = ROWS[rank][one.feature]
    kind = 1000 * rank + 100 * "ab".index(one.feature) + 10 * np.arange(count)[:, None]
    return (kind + one.column + np.arange(one.dim)[None]).astype(np.float64)


def lookup(part: Part, factor: float = 1.0) -> np.ndarray:
    """Matrix of the held slots' rows of all ranks; NaN behind a slot's last row."""
    columns = [np.concatenate([block(one, rank) for rank in order(part)]) for one in part.held]
    matrix = np.full((max(map(len, columns), default=0), sum(one.dim for one in part.held)), np.nan)
    at = 0
    for column in columns:
        matrix[: len(column), at : at + column.shape[1]] = column * factor
        at += column.shape[1]
    return matrix.ravel()


def move(source: np.ndarray, taken: np.ndarray, target: np.ndarray, given: np.ndarray) -> None:
    assert np.array_equal(taken[:, 1::2], given[:, 1::2]), "sender and receiver see other shapes"
    for (offset, rows, stride, dim), (to, _, pace, _) in zip(taken.tolist(), given.tolist(), strict=True):
        for row in range(rows):
            start, end = offset + row * stride, to + row * pace
            target[end : end + dim] = source[start : start + dim]


@pytest.mark.parametrize("case", SOURCES)
def test_rows_arrive_at_the_rank_whose_batch_they_belong_to(case: str) -> None:
    parts = [part_of(case, rank) for rank in range(WORLD)]
    legs = [
        leg_steps(p, held_rows(p), [ROWS[rank][one.feature] for one in p.received])
        for rank, p in enumerate(parts)
    ]
    # Rank r's partial sums are 2^r times the values, so that each must be added exactly once.
    summed = parts[0].kind != "spread"
    current = [lookup(part, 2.0**rank if summed else 1.0) for rank, part in enumerate(parts)]
    for number in range(len(legs[0])):
        for rank in range(WORLD):
            assert len(current[rank]) == legs[rank][number].far.elements
        near = [np.full(legs[rank][number].near.elements, np.nan) for rank in range(WORLD)]
        for rank in range(WORLD):
            group = parts[rank].peers[number]
            for place, other in enumerate(group.ranks):
                taken = legs[rank][number].far.cells[place]
                move(current[rank], taken, near[other], legs[other][number].near.cells[group.rank])
        current = [
            landed.reshape(-1, leg[number].total).sum(0)
            if leg[number].combine == "sum" and leg[number].total
            else landed
            for landed, leg in zip(near, legs, strict=True)
        ]
    for rank, part in enumerate(parts):
        times = {"spread": [1.0] * WORLD, "sum": [15.0], "two_level": [3.0, 12.0]}[part.kind]
        rows = [block(one, rank).ravel() * times[m] for m, held in enumerate(part.sources) for one in held]
        expected = np.concatenate([*rows, np.zeros(0)])
        assert np.array_equal(current[rank], expected), (case, rank)


@pytest.mark.parametrize("case", SOURCES)
def test_gradients_go_back_to_the_rows_that_they_belong_to(case: str) -> None:
    parts = [part_of(case, rank) for rank in range(WORLD)]
    legs = [
        leg_steps(p, held_rows(p), [ROWS[rank][one.feature] for one in p.received])
        for rank, p in enumerate(parts)
    ]
    current = [
        np.concatenate([*(block(one, rank).ravel() for one in part.received), np.zeros(0)])
        for rank, part in enumerate(parts)
    ]
    for number in reversed(range(len(legs[0]))):
        far = [np.full(legs[rank][number].far.elements, np.nan) for rank in range(WORLD)]
        for rank in range(WORLD):
            group, leg = parts[rank].peers[number], legs[rank][number]
            for place, other in enumerate(group.ranks):
                # Of a sum everybody gets the same gradient, which lies once at the rank that has it.
                taken = leg.near.cells[0 if leg.combine == "sum" else place]
                move(current[rank], taken, far[other], legs[other][number].far.cells[group.rank])
        current = far
    for rank, part in enumerate(parts):
        assert np.array_equal(current[rank], lookup(part), equal_nan=True), (case, rank)


def test_sources_with_fewer_slots_have_empty_blocks_up_to_the_widest() -> None:
    part = part_of("spread", 1)
    assert widest(part) == 2
    (leg,) = leg_steps(part, held_rows(part), [ROWS[1][one.feature] for one in part.received])
    assert leg.far.cells.shape == leg.near.cells.shape == (WORLD, 2, 4)
    assert not leg.far.cells[:, :, 1].any(), "rank 1 holds nothing"
    assert leg.far.elements == 0


def test_rows_of_data_parallel_tables_lie_where_the_lookup_puts_them() -> None:
    part = Part(sharding_type="data_parallel", kind="local", sources=((A, B),), source=0, peers=())
    cells = held_cells(part, np.array([[3, 1]], dtype=np.int64))
    assert cells.tolist() == [[[0, 3, 5, 2], [2, 1, 5, 3]]]


def test_labels_tell_columns_of_a_feature_apart() -> None:
    assert B.label != B2.label
