"""Snapshots as torch.export and TorchScript files: every type in every form, bit for bit the same scores."""

import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from snapshot_forged import forge_tensors
from snapshot_made import config_of, layer_shapes, make_snapshot
from torch import Tensor
from torch.fx.experimental import _config as shape_settings

from tightrec.snapshot import compiled
from tightrec.snapshot.compiled import CompileConfig, compile_snapshot, compile_to
from tightrec.snapshot.compiled_layers import exported_layer, scripted_layer
from tightrec.snapshot.layers import make_layer, store_layer
from tightrec.snapshot.loader import load
from tightrec.snapshot.precision import LAYER_TYPES, TABLE_TYPES, Plan

CPU = torch.device("cpu")
FORMS = ("torch.export", "torchscript")
ENDINGS = {"torch.export": "pt2", "torchscript": "pt"}
# Every type of a layer; int8 once with ranges by row and once with a fixed one.
LAYERS = [(kind, None) for kind in LAYER_TYPES] + [("int8", (-1.5, 2.0))]


def mixed(architecture: str, ranges: str, dense: int = 3) -> Plan:
    """All table types on five features; layer types in turn, int8 among the first and the last."""
    names = layer_shapes(config_of(8, architecture, "sum"), dense, len(TABLE_TYPES))
    kinds = ("int8", "fp16", "bf16", "fp32")
    return Plan(
        tables={f"t_f{place}": kind for place, kind in enumerate(TABLE_TYPES)},
        layers={name: kinds[place % 4] for place, name in enumerate(names)},
        ranges=ranges,
    )


def written_and_read(layer: torch.nn.Module, form: str, example: Tensor) -> Any:
    """A layer that went through the bytes of a file of ``form``."""
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if form == "torchscript":
            torch.jit.save(torch.jit.trace(layer, (example,), check_trace=False), file)
            file.seek(0)
            return torch.jit.load(file)
        with shape_settings.patch(backed_size_oblivious=True):
            rows = torch.export.Dim("rows", min=0)
            program = torch.export.export(layer, (example,), dynamic_shapes=({0: rows},), strict=False)
        torch.export.save(program, file)
        file.seek(0)
        return torch.export.load(file).module()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "activation"), LAYERS)
@pytest.mark.parametrize(("outputs", "inputs", "bias", "relu"), [(33, 70, True, True), (1, 5, False, False)])
def test_every_type_of_layer_in_every_form_is_the_operator_bit_for_bit(
    form: str, kind: str, activation: Any, outputs: int, inputs: int, bias: bool, relu: bool
) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, inputs, generator=generator)
    stored = store_layer(weight, weight[:, 0] if bias else None, kind, activation)
    layer = (exported_layer if form == "torch.export" else scripted_layer)(stored, relu)
    again = written_and_read(layer, form, torch.randn(3, inputs, generator=generator))
    served = make_layer(stored, relu=relu, device=CPU)
    for rows in (3, 0, 1, 2, 100):
        x = torch.randn(rows, inputs, generator=generator)
        # Called again and again, for TorchScript changes its executor after the first calls.
        for _ in range(3):
            assert torch.equal(again(x), served(x)), rows
    x[0], x[1], x[2] = 0, 1e6, -1e6
    assert torch.equal(again(x), served(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["dlrm", "dcnv2", "no_dense"])
def test_a_snapshot_of_all_types_gives_its_scores_in_a_process_without_this_package(
    tmp_path: Path, form: Any, case: str
) -> None:
    architecture, dense = ("dcnv2" if case == "dcnv2" else "dlrm"), (0 if case == "no_dense" else 3)
    folder = make_snapshot(
        tmp_path / "snapshot",
        dense=dense,
        cardinalities=(5, 7, 11, 3, 1),
        architecture=architecture,
        pooling="mean" if case == "dcnv2" else "sum",
        plan=mixed(architecture, "min_max" if case == "dlrm" else "dynamic", dense),
    )
    out = tmp_path / f"model.{ENDINGS[form]}"
    done = compile_to(folder, out, form)
    assert (done.path, done.size_bytes, done.rows) == (out, out.stat().st_size, 1094)
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, "snapshot"]
    load(folder)


def test_a_link_that_moves_on_while_files_are_read_is_one_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (make_snapshot(tmp_path / name, seed=seed) for seed, name in enumerate(("old", "new")))
    link, real = tmp_path / "current", compiled.load

    def moving(folder: Path) -> Any:
        snapshot = real(folder)
        link.unlink()
        link.symlink_to(new)
        return snapshot

    link.symlink_to(old)
    monkeypatch.setattr(compiled, "load", moving)
    compile_to(link, tmp_path / "model.pt", "torchscript")
    assert link.resolve() == new


def test_a_file_that_scores_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_snapshot(tmp_path / "snapshot")
    other = make_snapshot(tmp_path / "other")

    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors["layers/top.1/bias"][0] = tensors["layers/top.1/bias"][0] * (1 + 2**-20)

    forge_tensors(other, "dense.safetensors", nudge)
    real = compiled._model
    monkeypatch.setattr(compiled, "_model", lambda _, eager, form: real(other, load(other), form))
    with pytest.raises(ValueError, match=r"torchscript file .* in another process \(.* rows, call 0: logits"):
        compile_to(folder, tmp_path / "model.pt", "torchscript")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "snapshot"]


def test_the_other_process_must_not_need_this_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_snapshot(tmp_path / "snapshot")
    needing = compiled._FRESH.replace(
        "import torch, fbgemm_gpu", "import torch, fbgemm_gpu, tightrec.snapshot"
    )
    monkeypatch.setattr(compiled, "_FRESH", needing)
    with pytest.raises(ValueError, match="it imports tightrec"):
        compile_to(folder, tmp_path / "model.pt", "torchscript")


def test_batches_hold_empty_bags_and_overflow_rows(tmp_path: Path) -> None:
    snapshot = load(make_snapshot(tmp_path / "snapshot"))
    batches = compiled.random_batches(snapshot)
    assert sorted(len(dense) for dense, _, _ in batches)[:2] == [0, 1]
    assert any((offsets.diff() == 0).any() for _, _, offsets in batches)
    dense, ids, offsets = batches[-1]
    first = ids[: int(offsets[len(dense)])]
    assert int(first.max()) == snapshot.manifest.tables[0].rows


@pytest.mark.parametrize(
    ("out", "form", "told"),
    [
        ("snapshot/model.pt", "torchscript", "is inside the snapshot"),
        ("taken.pt", "torchscript", "is there already. Give another file name."),
        ("nowhere/model.pt", "torchscript", "does not exist. Make it first."),
        ("model.pt", "onnx", "form='onnx' is not known. Give one of torch.export, torchscript."),
    ],
)
def test_mistakes_are_told(tmp_path: Path, out: str, form: Any, told: str) -> None:
    folder = make_snapshot(tmp_path / "snapshot")
    (tmp_path / "taken.pt").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=told.replace(".", r"\.")):
        compile_to(folder, tmp_path / out, form)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("form", ["torch.export", "torchscript"])
def test_a_relative_name_is_compared_in_the_other_process_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    make_snapshot(tmp_path / "snapshot")
    monkeypatch.chdir(tmp_path)
    assert compile_to("snapshot", "model.pt", form).path.is_file()


@pytest.mark.parametrize("form", ["torch.export", "torchscript"])
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, form: str) -> None:
    """torch's own writers end the process with a signal instead."""
    make_snapshot(tmp_path / "snapshot")
    code = (
        "import resource, sys\n"
        "from tightrec.snapshot.compiled import compile_to\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    compile_to('snapshot', 'model.pt', sys.argv[1])\n"
        "except OSError as error:\n    print('told:', error.strerror)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, form], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert "told: File too large" in done.stdout, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["snapshot"]


def test_a_damaged_snapshot_is_refused(tmp_path: Path) -> None:
    folder = make_snapshot(tmp_path / "snapshot")
    (folder / "dense.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"dense\.safetensors"):
        compile_to(folder, tmp_path / "model.pt", "torchscript")


def test_the_command_says_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "require_same", lambda *_: None)
    folder = make_snapshot(tmp_path / "snapshot")
    lines: list[str] = []
    config = CompileConfig(snapshot=folder, out=tmp_path / "model.pt2")
    assert compile_snapshot(config, lines.append) == 0
    assert lines[0].startswith(f"{tmp_path / 'model.pt2'}: torch.export, ")
    assert lines[0].endswith("got the snapshot's logits for 1,094 random rows, bit for bit")
