"""Criteo's click logs: tab-separated label, 13 integers and 26 categories, in two streaming passes.

The first pass counts the ids of the rows to train on, the second writes the parts. Each cuts the text into
pieces that threads work on side by side, and that are taken in, and journalled, in order.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from os import sched_getaffinity
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from rich.console import Console

from tightrec.formats.schema import SPLITS, Schema, SparseColumn
from tightrec.trainer.data.prepare import inputs
from tightrec.trainer.data.prepare.common import publish, write_part
from tightrec.trainer.data.prepare.criteo_settings import CriteoSettings
from tightrec.trainer.data.prepare.inputs import Piece, Position
from tightrec.trainer.data.prepare.lines import CATEGORIES, INTEGERS, NAMES, Rows, parse
from tightrec.trainer.data.prepare.numbering import BYTES_PER_ID, TRAIN, Hashing, Vocabulary, draw_splits
from tightrec.trainer.data.prepare.progress import Meter
from tightrec.trainer.data.prepare.rejects import Faults, Tally
from tightrec.trainer.data.prepare.vocabulary import (
    ENTRY_BYTES,
    Choice,
    Run,
    RunCounter,
    count_run,
    least_count,
    merged,
    spilled_runs,
)
from tightrec.trainer.data.prepare.work import Stage, Work, written

FOLDER_PATTERNS = ("*.tsv", "train*.txt", "day_[0-9]", "day_[0-9][0-9]")
"""Names of click logs in a folder that may hold other files."""

SPILL_PIECES = 32
"""Pieces after which the counts go to the disk even where they fit in memory, to continue from."""

BASE_BYTES = 384 << 20
"""Memory of Python with its libraries."""

PIECE_FACTOR = 5
"""Memory of a piece in work, in multiples of its text: text, columns, numbers and encoded part."""

T = TypeVar("T")


def prepare(settings: CriteoSettings, console: Console) -> Schema:
    """Prepare the click logs as ``settings`` say.

    Raises:
        ValueError: whatever is wrong with the settings, the input or what an earlier run left.
    """
    files = inputs.resolve(settings.src, FOLDER_PATTERNS)
    with Work(settings.dst, overwrite=settings.overwrite, restart=settings.restart) as work:
        return _Preparation(settings, files, work, console).run()


class _Preparation:
    """One run over ``files``."""

    def __init__(self, settings: CriteoSettings, files: list[Path], work: Work, console: Console) -> None:
        self.settings = settings
        self.files = files
        self.work = work
        self.console = console
        self.memory_bytes = int(settings.memory_gb * (1 << 30))
        self.whole_files = settings.whole_files(files)
        self.counted = [file for file in files if self.whole_files.get(file, TRAIN) == TRAIN]

    def run(self) -> Schema:
        if self.settings.ids == "hash":
            size, seed = self.settings.hash_size, self.settings.seed
            hashings = [Hashing(size, seed, column) for column in range(CATEGORIES)]
            return self.write(hashings, title="writing")
        return self.write(self.choose_vocabulary(), title="2 of 2, writing")

    def choose_vocabulary(self) -> list[Vocabulary]:
        """Count the ids, or take up the counts of an earlier run, and number those frequent enough."""
        counts = self.count()
        ends = [entry["ends"] for entry in counts.entries]
        least, most = self.settings.min_count, self.settings.max_ids
        wanted = {**self.count_settings(), "min_count": least, "max_ids": most, "counts": ends}
        stage = self.work.stage("vocabulary", wanted, redo=True)
        budget_bytes = self.memory_bytes // 2
        for column in range(len(stage.entries), CATEGORIES):
            runs = merged(spilled_runs(counts.out, ends, column), most=budget_bytes // (4 * ENTRY_BYTES))
            choice = Choice(min_count=least, max_ids=most, hold=budget_bytes // BYTES_PER_ID).take(runs)
            with written(stage.out / f"{column}.npy") as file:
                np.save(file, choice.ids)
            stage.finish({"ids": choice.count, "histogram": choice.histogram.tolist()})
        ids = sum(entry["ids"] for entry in stage.entries)
        if ids * BYTES_PER_ID > budget_bytes:
            histogram = np.sum([entry["histogram"] for entry in stage.entries], axis=0)
            enough = least_count(histogram, budget_bytes // BYTES_PER_ID)
            raise ValueError(
                f"the vocabulary of {ids:,} ids does not fit half of memory_gb={self.settings.memory_gb:g}. "
                f"Run again with {f'min_count={enough}' if enough else 'max_ids=...'}, which fits, or with "
                f"memory_gb={ids * BYTES_PER_ID * 2.1 / (1 << 30):.1f}; the counts are kept. Or use ids=hash."
            )
        return [Vocabulary(np.load(stage.out / f"{column}.npy")) for column in range(CATEGORIES)]

    def count(self) -> Stage:
        """The first pass: runs of ids and counts on the disk."""
        stage = self.work.stage("count", self.count_settings())
        counter, tally = RunCounter(CATEGORIES), self.tally()
        pending: list[dict[str, Any]] = []
        for entry in stage.entries:
            for each in entry["tallies"]:
                tally.restore(each)

        def spill(done: int, at: Position, read_bytes: int) -> None:
            ends = counter.spill(stage.out, len(stage.entries))
            entry = {"done": done, "next": asdict(at), "read_bytes": read_bytes}
            stage.finish({**entry, "ends": ends, "tallies": pending.copy()})
            pending.clear()

        budget_bytes = self.memory_bytes // 16
        done, read_bytes = _last(stage)[0], sum(file.stat().st_size for file in self.counted)
        for piece, (runs, faults) in self.walk("1 of 2, counting ids", stage, self.counted, self.count_piece):
            pending.append(tally.add(piece.lines, faults))
            counter.add(runs)
            done = piece.index + 1
            if counter.used_bytes > budget_bytes or len(pending) >= SPILL_PIECES:
                spill(done, piece.next, piece.read_bytes)
        if not stage.entries or _last(stage)[1].file < len(self.counted):
            spill(done, Position(file=len(self.counted)), read_bytes)
        tally.close()
        return stage

    def count_piece(self, piece: Piece) -> tuple[list[Run], Faults]:
        file = self.counted[piece.start.file]
        rows, faults = _parse(piece, file)
        keep = self.splits(rows, file) == TRAIN
        present = [keep & (rows.missing >> np.uint32(column) & 1 == 0) for column in range(CATEGORIES)]
        return [count_run(rows.ids[column, which]) for column, which in enumerate(present)], faults

    def write(self, numberings: Sequence[Vocabulary | Hashing], title: str) -> Schema:
        """The second pass: the parts, and with the last of them the destination."""
        stage = self.work.stage("write", {**self.settings.output(), "files": inputs.identity(self.files)})
        tally = self.tally()
        for entry in stage.entries:
            tally.restore(entry["tally"])

        def write_piece(piece: Piece) -> tuple[dict[str, int], Faults]:
            file = self.files[piece.start.file]
            rows, faults = _parse(piece, file)
            splits = self.splits(rows, file)
            parts = {}
            for code, split in enumerate(SPLITS):
                chosen = np.flatnonzero(splits == code)
                if len(chosen):
                    table = _table(rows, chosen, numberings)
                    write_part(stage.out, split, piece.index, table, self.settings.row_group_rows)
                    parts[split] = len(chosen)
            return parts, faults

        held_bytes = 0
        if self.settings.ids == "vocabulary":
            held_bytes = sum(each.cardinality for each in numberings) * BYTES_PER_ID
        for piece, (parts, faults) in self.walk(title, stage, self.files, write_piece, held_bytes):
            told = tally.add(piece.lines, faults)
            entry = {"done": piece.index + 1, "next": asdict(piece.next), "read_bytes": piece.read_bytes}
            stage.finish({**entry, "rows": parts, "tally": told})
        columns = zip(NAMES[1 + INTEGERS :], numberings, strict=True)
        return publish(
            self.work,
            stage,
            tally,
            self.settings,
            self.console,
            dense=NAMES[1 : 1 + INTEGERS],
            sparse=[SparseColumn(name=name, cardinality=each.cardinality) for name, each in columns],
            rows={split: sum(entry["rows"].get(split, 0) for entry in stage.entries) for split in SPLITS},
            source="Criteo click logs: " + ", ".join(file.name for file in self.files),
            rules=self.settings.rules(),
        )

    def walk(
        self, title: str, stage: Stage, files: list[Path], work: Callable[[Piece], T], held_bytes: int = 0
    ) -> Iterator[tuple[Piece, T]]:
        """The results of ``work`` for the pieces of ``files`` that ``stage`` has not finished, in order."""
        done, start, read_bytes = _last(stage)
        pieces = inputs.pieces(files, self.settings.part_bytes, done, start)
        if done:
            self.console.print(f"{title}: continuing behind {done} finished parts")
        total_bytes = sum(file.stat().st_size for file in files)
        with Meter(title, total_bytes, read_bytes, self.console) as meter:
            for piece, result in _side_by_side(work, pieces, self.threads(held_bytes)):
                yield piece, result
                meter.update(piece.read_bytes, piece.lines)

    def threads(self, held_bytes: int) -> int:
        """Pieces that memory allows to be in work at a time beside ``held_bytes``, at most one a core."""
        free_bytes = self.memory_bytes - BASE_BYTES - max(held_bytes, self.memory_bytes // 8)
        piece_bytes = PIECE_FACTOR * self.settings.part_bytes
        # The text of two more is read ahead.
        fitting = (free_bytes - 2 * self.settings.part_bytes) // piece_bytes
        if fitting < 1:
            raise ValueError(
                f"memory_gb={self.settings.memory_gb:g} is too little for parts of part_bytes="
                f"{self.settings.part_bytes:,} beside {held_bytes / (1 << 20):.0f} MiB of vocabulary. "
                "Give more memory_gb or smaller part_bytes."
            )
        return min(fitting, self.settings.threads or len(sched_getaffinity(0)))

    def splits(self, rows: Rows, file: Path) -> np.ndarray:
        """Code of the split of each row."""
        if self.whole_files:
            return np.full(len(rows.label), self.whole_files[file], np.uint8)
        valid_share, test_share = self.settings.shares()
        return draw_splits(rows.line, self.files.index(file), self.settings.seed, valid_share, test_share)

    def tally(self) -> Tally:
        return Tally(self.settings.errors, self.settings.max_bad_share)

    def count_settings(self) -> dict[str, Any]:
        """What the counts depend on."""
        names = ("seed", "valid_share", "test_share", "valid_files", "test_files", "part_bytes")
        return {
            "files": inputs.identity(self.files),
            **{name: getattr(self.settings, name) for name in names},
        }


def _last(stage: Stage) -> tuple[int, Position, int]:
    """Pieces that ``stage`` has finished, where the next starts, and bytes of input read for them."""
    if not stage.entries:
        return 0, Position(), 0
    entry = stage.entries[-1]
    return entry["done"], Position(**entry["next"]), entry["read_bytes"]


def _parse(piece: Piece, file: Path) -> tuple[Rows, Faults]:
    rows, faults = parse(piece.data, piece.lines, str(file), piece.start.line + 1)
    if piece.problem:
        faults.add(piece.fault(file))
    return rows, faults


def _table(rows: Rows, chosen: np.ndarray, numberings: Sequence[Vocabulary | Hashing]) -> pa.Table:
    columns = [rows.label[chosen], *(dense[chosen] for dense in rows.dense)]
    for column, numbering in enumerate(numberings):
        columns.append(numbering.numbers(rows.ids[column], rows.missing, column, chosen))
    fields = [
        pa.field(name, pa.from_numpy_dtype(c.dtype), False) for name, c in zip(NAMES, columns, strict=True)
    ]
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=pa.schema(fields))


def _side_by_side(
    work: Callable[[Piece], T], pieces: Iterable[Piece], threads: int
) -> Iterator[tuple[Piece, T]]:
    """Apply ``work`` to ``pieces`` on ``threads`` threads, results in order, one piece read ahead."""
    waiting: deque[tuple[Piece, Future[T]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for piece in pieces:
                waiting.append((piece, pool.submit(work, piece)))
                while waiting and (len(waiting) > threads or waiting[0][1].done()):
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            for _, result in waiting:
                result.cancel()
