"""What an export says of values that no number type holds, and of scores that are not numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from snapshot_run import save

from tightrec.snapshot.config import ExportConfig
from tightrec.snapshot.export import export
from tightrec.snapshot.source import Checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    save(folder, 3)
    return folder


def planted(monkeypatch: pytest.MonkeyPatch, method: str, change: Callable[[str, torch.Tensor], Any]) -> None:
    """Alter what a checkpoint's ``table`` or ``parameter`` returns, in place."""
    real = getattr(Checkpoint, method)

    def altered(self: Checkpoint, name: str) -> torch.Tensor:
        values = real(self, name)
        change(name, values)
        return values

    monkeypatch.setattr(Checkpoint, method, altered)


def test_a_row_that_a_type_cannot_hold_is_named_with_its_table(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(name: str, rows: torch.Tensor) -> None:
        rows[-1, 0] = 1e6

    planted(monkeypatch, "table", change)
    with pytest.raises(ValueError, match=r"^table t_\w+ \(\d+ rows\): row \d+ "):
        export(ExportConfig(checkpoint=run, out=tmp_path / "out", precision="fp16", budget_ne=0.9), print)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_a_type_cannot_hold_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(name: str, values: torch.Tensor) -> None:
        if name == "over_arch.model.1.weight":
            values[0, 0] = 1e6

    planted(monkeypatch, "parameter", change)
    with pytest.raises(ValueError, match=r"^layer top.1: 1 of 1 outputs have weights beyond 65504"):
        export(ExportConfig(checkpoint=run, out=tmp_path / "out", precision="fp16", budget_ne=0.9), print)
    assert list(tmp_path.iterdir()) == []


def test_scores_that_are_not_numbers_are_refused_and_not_published(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that float32 holds, while products of them are infinite and infinities differ to NaN."""

    def change(name: str, values: torch.Tensor) -> None:
        if name.startswith("over_arch") and name.endswith("weight"):
            values.copy_(torch.where(torch.arange(values.numel()).view_as(values) % 2 == 0, 1e30, -1e30))

    planted(monkeypatch, "parameter", change)
    done = export(ExportConfig(checkpoint=run, out=tmp_path / "out", precision="bf16", budget_ne=0.9), print)
    assert done.verification is not None
    assert not done.verification.passed
    assert "REFUSED" in done.verification.sentence
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_says_what_it_was_made_from(run: Path, tmp_path: Path) -> None:
    import hashlib

    export(ExportConfig(checkpoint=run, out=tmp_path / "out", budget_ne=0.9), print)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    source = run / "checkpoints" / "step-00000003" / "manifest.json"
    assert manifest["source"]["fingerprint"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert manifest["step"] == 3
    assert manifest["verification"]["passed"] is True
    assert manifest["score_histogram"] is not None
    assert manifest["notes"]["versions"]["torch"] == torch.__version__


def test_a_name_that_cannot_be_given_is_refused_before_the_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "link").symlink_to("thesis")
    monkeypatch.setattr("tightrec.snapshot.export.open_checkpoint", None)
    for name, words in (("thesis", "is not a whole snapshot"), ("link", "is a link")):
        with pytest.raises(ValueError, match=words):
            export(ExportConfig(checkpoint=run, out=tmp_path / name, replace=True), print)
