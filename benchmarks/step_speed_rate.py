"""Link rates of benchmarks/step_speed.py: words for them, and the one at which exchanges take a share."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tightrec.trainer.ranks import Ranks

THROTTLED = Path(__file__).resolve().parents[1] / "launch" / "throttled.sh"
_WORD = re.compile(r"none|[1-9][0-9]{0,8}[kmg]bit|share(?:([*/])([0-9]+(?:\.[0-9]+)?))?")
_LEAST, _MOST = 1_000, 99_000_000


class Sample(NamedTuple):
    """One measurement of a step at some rate."""

    exchange_ms: float
    """Time in which the exchanges of embeddings and of their gradients hold the step."""

    step_ms: float
    """The whole step."""

    @property
    def share(self) -> float:
        """Of the exchanges in the step."""
        return self.exchange_ms / self.step_ms


def rate_words(text: str) -> list[str]:
    """The words of ``--rates``, by commas: ``share``, ``share*2``, ``share/2``, ``none``, or a rate of tc.

    Raises:
        ValueError: naming the word that is none of these.
    """
    words = [word.strip() for word in text.split(",")]
    for word in words:
        match = _WORD.fullmatch(word)
        if not match or (match[2] and not float(match[2])):
            raise ValueError(
                f"--rates: {word!r} is not a rate. Give share, share*2, share/2, none, or tc's, as 500mbit."
            )
    return words


def resolved(word: str, share_kbit: int | None) -> str:
    """What ``word`` is for tc, where ``share`` stands for ``share_kbit`` kbit/s."""
    if not word.startswith("share"):
        return word
    assert share_kbit is not None, "the share's rate is solved before it is used"
    match = _WORD.fullmatch(word)
    assert match
    factor = float(match[2] or 1)
    return f"{_clamped(share_kbit / factor if match[1] == '/' else share_kbit * factor)}kbit"


def first_guess(step_ms: float, sent_bytes: float, share: float) -> int:
    """kbit/s at which sending ``sent_bytes`` a step and rank takes ``share`` of a step.

    Args:
        step_ms: a step without a limit, as if its exchanges took no time.
    """
    exchange_ms = step_ms * share / (1 - share)
    return _clamped(8 * sent_bytes / exchange_ms)


def next_guess(kbit: int, sample: Sample, share: float) -> int:
    """kbit/s that would have made ``sample``, measured at ``kbit``, show ``share``.

    The time of the exchanges goes with 1 / rate, that of the rest stays; a step of the search is a factor of
    4 at most, for where the model is far off.
    """
    rest_ms = max(sample.step_ms - sample.exchange_ms, 1e-3)
    wanted_ms = rest_ms * share / (1 - share)
    factor = sample.exchange_ms / wanted_ms
    return _clamped(kbit * min(4.0, max(0.25, factor)))


def solve(
    measure: Callable[[int], Sample], kbit: int, share: float, tolerance: float, most: int
) -> tuple[int, list[tuple[int, Sample]]]:
    """The rate (kbit/s) whose measured share comes nearest, and all that was measured.

    Ends at the first share within ``tolerance``, or after ``most`` measurements.
    """
    tried: list[tuple[int, Sample]] = []
    while True:
        sample = measure(kbit)
        tried.append((kbit, sample))
        if abs(sample.share - share) <= tolerance or len(tried) == most:
            break
        kbit = next_guess(kbit, sample, share)
    best = min(tried, key=lambda pair: abs(pair[1].share - share))
    return best[0], tried


def set_rate(rate: str, ranks: "Ranks") -> None:
    """Limit every link to ``rate`` between two steps; a collective."""
    ranks.gather(None)
    if ranks.rank == 0:
        subprocess.run([THROTTLED, "--rate", os.environ["THROTTLED_NAME"], rate], check=True)
    ranks.gather(None)


def _clamped(kbit: float) -> int:
    return min(_MOST, max(_LEAST, round(kbit)))
