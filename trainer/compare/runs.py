"""The runs of a comparison: read from their folders, refused by name where they cannot be compared."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightrec.trainer.report.figures import DASH
from tightrec.trainer.report.html import flattened
from tightrec.trainer.report.records import RUN_FILE, read_records, read_run

_NOT_COMPARED = (
    *("seed", "name", "run_folder", "resume", "data.prepare", "train.timeout_s"),
    *("ab.", "logging.", "train.checkpoint."),
)
"""Settings that do not change what is trained or sent."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run."""

    folder: Path
    """Where it is."""

    facts: Mapping[str, Any]
    """The contents of ``run.json``."""

    records: Sequence[Mapping[str, Any]]
    """The contents of ``metrics.jsonl``."""

    settings: Mapping[str, str]
    """What could make a difference, by name: the configuration and the number of ranks."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.resolve().name

    @property
    def seed(self) -> int | None:
        """As configured."""
        return self.facts.get("seed")

    def score(self, split: str, name: str) -> float | None:
        """A score by split and name, as ``("test", "ne")``; None where the run has none."""
        return ((self.facts.get("scores") or {}).get(split) or {}).get(name)


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read runs in the order given; a folder of runs, as an A/B job makes, stands for those in it.

    Raises:
        ValueError: a folder is missing, holds no run, is given twice, or its run has not finished.
    """
    found = [run for folder in folders for run in _expanded(folder)]
    seen: set[Path] = set()
    for folder in found:
        if folder.resolve() in seen:
            raise ValueError(f"{folder} is given twice. Give each run once.")
        seen.add(folder.resolve())
    return [_read(folder) for folder in found]


def comparable(config: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a configuration that change what is trained or sent, by dotted name."""
    return {
        name: value
        for name, value in flattened(config)
        if not any(name == left or (left[-1] == "." and name.startswith(left)) for left in _NOT_COMPARED)
    }


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Names of the settings in which two runs differ, in order."""
    return [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]


def _expanded(folder: Path) -> list[Path]:
    if (folder / RUN_FILE).is_file() or not folder.is_dir():
        return [folder]
    inside = [path.parent for path in folder.glob(f"*/{RUN_FILE}")]
    # In the order in which they were run: an A/B job begins with what the others are compared with.
    return sorted(inside, key=lambda path: (str(read_run(path).get("started")), path.name)) or [folder]


def _read(folder: Path) -> Run:
    facts = read_run(folder)
    status = facts.get("status")
    if status != "finished":
        why = f" ({facts['reason']})" if facts.get("reason") else ""
        raise ValueError(
            f"{folder} is not finished but {status}{why}, so its scores are not those of a whole run. "
            f"Continue it with resume={folder}, or leave it out."
        )
    settings = {"ranks": str(facts.get("world") or DASH), **comparable(facts.get("config") or {})}
    return Run(folder=folder, facts=facts, records=read_records(folder), settings=settings)
