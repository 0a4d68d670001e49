"""What a run leaves behind for those that read its checkpoints later, without the trainer.

- Every checkpoint says what it is: model, columns, and where held-out rows lie (:func:`description`).
- Synthetic data has no rows on disk, so a run writes some of its held-out ones (:func:`held_out`).
- ``runs/latest`` points at the run that started last (:func:`point_latest`).
- A caller that sets ``TIGHTREC_HANDOVER`` to a file's name learns the folder of the run (:func:`hand_over`);
  ``python -m tightrec.trainer.handover`` then prints it if a snapshot of the run can be made.
"""

import dataclasses
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tightrec.formats.checkpoint_files import latest_complete, read_manifest
from tightrec.formats.columns import Bags, Columns, Source
from tightrec.formats.run_folder import CHECKPOINTS
from tightrec.formats.schema import SCHEMA_FILE, Schema, load_schema
from tightrec.models.config import ModelConfig
from tightrec.trainer.data.prepare.common import write_part

HELD_OUT = "heldout"
"""Folder below a run's folder: rows of synthetic data, in the layout of a prepared folder."""

HELD_OUT_ROWS = 50_000
"""Most rows of each split written there: the first ones of the split."""

HELD_OUT_SPLITS = ("valid", "test")

RUNS = Path("runs")
LATEST = "latest"

HANDOVER_VARIABLE = "TIGHTREC_HANDOVER"
"""Environment variable: the file that a job writes its run folder into; unset or empty: none."""


def description(model: ModelConfig, schema: Schema, data: str | None) -> dict[str, Any]:
    """What a checkpoint says of itself, as JSON values.

    Args:
        data: absolute path of the prepared folder that holds the rows, None where there are no held-out ones.
    """
    return {
        "model": dataclasses.asdict(model),
        "schema": {
            "dense": list(schema.dense),
            "sparse": [dataclasses.asdict(column) for column in schema.sparse],
            "label": schema.label,
        },
        "data": data,
    }


def held_out(sources: Mapping[str, Source], prepared: str | None, folder: Path) -> str | None:
    """Absolute path of a prepared folder with the data's held-out rows; None where it has none.

    Synthetic rows are written into ``folder/heldout``, once for each run folder: complete or not at all, and
    again only where they would be others. Call it on one rank.

    Args:
        sources: the data, by split.
        prepared: the prepared folder that it was read from, None for synthetic data.
        folder: the run's folder.

    Raises:
        OSError: they cannot be written.
    """
    splits = {split: sources[split] for split in HELD_OUT_SPLITS if split in sources}
    if not splits:
        return None
    if prepared is not None:
        return str(Path(prepared).absolute())
    whole = folder / HELD_OUT
    rows = {split: min(HELD_OUT_ROWS, sum(source.row_counts)) for split, source in splits.items()}
    schema = dataclasses.replace(next(iter(splits.values())).schema, rows=rows)
    if not _is_there(whole, schema):
        partial = whole.with_name(HELD_OUT + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for split, source in splits.items():
            _write(source, rows[split], partial, split)
        schema.save(partial)
        shutil.rmtree(whole, ignore_errors=True)
        partial.rename(whole)
    return str(whole.absolute())


def point_latest(folder: Path) -> None:
    """Make ``runs/latest`` a relative link to the run folder ``folder``, which lies somewhere below ``runs``.

    The link is replaced in one step, so it always points at a run. Of a folder elsewhere there is no link:
    a job writes nothing into the working folder beside its own run folder.

    Raises:
        OSError: the link cannot be made.
    """
    runs, target = RUNS.resolve(), folder.resolve()
    if not target.is_relative_to(runs) or target == runs:
        return
    new = runs / f".{LATEST}.{os.getpid()}"
    new.unlink(missing_ok=True)
    new.symlink_to(target.relative_to(runs), target_is_directory=True)
    try:
        new.replace(runs / LATEST)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def hand_over(folder: Path) -> None:
    """Write the absolute path of the run folder ``folder`` into the file that the environment names, if any.

    Call it on one rank, when the job has finished.

    Raises:
        ValueError: it cannot be written.
    """
    file = os.environ.get(HANDOVER_VARIABLE)
    if not file:
        return
    try:
        Path(file).write_text(str(folder.resolve()), encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{HANDOVER_VARIABLE}={file} cannot be written ({error.strerror}). Name a file in a folder that "
            f"is there; the run itself has finished and lies in {folder}."
        ) from None


def take_over() -> Path | None:
    """The folder that a job handed over, and the end of the file; None: no job has finished.

    Raises:
        OSError: the file cannot be read or removed.
    """
    file = Path(os.environ.get(HANDOVER_VARIABLE, ""))
    if not file.is_file():
        return None
    folder = Path(file.read_text(encoding="utf-8"))
    file.unlink()
    return folder


def lacking(folder: Path) -> str | None:
    """What the run folder ``folder`` does not have for a verified snapshot, in words; None: nothing.

    Raises:
        ValueError: the data's schema.json is damaged or gone.
    """
    newest = latest_complete(folder / CHECKPOINTS)
    if newest is None:
        return "complete checkpoint"
    data = read_manifest(newest).extra.get("data")
    if data is None:
        return "held-out rows"
    rows = load_schema(Path(data)).rows
    return next((f"rows of the split {split}" for split in HELD_OUT_SPLITS if not rows.get(split)), None)


def main() -> int:
    """Print the run folder that was handed over if a snapshot of it can be made, else why not on stderr.

    Returns:
        0, without a word where no job has finished, such as a dry run. 1 where it cannot be told.
    """
    try:
        folder = take_over()
        if folder is None:
            return 0
        missing = lacking(folder)
    except (ValueError, OSError) as error:
        print(f"error: no snapshot is exported: {error}", file=sys.stderr)
        return 1
    if missing is None:
        print(folder)
    else:
        print(f"no snapshot is exported: {folder} has no {missing}", file=sys.stderr)
    return 0


def _is_there(folder: Path, schema: Schema) -> bool:
    if not (folder / SCHEMA_FILE).is_file():
        return False
    try:
        return load_schema(folder) == schema
    except ValueError:
        return False


def _write(source: Source, rows: int, folder: Path, split: str) -> None:
    parts, missing = [], rows
    for group in range(len(source.row_counts)):
        if not missing:
            break
        part = source.read(group)
        parts.append(part.slice(0, min(missing, len(part))))
        missing -= len(parts[-1])
    table = _table(Columns.concat(parts), source.schema)
    write_part(folder, split, 0, table, max(source.row_counts))


def _table(columns: Columns, schema: Schema) -> pa.Table:
    """The rows as formats/schema.py wants them in a file."""
    arrays = {schema.label: pa.array(columns.labels)}
    for at, name in enumerate(schema.dense):
        arrays[name] = pa.array(np.ascontiguousarray(columns.dense[:, at]))
    for column, bags in zip(schema.sparse, columns.sparse, strict=True):
        arrays[column.name] = _lists(bags) if column.multi_hot else pa.array(bags.ids)
    return pa.table(arrays)


def _lists(bags: Bags) -> pa.Array:
    assert bags.offsets is not None, "a multi-hot column has bags"
    return pa.ListArray.from_arrays(pa.array(bags.offsets.astype(np.int32)), pa.array(bags.ids))


if __name__ == "__main__":
    sys.exit(main())
