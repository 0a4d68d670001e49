"""What a person sees while a run goes on: one live line in a terminal, plain lines elsewhere."""

import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tightrec.trainer.report.figures import duration, figure, size, times


@dataclass
class Status:
    """What the progress line tells."""

    epoch: int = 0
    """Counted from 0."""

    epochs: int = 0
    """0: not known."""

    step: int = 0
    """Steps done."""

    epoch_end: int = 0
    """The step at which the epoch ends; 0: not known."""

    epoch_steps: int = 0
    """Steps in the epoch."""

    loss: float | None = None
    ne: float | None = None

    auc: float | None = None
    """Of the last evaluation."""

    rows_per_s: float | None = None
    bytes_per_step: float | None = None

    ratios: dict[str, float] = field(default_factory=dict)
    """How many times fewer bytes than plain float32 the last records tell, by direction."""

    def text(self, seconds_per_step: float | None) -> str:
        """The line, with the time left where the end is known."""
        parts = []
        if self.epochs:
            parts.append(f"epoch {self.epoch + 1}/{self.epochs}")
        parts.append(f"step {self.step:,}" + (f"/{self.epoch_end:,}" if self.epoch_end else ""))
        parts.append(f"loss {figure(self.loss)}")
        parts.append(f"NE {figure(self.ne)}")
        if self.auc is not None:
            parts.append(f"AUC {figure(self.auc)}")
        if self.rows_per_s is not None:
            parts.append(f"{self.rows_per_s:,.0f} rows/s")
        if self.bytes_per_step is not None:
            parts.append(f"{size(self.bytes_per_step)}/step")
        parts += [
            f"{direction} {times(ratio)}" for direction, ratio in sorted(self.ratios.items(), reverse=True)
        ]
        if self.epoch_end and seconds_per_step:
            later = self.epoch_steps * (self.epochs - self.epoch - 1)
            parts.append(f"{duration((self.epoch_end - self.step + later) * seconds_per_step)} left")
        return "  ".join(parts)


class ProgressConsole:
    """Prints sentences as they come, and progress in one live line or, without a terminal, now and then.

    Args:
        plain_every_s: seconds between progress lines where there is no terminal.
        console: where to print; None: standard output.
    """

    def __init__(self, plain_every_s: float, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._plain_every_s = plain_every_s
        self._last_line_s = -plain_every_s
        self._live: Live | None = None
        self._step_clock: tuple[int, float] | None = None
        self._seconds_per_step: float | None = None

    def say(self, text: str, style: str = "") -> None:
        """Print ``text`` as it is: no wrapping, no markup."""
        self._console.print(Text(text, style=style), soft_wrap=True)

    def show(self, renderable: Any) -> None:
        """Print something that rich renders."""
        self._console.print(renderable)

    def progress(self, status: Status) -> None:
        """Tell where training stands."""
        self._time_steps(status.step)
        line = status.text(self._seconds_per_step)
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=4, transient=True)
                self._live.start()
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
        elif time.monotonic() - self._last_line_s >= self._plain_every_s:
            self._last_line_s = time.monotonic()
            self.say(line)

    def close(self) -> None:
        """Take the live line away; can be called again."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _time_steps(self, step: int) -> None:
        # Wall clock, evaluations and checkpoints included: the time left has to include them too.
        at = time.monotonic()
        if self._step_clock is None:
            self._step_clock = (step, at)
        elif step > self._step_clock[0]:
            self._seconds_per_step = (at - self._step_clock[1]) / (step - self._step_clock[0])
