"""Dealing an epoch to ranks and workers: every row once, whatever the topologies on the way."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered import Numbered

from tightrec.trainer.data.loader import Loader, LoaderConfig
from tightrec.trainer.data.shards import Order, Position, Segment, Topology, deal, joined, left, skip

TOPOLOGIES = st.builds(
    Topology, world=st.integers(1, 6), workers=st.integers(1, 4), batch_size=st.integers(1, 9)
)
CHUNKS = st.lists(st.integers(0, 25), max_size=12)


def whole(chunks: list[int]) -> list[Segment]:
    return [Segment(i, 0, rows) for i, rows in enumerate(chunks)]


def cells(segments: list[Segment]) -> list[tuple[int, int]]:
    """(chunk, row) of every row, in the order in which it is read."""
    return [(s.chunk, row) for s in segments for row in range(s.start, s.stop)]


def batches_of(segments: list[Segment], topology: Topology, rank: int) -> list[list[tuple[int, int]]]:
    """A rank's batches by the documented rule: its workers' batches in turns."""
    size = topology.batch_size
    streams = []
    for worker in range(topology.workers):
        rows = cells(deal(segments, topology)[rank, worker])
        streams.append([rows[i : i + size] for i in range(0, len(rows), size)])
    count = sum(len(stream) for stream in streams)
    return [streams[k % topology.workers][k // topology.workers] for k in range(count)]


@given(chunks=CHUNKS, topology=TOPOLOGIES)
def test_every_row_is_dealt_once_and_ranks_differ_by_one_row(chunks: list[int], topology: Topology) -> None:
    segments = whole(chunks)
    dealt = deal(segments, topology)
    assert sorted(cell for own in dealt.values() for cell in cells(own)) == cells(segments)
    rows = [
        sum(s.rows for (r, _), own in dealt.items() for s in own if r == rank)
        for rank in range(topology.world)
    ]
    assert max(rows) - min(rows) <= 1
    assert rows == [topology.rank_rows(sum(chunks), rank) for rank in range(topology.world)]
    cuts = sum(len(own) for own in dealt.values()) - sum(1 for rows in chunks if rows)
    assert cuts <= len(dealt)


@given(chunks=CHUNKS, topology=TOPOLOGIES)
def test_only_the_last_batch_of_a_rank_is_short(chunks: list[int], topology: Topology) -> None:
    for rank in range(topology.world):
        batches = batches_of(whole(chunks), topology, rank)
        assert len(batches) == topology.rank_batches(sum(chunks), rank)
        assert all(len(batch) == topology.batch_size for batch in batches[:-1])
        assert all(batches)


def test_equal_chunks_go_round_and_are_not_cut() -> None:
    topology = Topology(world=2, workers=2, batch_size=5)
    dealt = deal(whole([10] * 8), topology)
    assert {stream: [s.chunk for s in own] for stream, own in dealt.items()} == {
        (0, 0): [0, 4],
        (1, 0): [1, 5],
        (0, 1): [2, 6],
        (1, 1): [3, 7],
    }
    assert all(s == Segment(s.chunk, 0, 10) for own in dealt.values() for s in own)


@settings(max_examples=200)
@given(chunks=CHUNKS, topologies=st.lists(TOPOLOGIES, min_size=1, max_size=4), data=st.data())
def test_a_chain_of_resumes_on_any_topologies_sees_every_row_exactly_once(
    chunks: list[int], topologies: list[Topology], data: st.DataObject
) -> None:
    segments = whole(chunks)
    seen: list[tuple[int, int]] = []
    for topology in topologies:
        consumed = []
        for rank in range(topology.world):
            batches = batches_of(segments, topology, rank)
            consumed.append(data.draw(st.integers(0, len(batches))))
            seen += [cell for batch in batches[: consumed[rank]] for cell in batch]
        segments = joined(s for own in left(segments, topology, consumed).values() for s in own)
    seen += cells(segments)
    assert sorted(seen) == cells(whole(chunks))


@given(chunks=CHUNKS, rows=st.integers(0, 300))
def test_skip_leaves_what_comes_after(chunks: list[int], rows: int) -> None:
    assert cells(skip(whole(chunks), rows)) == cells(whole(chunks))[rows:]


def test_joined_merges_what_touches_and_nothing_else() -> None:
    parts = [Segment(1, 5, 9), Segment(0, 4, 6), Segment(1, 0, 5), Segment(0, 0, 3)]
    assert joined(parts) == [Segment(0, 0, 3), Segment(0, 4, 6), Segment(1, 0, 9)]


def order(**changes: object) -> Order:
    values = {"seed": 3, "shuffle": True, "shuffle_groups": 2, "data": "abc"}
    return Order(**(values | changes))  # type: ignore[arg-type]


def test_chunks_hold_every_group_once_in_an_order_of_seed_and_epoch() -> None:
    counts = [10] * 21
    first = order().chunks(counts, 0)
    assert sorted(group for chunk in first for group in chunk) == list(range(21))
    assert [len(chunk) for chunk in first] == [2] * 10 + [1]
    assert first == order().chunks(counts, 0)
    assert first != order().chunks(counts, 1)
    assert first != order(seed=4).chunks(counts, 0)
    assert order(shuffle=False).chunks([1] * 3, 5) == [[0, 1], [2]]


def test_rows_of_a_chunk_are_permuted_by_seed_epoch_and_chunk() -> None:
    def rows(order: Order, epoch: int, chunk: int) -> list[int]:
        return order.rows(50, epoch, Segment(chunk, 0, 50)).tolist()

    base = rows(order(), 0, 0)
    assert sorted(base) == list(range(50))
    assert base != list(range(50))
    others = [rows(order(), 1, 0), rows(order(), 0, 1), rows(order(seed=4), 0, 0)]
    assert all(other != base for other in others)
    assert base[10:20] == order().rows(50, 0, Segment(0, 10, 20)).tolist()
    assert rows(order(shuffle=False), 0, 0) == list(range(50))


def loader(**changes: int | bool) -> Loader:
    config = LoaderConfig(**({"batch_size": 2, "shuffle_groups": 2, "seed": 1} | changes))  # type: ignore[arg-type]
    return Loader(Numbered([5, 5, 3]), config, 0, 2)


def test_a_position_survives_json() -> None:
    position = loader().advance(loader().start(2), [1, 2])
    for one in (position, loader(batch_size=3).advance(position, [0, 1])):
        assert Position.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert one.segments is not None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "no default"),
        ({"epoch": -1}, "damaged"),
        ({"consumed": [1]}, "damaged"),
        ({"consumed": [1, -1]}, "damaged"),
        ({"surprise": 1}, "no setting 'surprise'"),
    ],
)
def test_a_damaged_position_is_refused(values: dict[str, object], words: str) -> None:
    whole = loader().start(0).to_dict() if values else {}
    with pytest.raises(ValueError, match=words):
        Position.from_dict(whole | values)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 2}, "data.loader.seed=1, but it is 2 here"),
        ({"shuffle": False}, "data.loader.shuffle=True, but it is False here"),
        ({"shuffle_groups": 3}, "data.loader.shuffle_groups=2, but it is 3 here"),
    ],
)
def test_a_position_in_another_order_is_refused_by_the_settings_name(
    changes: dict[str, int], words: str
) -> None:
    position = loader().start(0)
    for use in (loader(**changes).batches, loader(**changes).iterate):
        with pytest.raises(ValueError, match=words):
            use(position)


def test_a_position_in_other_data_is_refused() -> None:
    other = Loader(Numbered([5, 5, 4]), LoaderConfig(batch_size=2, shuffle_groups=2, seed=1), 0, 2)
    with pytest.raises(ValueError, match="other data"):
        other.advance(loader().start(0), [1, 1])
