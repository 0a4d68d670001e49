"""TensorBoard scalars of the records that go to ``metrics.jsonl``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NOT_SCALARS = ("kind", "step", "split", "note", "time_s", "epoch")


class Scalars:
    """Writes event files below ``folder``; every record is flushed."""

    def __init__(self, folder: Path) -> None:
        # Imported here because it takes a second that only rank 0 of a run that wants it should pay.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, record: Mapping[str, Any]) -> None:
        """Add the numbers of a record: ``train/loss``, ``valid/auc``, ``split/lookup`` and so on."""
        group = record["split"] if record["kind"] == "eval" else record["kind"]
        for name, value in record.items():
            if name not in _NOT_SCALARS and isinstance(value, int | float):
                self._writer.add_scalar(f"{group}/{name}", value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
