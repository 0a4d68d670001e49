"""Input files: what ``src`` names, and text cut into pieces of whole lines that depend on nothing else."""

import gzip
import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tightrec.trainer.data.prepare.inputs import Piece, Position, find, pieces, resolve

PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}

LINES = st.binary(max_size=30).map(lambda line: line.translate(None, delete=b"\n\x1f\xfd"))
"""Any bytes but line ends and those that a compressed file starts with."""


def all_pieces(files: list[Path], size: int, done: int = 0, start: Position | None = None) -> list[Piece]:
    return list(pieces(files, size, done, start or Position()))


def text_of(found: list[Piece]) -> bytes:
    return b"".join(piece.data.tobytes() for piece in found)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(LINES, min_size=1, max_size=40),
    ended=st.booleans(),
    size=st.integers(32, 300),
    ending=st.sampled_from(list(PACKERS)),
)
def test_pieces_hold_every_line_once_and_continue_anywhere(
    tmp_path: Path, lines: list[bytes], ended: bool, size: int, ending: str
) -> None:
    text = b"\n".join(lines) + (b"\n" if ended or not lines[-1] else b"")
    path = tmp_path / f"in{ending}"
    path.write_bytes(PACKERS[ending](text))
    found = all_pieces([path, path], size)
    whole = text if text.endswith(b"\n") else text + b"\n"
    assert text_of(found) == whole * 2
    assert all(len(piece.data) <= size + 1 for piece in found)
    assert [piece.index for piece in found] == list(range(len(found)))
    numbered = [line for piece in found for line in piece.numbered_lines()]
    expected = list(enumerate((line.removesuffix(b"\r") for line in whole[:-1].split(b"\n")), 1))
    assert numbered == expected * 2
    for at, piece in enumerate(found):
        rest = all_pieces([path, path], size, piece.index + 1, piece.next)
        assert [(p.index, p.start, p.end, p.data.tobytes()) for p in rest] == [
            (p.index, p.start, p.end, p.data.tobytes()) for p in found[at + 1 :]
        ]


@pytest.mark.parametrize("ending", [".gz", ".xz"])
def test_a_truncated_file_gives_its_whole_lines_and_the_problem(tmp_path: Path, ending: str) -> None:
    rng = np.random.default_rng(0)
    text = b"".join(b"%d\n" % number for number in rng.integers(0, 1 << 62, 20_000))
    packed = PACKERS[ending](text)
    path, whole = tmp_path / f"in{ending}", tmp_path / "whole"
    path.write_bytes(packed[: len(packed) * 2 // 3])
    whole.write_bytes(b"a\n")
    found = all_pieces([path, whole], 50_000)
    cut = text_of(found[:-1])
    assert text.startswith(cut)
    assert cut.endswith(b"\n")
    assert len(cut) > len(text) // 2
    assert [bool(piece.problem) for piece in found] == [False] * (len(found) - 2) + [True, False]
    assert found[-2].fault(path).line == cut.count(b"\n") + 1
    assert "cut short" in found[-2].problem
    (last,) = all_pieces([path, whole], 50_000, len(found) - 1, found[-2].next)
    assert last.data.tobytes() == b"a\n"


def test_damage_inside_a_gzip_file_is_a_problem_not_a_traceback(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(np.random.default_rng(0).bytes(50_000).replace(b"\n", b"") + b"\n"))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / "in").write_bytes(packed)
    assert all_pieces([tmp_path / "in"], 10_000)[-1].problem


@pytest.mark.parametrize("ending", list(PACKERS))
def test_an_empty_file_is_a_problem_of_the_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"in{ending}"
    path.write_bytes(PACKERS[ending](b""))
    (piece,) = all_pieces([path], 100)
    assert (piece.fault(path).kind, piece.fault(path).line, piece.lines) == ("empty file", 0, 0)


def test_a_line_longer_than_a_piece_is_held_by_its_head_only(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"a\n" + b"x" * 100_000 + b"\nb\n" + b"y" * 5_000)
    found = all_pieces([path], 1_000)
    assert all(len(piece.data) <= 1_001 for piece in found)
    lines = [line for piece in found for line in piece.numbered_lines()]
    assert [number for number, _ in lines] == [1, 2, 3, 4]
    assert [line[:1] for _, line in lines] == [b"a", b"x", b"b", b"y"]
    assert found[-1].end.offset == path.stat().st_size


def test_several_days_are_named_by_files_folders_and_globs_in_the_order_of_days(tmp_path: Path) -> None:
    for name in ("day_10.gz", "day_2", "day_0.xz", "README.txt", "notes.tsv.md"):
        (tmp_path / name).touch()
    patterns = ("day_[0-9]", "day_[0-9][0-9]")
    days = [tmp_path / name for name in ("day_0.xz", "day_2", "day_10.gz")]
    assert resolve(str(tmp_path), patterns) == days
    assert resolve(f"{tmp_path}/day_*", patterns) == days
    assert resolve(f"{days[2]}, {days[0]}", patterns) == [days[2], days[0]]


@pytest.mark.parametrize(
    ("src", "words"),
    [("gone", "no file"), ("*.gone", "no file"), (".", "holds no file"), ("a,a", "more than once")],
)
def test_a_src_that_names_nothing_or_a_file_twice_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, src: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match=words):
        resolve(src, ("*.tsv",))


def test_find_takes_compressed_files_and_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "users.dat.xz").touch()
    assert find(str(tmp_path), "users.dat") == tmp_path / "users.dat.xz"
    with pytest.raises(ValueError, match=r"movies\.dat"):
        find(str(tmp_path), "movies.dat")
    with pytest.raises(ValueError, match="not a folder"):
        find(str(tmp_path / "users.dat.xz"), "users.dat")


def test_a_folder_in_place_of_a_file_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        all_pieces([tmp_path], 100)
