"""``metrics.jsonl`` and ``run.json``: what is written while a run lives, and read to report on it.

``metrics.jsonl`` holds one JSON object a line, with ``kind`` and ``step`` (steps done):

- ``train``: loss, ne, rows_per_s, learning_rate_factor, and input_bytes, forward_bytes, backward_bytes a step
  (all ranks together), since the record before;
- ``eval``: split, and the fields of :class:`tightrec.trainer.metrics.Scores`;
- ``split``: the fields of :class:`tightrec.trainer.step_split.TimeSplit` in ms, on rank 0;
- ``codec``, one a direction of the compressed exchange: direction (``forward`` or ``backward``), encode_ms,
  exchange_ms, decode_ms (means of the sampled steps on rank 0), plain_bytes and sent_bytes a step (all ranks
  together; plain is float32 without deduplication), ratio of the two, multiplier (what schedule and feedback
  scale the bounds by), and tables, by name: rows, distinct (bags a step before and after deduplication),
  plain_bytes, sent_bytes, ratio, bound (as in ``range:0.03``), error_over_bound (the largest of the sampled
  steps, null where none was sampled), mode;
- ``probe``: total_dne, budget (null: none is set), multiplier, and tables, by name: dne, bound;
- ``choice``, one a direction: link_gb_s, plain (whether the link is too fast to gain), and tables, by name:
  mode, reason, predicted_ms, measured_ms (null until that mode has run);
- ``warning``: text.

JSON has no NaN and no infinity: both are written as null.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tightrec.formats.run_folder import RUN_FILE

METRICS_FILE = "metrics.jsonl"


class RecordFile:
    """Appends records to ``metrics.jsonl``; each is handed to the system at once, so a crash loses none."""

    def __init__(self, folder: Path) -> None:
        path = folder / METRICS_FILE
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        if torn:
            # The writer before was killed inside a line: keep what follows readable.
            self._file.write("\n")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        self._file.write(json.dumps(finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file, after it has reached the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def write_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Write ``run.json``, atomically."""
    partial = folder / (RUN_FILE + ".partial")
    partial.write_text(json.dumps(finite(run), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(folder / RUN_FILE)


def read_run(folder: Path) -> dict[str, Any]:
    """Read ``run.json``.

    Raises:
        ValueError: ``folder`` holds none, or one that is no JSON object.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist, so {folder} is not the folder of a run. Give a run's folder."
        )
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Give another run's folder.") from None
    if not isinstance(run, dict):
        raise ValueError(f"{path} must hold one JSON object. Give another run's folder.")
    return run


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl`` as one history; a run that has written none yet has no records.

    A resumed run repeats the steps since its checkpoint: a record replaces those of its kind, split and
    direction at its own and later steps. Lines that a kill has torn are left out.
    """
    path = folder / METRICS_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    history: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or "kind" not in record:
            continue
        kept = history.setdefault((record["kind"], record.get("split"), record.get("direction")), [])
        while record["kind"] != "warning" and kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return [record for kept in history.values() for record in kept]


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities as None, mappings and sequences included, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
