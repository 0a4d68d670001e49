"""Which files a ``src`` names, and their text in pieces of whole lines, decompressed on the way."""

import gzip
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from tightrec.trainer.data.prepare.rejects import DAMAGED, Reject

Text = NDArray[np.uint8]

NEWLINE = 10
WINDOW_BYTES = 4 << 20
"""Text read at a time where a data set fits in memory."""

LINE_BYTES = 4 << 10
"""What is kept of a line longer than a piece, so that a file without line ends fits in memory."""

ENDINGS = ("", ".gz", ".xz")
"""How a file may be compressed; told apart by its first bytes, whatever its name."""

_STEP_BYTES = 1 << 18
"""Text searched for line ends at a time."""

_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
_OPENERS = ((b"\x1f\x8b", gzip.open), (b"\xfd7zXZ\x00", lzma.open))


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place between two lines of a sequence of files."""

    file: int = 0
    """Index of the file."""

    offset: int = 0
    """Bytes of (decompressed) text before it in the file."""

    line: int = 0
    """Lines before it in the file."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive whole lines of one file: what is read, journalled and continued as a unit."""

    index: int
    """Its number in the sequence of all files' pieces."""

    start: Position
    """Where it starts."""

    end: Position
    """Where it ends."""

    data: Text
    """The text; the last line has an end too."""

    problem: str
    """Why nothing can be read from the file behind this piece, in words; empty where nothing is wrong."""

    read_bytes: int
    """Bytes of the input files, as they lie on the disk, read up to its end."""

    @property
    def lines(self) -> int:
        """Number of lines."""
        return self.end.line - self.start.line

    def numbered_lines(self) -> Iterator[tuple[int, bytes]]:
        """Number in the file, from 1, and text of each line, without its end (LF or CR LF)."""
        lines = self.data.tobytes().split(b"\n")[:-1]
        yield from ((at, line.removesuffix(b"\r")) for at, line in enumerate(lines, self.start.line + 1))

    @property
    def next(self) -> Position:
        """Where the piece behind this one starts."""
        return Position(file=self.end.file + 1) if self.problem else self.end

    def fault(self, path: Path) -> Reject:
        """The problem with its file, ``path``, as a bad line."""
        kind, line = (DAMAGED, self.end.line + 1) if self.end.offset else ("empty file", 0)
        return Reject(file=str(path), line=line, kind=kind, reason=self.problem, value="")


def resolve(src: str, patterns: Sequence[str]) -> list[Path]:
    """The files that ``src`` names: comma-separated files, globs, and folders searched by ``patterns``.

    Files found by a glob or in a folder are sorted with numbers by value (day_2 before day_10).

    Raises:
        ValueError: a part that names nothing, or a file named twice.
    """
    files: list[Path] = []
    for part in src.split(","):
        path = Path(part.strip()).expanduser()
        if path.is_file():
            files.append(path)
            continue
        if path.is_dir():
            names = [pattern + ending for pattern in patterns for ending in ENDINGS]
            found = {file for name in names for file in path.glob(name)}
            missing = f"the folder {path} holds no file named like {', '.join(patterns)} (plain, .gz or .xz)"
        else:
            root = Path(path.anchor)
            found = set(root.glob(str(path.relative_to(root)))) if re.search(r"[*?\[]", part) else set()
            missing = f"there is no file, folder or match for {str(path)!r}"
        chosen = sorted((file for file in found if file.is_file()), key=_natural)
        if not chosen:
            raise ValueError(f"src: {missing}. Name the input files, their folder, or a glob in quotes.")
        files += chosen
    twice = {str(file) for file in files if files.count(file) > 1}
    if twice:
        raise ValueError(f"src names {', '.join(sorted(twice))} more than once. Name each file once.")
    return files


def find(src: str, *names: str) -> Path:
    """The one file in the folder ``src`` that has one of ``names``, plain, .gz or .xz.

    Raises:
        ValueError: the folder or the file is missing.
    """
    folder = Path(src).expanduser()
    if not folder.is_dir():
        raise ValueError(f"src={src} is not a folder. Name the folder that holds {' or '.join(names)}.")
    for name in names:
        for ending in ENDINGS:
            if (path := folder / (name + ending)).is_file():
                return path
    raise ValueError(f"src={src} holds no {' or '.join(names)} (plain, .gz or .xz). Name its folder.")


def identity(files: Sequence[Path]) -> list[list[str | int]]:
    """Name, size and time of change of each file: what a continued run must find again."""
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def pieces(files: Sequence[Path], piece_bytes: int, done: int, start: Position) -> Iterator[Piece]:
    """Cut ``files`` into pieces of at most ``piece_bytes`` of text, from ``start`` after ``done`` pieces.

    A piece holds as many whole lines as fit, so that where the cuts fall depends on nothing but the files
    and ``piece_bytes``. A compressed file is decompressed from its beginning to reach a place within it.

    Raises:
        ValueError: a file cannot be opened or read.
    """
    before_bytes = sum(file.stat().st_size for file in files[: start.file])
    for at, path in enumerate(files[start.file :], start.file):
        with _opened(path) as (raw, text):
            if text is raw:
                raw.seek(start.offset)
            else:
                _skip(text, start.offset)
            for data, taken, problem in _windows(text, piece_bytes):
                count = _count_lines(data)
                end = Position(file=at, offset=start.offset + taken, line=start.line + count)
                if not end.offset:
                    problem = problem or "the file is empty"
                if count or problem:
                    read = before_bytes + raw.tell()
                    yield Piece(index=done, start=start, end=end, data=data, problem=problem, read_bytes=read)
                    done += 1
                start = end
        before_bytes += path.stat().st_size
        start = Position(file=at + 1)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BufferedReader, BufferedIOBase]]:
    """The file as it lies on the disk, and its text."""
    try:
        with path.open("rb") as raw:
            magic = raw.peek(6)
            opener = next((opener for start, opener in _OPENERS if magic.startswith(start)), None)
            yield raw, cast(BufferedIOBase, opener(raw) if opener else raw)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}). Check the file.") from None


def _windows(text: BufferedIOBase, size: int) -> Iterator[tuple[Text, int, str]]:
    """The whole lines within the next ``size`` bytes, the bytes they took, and what ended the text early."""
    rest, dropped, ended = np.empty(0, np.uint8), 0, False
    while not ended:
        data = np.empty(size + 1, np.uint8)
        data[: len(rest)] = rest
        filled, ended, problem = _fill(text, data[:size], len(rest))
        cut = _last_line_end(data[:filled])
        if ended and not problem and cut < filled:
            # The last line has no end: it is given one.
            data[filled] = NEWLINE
            yield data[: filled + 1], dropped + filled, ""
        elif cut or ended:
            rest = data[cut:filled].copy()
            yield data[:cut], dropped + cut, problem
            dropped = 0
        else:
            # One line longer than a window: its head stands for it, and any parser refuses it.
            rest = data[: min(LINE_BYTES, size // 2)].copy()
            dropped += size - len(rest)


def _fill(text: BufferedIOBase, data: Text, filled: int) -> tuple[int, bool, str]:
    """Read on to fill ``data``; returns how far it is filled, whether the text ended, and its damage."""
    view = memoryview(data)  # type: ignore[arg-type]
    while filled < len(data):
        # readinto1, because readinto loses what it has in hand when it meets the damage.
        try:
            count = text.readinto1(view[filled:])
        except _DAMAGE as error:
            return filled, True, f"the compressed file is damaged or cut short ({error})"
        if not count:
            return filled, True, ""
        filled += count
    return filled, False, ""


def _last_line_end(data: Text) -> int:
    """Place behind the last line end, 0 where there is none."""
    for end in range(len(data), 0, -_STEP_BYTES):
        start = max(end - _STEP_BYTES, 0)
        ends = np.flatnonzero(data[start:end] == NEWLINE)
        if len(ends):
            return start + int(ends[-1]) + 1
    return 0


def _count_lines(data: Text) -> int:
    steps = range(0, len(data), _STEP_BYTES)
    return sum(int(np.count_nonzero(data[step : step + _STEP_BYTES] == NEWLINE)) for step in steps)


def _skip(text: BufferedIOBase, size: int) -> None:
    while size:
        size -= len(text.read(min(size, WINDOW_BYTES)))


def _natural(path: Path) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]
