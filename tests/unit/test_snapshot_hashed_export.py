"""From checkpoints with deep hash embeddings to snapshots: exported, searched, debugged, compiled."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import snapshot_run
import torch
from snapshot_forged import forge_manifest, forge_tensors
from snapshot_run import LOOSE, model_of, represented, save
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.formats.columns import Bags, Columns, offsets_of
from tightrec.models.config import ModelConfig
from tightrec.snapshot import load
from tightrec.snapshot.calibrate import chosen_ranges, input_histograms
from tightrec.snapshot.compiled import compile_to
from tightrec.snapshot.config import ExportConfig
from tightrec.snapshot.debugger import DebugConfig, debug
from tightrec.snapshot.export import export
from tightrec.snapshot.manifest import read_manifest
from tightrec.snapshot.parts import Parts, logits_of, read_parts
from tightrec.snapshot.rows import feature_major
from tightrec.snapshot.sensitivity import EXACT, Bench
from tightrec.snapshot.source import Checkpoint, open_checkpoint

FEATURES = ["user", "item", "genre"]

CONFIGS = {
    "dhe": represented("dhe"),
    "hybrid": dataclasses.replace(
        represented("hybrid", transform="gaussian", activation="mish"), architecture="dcnv2"
    ),
    "select": dataclasses.replace(
        represented("select", select=("item",), decoder=(9, 7), activation="relu"), pooling="mean"
    ),
    "mixed": represented("table", features={"user": "dhe", "genre": "hybrid"}, activation="linear"),
}


class Rows(snapshot_run.Rows):
    """Rows with a multi-hot feature too."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        genre = dataclasses.replace(self.schema.sparse[0], name="genre", cardinality=20, multi_hot=True)
        self.schema = dataclasses.replace(self.schema, sparse=(*self.schema.sparse, genre))

    def read(self, group: int) -> Columns:
        columns = super().read(group)
        drawn = np.random.default_rng([9, self._seed])
        offsets = offsets_of(drawn.integers(0, 4, len(columns)))
        genre = Bags(drawn.integers(0, 20, int(offsets[-1])), offsets)
        return dataclasses.replace(columns, sparse=(*columns.sparse[:-1], genre))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run folder for each of ``CONFIGS``, by name."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot_run, "Rows", Rows)
        for name, config in CONFIGS.items():
            found[name] = tmp_path_factory.mktemp(name) / "run"
            save(found[name], 3, config=config)
    return found


def trained_logits(config: ModelConfig, columns: Columns, seed: int = 3) -> torch.Tensor:
    """What the model that was saved says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot_run, "Rows", Rows)
        model = model_of(seed, config)
    rows = feature_major(columns)
    lengths = rows.offsets.diff().to(torch.int32)
    with torch.inference_mode():
        return model(rows.dense, KeyedJaggedTensor(keys=FEATURES, values=rows.ids, lengths=lengths))


def exported(run: Path, out: Path, **settings: Any) -> tuple[Any, list[str]]:
    lines: list[str] = []
    done = export(
        ExportConfig(**{"checkpoint": run, "out": out, "budget_ne": LOOSE, **settings}), lines.append
    )
    return done, lines


@pytest.mark.parametrize("name", list(CONFIGS))
def test_in_float32_a_snapshot_gives_the_trained_models_logits(
    runs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    config, columns = CONFIGS[name], Rows(7).read(0)
    done, _ = exported(runs[name], tmp_path / "a", precision="fp32")
    wanted = trained_logits(config, columns)
    found = logits_of(load(tmp_path / "a").scorer, columns, 64)
    assert wanted.std() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    size = 4 * sum(parameter.numel() for parameter in _model(config).parameters())
    assert (done.verification.float32_bytes, done.verification.snapshot_bytes) == (size, size)
    assert abs(done.verification.ne_loss) < 1e-6


def _model(config: ModelConfig) -> torch.nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot_run, "Rows", Rows)
        return model_of(3, config)


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("precision", ["int8", "fp16", "bf16"])
def test_low_precision_stays_near_float32(
    runs: dict[str, Path], tmp_path: Path, name: str, precision: str
) -> None:
    done, _ = exported(runs[name], tmp_path / "a", precision=precision)
    # Random models of a few weights; what is wrong by a feature or a layer is far beyond this.
    assert done.verification.worst_change < 0.02
    assert done.verification.snapshot_bytes < 0.6 * done.verification.float32_bytes
    layers = read_manifest(tmp_path / "a").layers
    decoders = [layer for key, layer in layers.items() if key.startswith("dhe.")]
    assert decoders and {layer.kind for layer in decoders} == {precision}
    if precision == "int8":
        # Codes are of one distribution in every row, and what follows is behind a ReLU: all fixed.
        assert all(layer.activation is not None for layer in decoders)
        low, high = decoders[0].activation
        assert low < -0.9 and high > 0.9 and (high <= 1.01 or name == "hybrid")
    found = load(tmp_path / "a").predict([[0.1, 0.2]], {"user": [1], "item": [2], "genre": [[3, 3, 5]]})
    assert 0 < found[0] < 1


def parts_of(run: Path) -> tuple[Parts, Columns]:
    columns = Rows(2).read(0)
    parts = read_parts(open_checkpoint(run), [columns])
    return parts, parts.narrowed(columns)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_mixtures_are_measured_bit_for_bit_as_they_would_be_served(runs: dict[str, Path], name: str) -> None:
    parts, columns = parts_of(runs[name])
    ranges = chosen_ranges(input_histograms(parts.scorer(parts.exact), columns, 64), "mixed")
    bench = Bench(parts, columns, ranges, "greedy", 64)
    types = dict(bench.exact)
    for part in reversed(bench.exact):
        # One part more at each step: what is held from the step before must be replaced.
        types[part] = "int8"
        int8 = {key: ranges[key] for key in ranges if types[f"layer:{key}"] == "int8"}
        scorer = parts.scorer(bench.plan(types, "mixed"), int8)
        assert torch.equal(bench._logits(types), logits_of(scorer, columns, 64)), part
    assert torch.equal(bench._logits(bench.exact), bench._exact_logits)


def test_a_part_of_the_ids_decodes_as_the_whole_feature(runs: dict[str, Path]) -> None:
    columns = Rows(2).read(0).slice(0, 25)
    parts = read_parts(open_checkpoint(runs["mixed"]), [columns])
    assert len(parts.ids["t_user"]) < 25
    assert list(parts.tables) == ["t_item", "t_genre"]
    found = logits_of(parts.scorer(parts.exact), parts.narrowed(columns), 25)
    torch.testing.assert_close(found, trained_logits(CONFIGS["mixed"], columns), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dhe", "mixed"])
def test_a_search_gives_decoders_types_of_their_own(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    done, lines = exported(runs[name], tmp_path / "a", precision="auto", budget_ne=0.3, batch_size=128)
    assert done.verification.passed
    assert done.found.bytes == done.verification.snapshot_bytes < 0.5 * done.found.float32_bytes
    parts = {cost.part for cost in done.found.costs}
    assert {"layer:dhe.user.0", "layer:dhe.genre.1"} <= parts
    assert all(done.plan.layers[key] != EXACT for key in done.plan.layers if key.startswith("dhe."))
    if name == "dhe":
        assert "measuring 0 tables" in lines[0]
        assert done.plan.counts.startswith("tables none; layers ")
    assert (tmp_path / "a" / "sensitivity.svg").is_file()
    assert {
        row["part"] for row in json.loads((tmp_path / "a" / "sensitivity.json").read_text())["costs"]
    } == parts


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_debugger_passes_what_is_whole_and_names_the_decoder_that_is_not(
    runs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    exported(runs[name], tmp_path / "a", precision="int8")
    lines: list[str] = []
    assert debug(DebugConfig(checkpoint=runs[name], snapshot=tmp_path / "a"), lines.append) == 0, lines
    stages = [line.split()[0] for line in lines]
    assert "hashed" in stages
    assert ("tables" in stages) == (name != "dhe")
    feature = {"select": "item"}.get(name, "genre")
    weight = f"layers/dhe.{feature}.1/scale"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[weight][2] *= 3

    forge_tensors(tmp_path / "a", "dense.safetensors", change)
    assert debug(DebugConfig(checkpoint=runs[name], snapshot=tmp_path / "a"), lines.append) == 1
    assert lines[-1].startswith(f"dhe.{feature}.1 is the first stage beyond its limits: it (int8) is stored")
    assert "output 2 of " in lines[-1]


def test_the_debugger_names_a_decoder_whose_range_is_wrong(runs: dict[str, Path], tmp_path: Path) -> None:
    exported(runs["mixed"], tmp_path / "a", precision="int8")
    forge_manifest(
        tmp_path / "a", lambda values: values["layers"]["dhe.user.0"].update(activation=[-0.05, 0.05])
    )
    lines: list[str] = []
    assert debug(DebugConfig(checkpoint=runs["mixed"], snapshot=tmp_path / "a"), lines.append) == 1
    assert lines[-1].startswith("dhe.user.0 is the first stage") and "quantised in [-0.05, 0.05]" in lines[-1]


def test_a_watcher_carries_the_types_of_decoders_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_run, "Rows", Rows)
    plan = tmp_path / "plan.yaml"
    plan.write_text("tables: int4\nlayers: {'*': int8, 'dhe.*.0': fp16, dhe.genre.1: bf16}\n")
    for step in (1, 2):
        save(tmp_path / "run", step, config=CONFIGS["mixed"])
        status, lines = snapshot_run.watch_once(tmp_path / "run", tmp_path / "out", precision=str(plan))
        assert status == 0, lines
    layers = read_manifest(tmp_path / "out" / "step-00000002").precision.layers
    assert {layers[f"dhe.{f}.0"] for f in ("user", "genre")} == {"fp16"}
    assert (layers["dhe.genre.1"], layers["dhe.user.1"]) == ("bf16", "int8")
    assert any("types of step-00000001" in line for line in lines)


def test_decoders_of_another_shape_are_refused_by_name(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs["dhe"], tmp_path / "run")
    monkeypatch.setattr(snapshot_run, "Rows", Rows)
    real = snapshot_run.description
    other = represented("dhe", decoder=(6,))
    monkeypatch.setattr(snapshot_run, "description", lambda _, *rest: real(other, *rest))
    save(tmp_path / "run", 4, config=CONFIGS["dhe"])
    says = r"tensor hashed_arch.decoders.weights.0 of shape \(3, 6, 16\), but holds \(3, 7, 16\)"
    with pytest.raises(ValueError, match=says):
        open_checkpoint(tmp_path / "run")


def test_the_decoders_of_all_features_are_read_once(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real = [], Checkpoint.parameter
    monkeypatch.setattr(Checkpoint, "parameter", lambda self, key: seen.append(key) or real(self, key))
    parts_of(runs["dhe"])
    assert len(seen) == len(set(seen))
    assert "hashed_arch.decoders.weights.1" in seen


@pytest.mark.parametrize(
    ("name", "form", "precision"),
    [
        ("mixed", "torchscript", "int8"),
        ("hybrid", "torchscript", "fp32"),
        ("dhe", "torchscript", "fp16"),
        ("select", "torch.export", "fp16"),
        ("dhe", "torch.export", "fp32"),
    ],
)
def test_one_file_holds_the_hashes_too(
    runs: dict[str, Path], tmp_path: Path, name: str, form: Any, precision: str
) -> None:
    exported(runs[name], tmp_path / "a", precision=precision)
    # It compares the file with the snapshot bit for bit, empty bags and overflow ids included.
    assert compile_to(tmp_path / "a", tmp_path / "model", form).rows == 1094
