"""Which waiting query is lost first, against a search of all that wait."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tightrec.serving.scheduling import queues
from tightrec.serving.scheduling.queues import Losses, Query, Waiting


def waiting(number: int, latest: float) -> Waiting:
    nothing: Any = None
    return Waiting(Query(number, 1, 0.0, latest), latest, nothing, 0.0, None, latest)


STEPS = st.lists(st.tuples(st.sampled_from(["add", "remove", "move"]), st.integers(0, 9), st.integers(0, 5)))


@given(STEPS)
def test_the_first_loss_is_the_least_of_what_waits(steps: list[tuple[str, int, int]]) -> None:
    losses, there = Losses(), {}
    for word, number, latest in steps:
        if word == "add" and number not in there:
            # The same number may come again once it has gone, even with the same time.
            there[number] = waiting(number, float(latest))
            losses.add(there[number])
        elif word == "remove" and number in there:
            losses.remove(there.pop(number))
        elif word == "move" and number in there:
            losses.remove(there[number])
            losses.add(there[number])
        first = losses.first()
        assert (first is None) == (not there)
        if first is not None:
            assert there[first.query.number] is first
            assert first.latest == min(item.latest for item in there.values())


def test_what_no_longer_waits_is_not_kept_until_its_time() -> None:
    losses = Losses()
    kept = waiting(-1, 0.5)
    losses.add(kept)
    for number in range(10_000):
        item = waiting(number, 3600.0)
        losses.add(item)
        losses.remove(item)
        assert len(losses._heap) <= 2 * 2 + queues._FEW + 1
    assert losses.first() is kept
