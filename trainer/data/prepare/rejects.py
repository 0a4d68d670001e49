"""Lines that cannot be used: an error that names them, or a count and a sample of them."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tightrec.trainer.data.prepare.work import written

ErrorMode = Literal["strict", "tolerant"]

REJECTS_FILE = "rejects.jsonl"
ENOUGH_LINES = 1_000
"""Lines to be seen before the share of bad ones among them says anything."""

SAMPLES_PER_KIND = 10
"""Bad lines of one kind that one part contributes to the rejects file."""

DAMAGED = "damaged file"
"""The kind of a compressed file that ends too early."""

_SHOWN_CHARACTERS = 120


@dataclass(frozen=True, kw_only=True)
class Reject:
    """One line that cannot be used."""

    file: str
    """Its file."""

    line: int
    """Its number in the file, from 1; 0 for the file as a whole."""

    kind: str
    """What sort of mistake it is."""

    reason: str
    """The mistake in words."""

    value: str
    """The offending field, or the start of the line, with what is not ASCII escaped."""

    @classmethod
    def of(cls, file: str, line: int, kind: str, reason: str, value: bytes) -> "Reject":
        """Make one from the raw bytes of the offending value."""
        text = value[:_SHOWN_CHARACTERS].decode("ascii", "backslashreplace")
        return cls(file=file, line=line, kind=kind, reason=reason, value=text)

    def __str__(self) -> str:
        place = f"{self.file}, line {self.line}" if self.line else self.file
        return f"{place}: {self.reason}" + (f": {self.value!r}" if self.value else "")


class Faults:
    """What is wrong in some consecutive lines: counts by kind, and the first few of each kind."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.samples: list[Reject] = []

    def add(self, reject: Reject) -> None:
        """Count one bad line, in the order of the lines."""
        self.kinds[reject.kind] += 1
        if self.kinds[reject.kind] <= SAMPLES_PER_KIND:
            self.samples.append(reject)


class Tally:
    """The lines seen so far, the bad ones by kind, and a sample of these.

    Raises:
        ValueError: in strict mode from :meth:`add` and :meth:`restore` at the first bad line; in tolerant
            mode from :meth:`add` and :meth:`close` where bad lines exceed their allowed share.
    """

    def __init__(self, errors: ErrorMode, max_bad_share: float) -> None:
        self.errors = errors
        self.max_bad_share = max_bad_share
        self.lines = 0
        self.bad: Counter[str] = Counter()
        self.samples: list[Reject] = []

    def add(self, lines: int, faults: Faults) -> dict[str, Any]:
        """Take in the next ``lines`` lines and what was wrong in them; returns it as a journal entry."""
        samples = [asdict(sample) for sample in faults.samples]
        entry = {"lines": lines, "bad": dict(faults.kinds), "samples": samples}
        self.restore(entry)
        self._check(ENOUGH_LINES)
        return entry

    def restore(self, entry: Mapping[str, Any]) -> None:
        """Take in what :meth:`add` returned, perhaps in an earlier run."""
        samples = [Reject(**sample) for sample in entry["samples"]]
        if samples and self.errors == "strict":
            raise ValueError(
                f"{samples[0]}. Correct it, or give errors=tolerant to count and pass over such lines."
            )
        self.lines += entry["lines"]
        self.bad.update(entry["bad"])
        self.samples += samples

    def close(self) -> None:
        """Check the share of bad lines in all of the input."""
        self._check(1)

    def save(self, folder: Path) -> None:
        """Write the sample to ``rejects.jsonl``, where there is any."""
        if self.samples:
            with written(folder / REJECTS_FILE) as file:
                file.writelines(json.dumps(asdict(each)).encode() + b"\n" for each in self.samples)

    def summary(self) -> str:
        """One sentence on the bad lines."""
        if not self.bad:
            return f"{self.lines:,} lines read, none bad"
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.bad.items()))
        told = f"{self.lines:,} lines read, {self.bad.total():,} bad ({kinds}); samples in {REJECTS_FILE}"
        # One bad line by count, but all rows behind the damage are missing.
        lost = [f"WARNING: the rest of {each} is lost" for each in self.samples if each.kind == DAMAGED]
        return "\n".join([told, *lost])

    def _check(self, enough: int) -> None:
        bad = self.bad.total()
        if self.lines >= enough and bad > self.max_bad_share * self.lines:
            raise ValueError(
                f"{bad:,} of {self.lines:,} lines are bad, more than max_bad_share={self.max_bad_share} "
                f"allows. For example: {self.samples[-1]}. Check that this is the right file, or raise "
                "max_bad_share."
            )
