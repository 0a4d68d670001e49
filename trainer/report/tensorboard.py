"""TensorBoard scalars of the records that go to ``metrics.jsonl``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NOT_SCALARS = ("kind", "step", "split", "note", "time_s", "epoch")

_OF_TABLES = ("ratio", "error_over_bound", "dne")
"""What is drawn of each table; the rest of its figures is in ``metrics.jsonl``."""


class Scalars:
    """Writes event files below ``folder``; every record is flushed."""

    def __init__(self, folder: Path) -> None:
        # Imported here because it takes a second that only rank 0 of a run that wants it should pay.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a record's numbers: ``train/loss``, ``valid/auc``, ``codec/forward/ratio`` and so on."""
        group = record["split"] if record["kind"] == "eval" else record["kind"]
        if "direction" in record:
            group = f"{group}/{record['direction']}"
        for name, value in record.items():
            if name not in _NOT_SCALARS:
                self._add(f"{group}/{name}", value, record["step"])
        for table, figures in record.get("tables", {}).items():
            for name in _OF_TABLES:
                self._add(f"{group}_tables/{table}/{name}", figures.get(name), record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()

    def _add(self, name: str, value: Any, step: int) -> None:
        if isinstance(value, int | float):
            self._writer.add_scalar(name, value, step)
