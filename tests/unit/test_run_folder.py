"""Words that trainer and snapshots share about a run's folder: what the trainer writes is what they name."""

import ast
import json
from pathlib import Path

from tightrec import formats
from tightrec.formats.checkpoint_files import flush_folder
from tightrec.formats.run_folder import CHECKPOINTS, FINISHED, RUN_FILE
from tightrec.snapshot import publish
from tightrec.trainer.loop import Outcome
from tightrec.trainer.report.records import write_run

ROOT = Path(str(formats.__file__)).parents[1]


def test_a_job_that_came_to_its_end_is_finished(tmp_path: Path) -> None:
    (status,) = (field.default for field in Outcome.__dataclass_fields__.values() if field.name == "status")
    write_run(tmp_path, {"status": status})
    assert json.loads((tmp_path / RUN_FILE).read_text()) == {"status": FINISHED}


def test_names_of_files_are_defined_once() -> None:
    defined = [
        (node.value, path.relative_to(ROOT).as_posix())
        for folder in ("formats", "trainer", "snapshot")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in (CHECKPOINTS, RUN_FILE)
    ]
    assert sorted(defined) == [(name, "formats/run_folder.py") for name in (CHECKPOINTS, RUN_FILE)]


def test_checkpoints_and_snapshots_flush_folders_alike() -> None:
    assert publish.flush_folder is flush_folder
