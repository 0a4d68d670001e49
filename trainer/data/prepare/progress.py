"""How far the work is: a bar on a terminal, now and then a line elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


class Meter:
    """Progress of one pass over ``total_bytes`` of input. A context manager."""

    def __init__(self, title: str, total_bytes: int, first_bytes: int, console: Console) -> None:
        """Start where an earlier run left off, after ``first_bytes``."""
        self._title = title
        self._total_bytes = max(total_bytes, 1)
        self._console = console
        self._bar: Progress | None = None
        self._rows = 0
        self._first_bytes = first_bytes

    def __enter__(self) -> "Meter":
        self._began = self._told = time.monotonic()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[speed]} rows/s"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self._console,
            )
            self._task = self._bar.add_task(
                self._title, total=self._total_bytes, completed=self._first_bytes, speed="-"
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None and self._rows:
            self._tell(self._total_bytes)

    def update(self, read_bytes: int, rows: int) -> None:
        """Tell that the input is done up to ``read_bytes``, and ``rows`` more rows with it."""
        self._rows += rows
        if self._bar:
            self._bar.update(self._task, completed=read_bytes, speed=f"{self._speed():,.0f}")
        elif time.monotonic() - self._told > LINE_EVERY_S:
            self._tell(read_bytes)

    def _speed(self) -> float:
        return self._rows / max(time.monotonic() - self._began, 1e-9)

    def _tell(self, read_bytes: int) -> None:
        self._told = time.monotonic()
        spent = self._told - self._began
        left = spent * (self._total_bytes - read_bytes) / max(read_bytes - self._first_bytes, 1)
        share = min(read_bytes / self._total_bytes, 1.0)
        rest = f"{left:.0f} s left" if share < 1 else f"took {spent:.0f} s"
        text = f"{self._title}: {share:.0%}, {self._speed():,.0f} rows/s, {rest}"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
