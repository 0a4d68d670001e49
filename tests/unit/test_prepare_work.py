"""Journals, limits on bad lines and the order of results: what a continued run stands on."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightrec.trainer.data.prepare.criteo import _side_by_side
from tightrec.trainer.data.prepare.inputs import Piece, Position
from tightrec.trainer.data.prepare.rejects import Faults, Reject, Tally
from tightrec.trainer.data.prepare.work import Stage, Work, written


def faults(count: int) -> Faults:
    found = Faults()
    for line in range(1, count + 1):
        found.add(Reject.of("in", line, "label", "the label is wrong", b"7"))
    return found


def test_a_torn_journal_line_is_cut_off_before_the_next_is_appended(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", {"seed": 1})
    stage.finish({"done": 1})
    with (tmp_path / "stage" / "journal.jsonl").open("a") as journal:
        journal.write('{"do')
    again = Stage(tmp_path / "stage", {"seed": 1})
    assert again.entries == [{"done": 1}]
    again.finish({"done": 2})
    assert Stage(tmp_path / "stage", {"seed": 1}).entries == [{"done": 1}, {"done": 2}]


def test_a_stage_without_its_output_or_with_nothing_finished_starts_anew(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", {"seed": 1})
    (stage.out / "leftover").touch()
    stage = Stage(tmp_path / "stage", {"seed": 2})
    assert list(stage.out.iterdir()) == []
    stage.finish({"done": 1})
    with pytest.raises(ValueError, match="seed: 2 there, 3 here"):
        Stage(tmp_path / "stage", {"seed": 3})
    assert Stage(tmp_path / "stage", {"seed": 3}, redo=True).entries == []
    stage = Stage(tmp_path / "stage", {"seed": 3})
    stage.finish({"done": 1})
    stage.out.rename(tmp_path / "gone")
    assert Stage(tmp_path / "stage", {"seed": 9}).entries == []


def test_a_file_that_fails_half_way_does_not_appear(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), written(tmp_path / "a") as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError
    assert not (tmp_path / "a").exists()


def test_a_kill_between_the_two_renames_of_an_overwrite_loses_nothing(tmp_path: Path) -> None:
    """The old folder waits under another name until the new one is in place."""
    dst = tmp_path / "out"
    with Work(dst, overwrite=False, restart=False) as work:
        stage = work.stage("write", {})
        (stage.out / "new").touch()
        stage.finish({})
    (tmp_path / "out.old").mkdir()
    with Work(dst, overwrite=True, restart=False) as work:
        stage = work.stage("write", {})
        assert stage.entries == [{}]
        work.publish(stage)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_the_share_of_bad_lines_is_judged_from_a_thousand_lines_on_and_at_the_end() -> None:
    tally = Tally("tolerant", 0.01)
    tally.add(999, faults(9))
    tally.add(101, faults(2))
    with pytest.raises(ValueError, match="12 of 1,100 lines are bad"):
        tally.add(0, faults(1))
    small = Tally("tolerant", 0.01)
    small.add(999, faults(10))
    with pytest.raises(ValueError, match="10 of 999 lines are bad"):
        small.close()


def test_what_a_tolerant_run_passed_over_stops_a_strict_one_that_continues_it() -> None:
    entry = Tally("tolerant", 0.5).add(10, faults(2))
    again = Tally("tolerant", 0.5)
    again.restore(entry)
    assert (again.lines, again.bad, len(again.samples)) == (10, {"label": 2}, 2)
    with pytest.raises(ValueError, match="in, line 1: the label is wrong: '7'"):
        Tally("strict", 0.5).restore(entry)


@pytest.mark.parametrize("threads", [2, 3])
def test_results_come_in_order_and_few_pieces_are_read_ahead(threads: int) -> None:
    third_done = threading.Event()
    read: list[int] = []

    def pieces() -> Any:
        for index in range(20):
            read.append(index)
            at = Position(line=index)
            data = np.zeros(1, np.uint8)
            yield Piece(index=index, start=at, end=at, data=data, problem="", read_bytes=0)

    def work(piece: Piece) -> int:
        # The first piece ends after a later one.
        if piece.index == 0:
            assert third_done.wait(30)
        if piece.index == 1:
            third_done.set()
        return piece.index * 10

    taken = 0
    for piece, result in _side_by_side(work, pieces(), threads):
        assert (piece.index, result) == (taken, taken * 10)
        taken += 1
        assert len(read) <= taken + threads
    assert taken == 20


def test_an_error_in_a_piece_comes_after_the_results_before_it() -> None:
    at, data = Position(), np.zeros(1, np.uint8)
    pieces = [Piece(index=index, start=at, end=at, data=data, problem="", read_bytes=0) for index in range(9)]

    def work(piece: Piece) -> int:
        if piece.index >= 3:
            raise ValueError(f"piece {piece.index}")
        return piece.index

    taken: list[int] = []
    with pytest.raises(ValueError, match="piece 3"):
        taken.extend(result for _, result in _side_by_side(work, pieces, 2))
    taken_before = [result for _, result in _side_by_side(work, pieces[:3], 2)]
    assert taken_before == [0, 1, 2]
