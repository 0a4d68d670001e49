"""The numeric debugger: healthy models pass, and of a planted fault it names exactly the place."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import snapshot_run
import torch
from snapshot_forged import flip_byte, forge_manifest, forge_tensors
from torch import Tensor

from tightrec.models.config import ModelConfig
from tightrec.snapshot import debugger, stored_weights
from tightrec.snapshot.config import ExportConfig
from tightrec.snapshot.debugger import DebugConfig, debug
from tightrec.snapshot.differences import Difference
from tightrec.snapshot.export import export
from tightrec.snapshot.source import open_checkpoint

DENSE = "dense.safetensors"
ITEM = "tables/t_item.safetensors"
WIDE = ModelConfig(embedding_dim=16, bottom_layers=(32,), top_layers=(32, 16), cross_layers=2, cross_rank=8)
TOP_RANGE = "quantised in [-0.01, 0.01]"


class NoDense(snapshot_run.Rows):
    """Rows without dense columns."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.schema = dataclasses.replace(self.schema, dense=())

    def read(self, group: int) -> Any:
        columns = super().read(group)
        return dataclasses.replace(columns, dense=np.empty((len(columns), 0), np.float32))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Run folder and int8 snapshot of a DLRM, a DCNv2 and a DLRM without dense columns, by name."""
    found = {}
    for name in ("dlrm", "dcnv2", "no_dense"):
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            architecture: Any = name if name == "dcnv2" else "dlrm"
            patch.setattr(snapshot_run, "CONFIG", dataclasses.replace(WIDE, architecture=architecture))
            if name == "no_dense":
                patch.setattr(snapshot_run, "Rows", NoDense)
            snapshot_run.save(folder / "run", 1)
        config = ExportConfig(
            checkpoint=folder / "run", out=folder / "snapshot", budget_ne=snapshot_run.LOOSE
        )
        export(config, lambda line: None)
        found[name] = (folder / "run", folder / "snapshot")
    return found


@pytest.fixture
def run(made: dict[str, tuple[Path, Path]]) -> Path:
    return made["dlrm"][0]


@pytest.fixture
def snapshot(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> Path:
    """A copy to plant faults in."""
    shutil.copytree(made["dlrm"][1], tmp_path / "snapshot")
    return tmp_path / "snapshot"


def told(run: Path, **settings: Any) -> tuple[int, str]:
    """Exit status and everything said."""
    lines: list[str] = []
    status = debug(DebugConfig(checkpoint=run, **settings), lines.append)
    return status, "\n".join(lines)


def only(stage: str, words: str) -> str:
    """The last sentence that names ``stage`` alone."""
    first, *others = words.splitlines()[::-1]
    assert first.startswith(f"{stage} is the first stage beyond its limits: "), words
    marked = [line for line in others if line.startswith("> ")]
    assert len(marked) == 1 and marked[0].split()[1] == stage, words
    return first


def scaled(name: str, place: Any, factor: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][place] *= factor

    return change


def swap_scale_and_bias(row: int) -> Callable[[dict[str, Tensor]], None]:
    """An int8 row begins with its scale and its bias."""

    def change(tensors: dict[str, Tensor]) -> None:
        rows = tensors["rows"]
        half = (rows.shape[1] - WIDE.embedding_dim) // 2
        rows[row, : 2 * half] = rows[row, : 2 * half].roll(half)

    return change


@pytest.mark.parametrize("precision", ["int8", "int4", "int2", "fp16", "bf16", "fp32"])
@pytest.mark.parametrize("model", ["dlrm", "dcnv2", "no_dense"])
def test_healthy_models_of_every_type_pass(
    made: dict[str, tuple[Path, Path]], model: str, precision: str
) -> None:
    status, words = told(made[model][0], precision=precision)
    assert status == 0, words
    assert words.splitlines()[-1] == "Every stage is within its limits on 300 rows."
    assert "> " not in words


@pytest.mark.parametrize("model", ["dlrm", "dcnv2", "no_dense"])
def test_a_healthy_snapshot_passes(made: dict[str, tuple[Path, Path]], model: str) -> None:
    run, snapshot = made[model]
    status, words = told(run, snapshot=snapshot)
    assert status == 0, words
    # Stored as packing makes it: no row is farther from float32 than its type needs.
    assert words.count("1.00x") >= 4
    assert "Files differ" not in words


def test_every_stage_stands_in_the_table_in_order(run: Path) -> None:
    _, words = told(run)
    names = [line.split()[0] for line in words.splitlines()[1:-1]]
    tables, bottom = ["table:t_user", "table:t_item", "tables"], ["bottom.0", "bottom.1"]
    assert names == [*tables, *bottom, "interaction", "top.0", "top.1", "top.2", "logits"]


@pytest.mark.parametrize("layer", ["bottom.0", "top.1"])
def test_a_layer_with_a_wrong_scale_is_named(run: Path, snapshot: Path, layer: str) -> None:
    forge_tensors(snapshot, DENSE, scaled(f"layers/{layer}/scale", 3, 2.0))
    status, words = told(run, snapshot=snapshot)
    assert status == 1
    sentence = only(layer, words)
    assert "is stored wrongly: output 3 of " in sentence
    assert "Files differ" not in words


def test_a_wrong_bias_is_named(run: Path, snapshot: Path) -> None:
    forge_tensors(snapshot, DENSE, scaled("layers/top.0/bias", 5, -1.0))
    status, words = told(run, snapshot=snapshot)
    assert status == 1
    assert "output 5 of 32" in only("top.0", words)


@pytest.mark.parametrize("at_once", [7, 1000])
def test_a_row_with_scale_and_bias_swapped_is_named(
    run: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(stored_weights, "_ROWS", at_once)
    forge_tensors(snapshot, ITEM, swap_scale_and_bias(17))
    status, words = told(run, snapshot=snapshot)
    assert status == 1
    assert "row 17 of 30" in only("table:t_item", words)


def test_a_damaged_row_that_no_row_looks_up_is_named_all_the_same(run: Path, snapshot: Path) -> None:
    rows = open_checkpoint(run)
    looked_up = set(
        debugger.gather(rows, DebugConfig(checkpoint=run, verify_rows=9), verified=True)
        .verify_rows.sparse[1]
        .ids.tolist()
    )  # type: ignore[union-attr]
    row = next(row for row in range(30) if row not in looked_up)
    forge_tensors(snapshot, ITEM, swap_scale_and_bias(row))
    status, words = told(run, snapshot=snapshot, verify_rows=9)
    assert status == 1
    assert f"row {row} of 30" in only("table:t_item", words)


def test_a_bad_range_is_named_with_what_the_rows_need(run: Path, snapshot: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["layers"]["top.0"]["activation"] = [-0.01, 0.01]

    forge_manifest(snapshot, change)
    status, words = told(run, snapshot=snapshot)
    assert status == 1
    sentence = only("top.0", words)
    assert "its weights are stored as they should be, but its inputs are" in sentence
    assert TOP_RANGE in sentence


def test_a_bad_range_chosen_here_is_named_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = debugger.chosen_ranges
    monkeypatch.setattr(debugger, "chosen_ranges", lambda *words: {**real(*words), "top.0": (-0.01, 0.01)})
    status, words = told(run)
    assert status == 1
    assert TOP_RANGE in only("top.0", words)


def test_a_nan_in_a_table_is_named(run: Path, snapshot: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["rows"][4, :4] = 0xFF

    forge_tensors(snapshot, ITEM, change)
    status, words = told(run, snapshot=snapshot)
    assert status == 1
    assert "values that are not finite stored in row 4" in only("table:t_item", words)


def test_a_nan_in_a_layer_is_refused_by_its_name(run: Path, snapshot: Path) -> None:
    forge_tensors(snapshot, DENSE, scaled("layers/top.1/scale", 2, math.nan))
    status, words = told(run, snapshot=snapshot)
    assert status == 1
    assert f"{DENSE}: layers/top.1/scale holds a value that is not finite" in words


def test_a_layer_that_makes_nan_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = debugger.measure

    def broken(exact: Any, low: Any, *others: Any) -> Any:
        kept = low.top[0].forward
        low.top[0].forward = lambda x: torch.where(x[:, :1] > x[:, :1].median(), math.nan, kept(x))
        return real(exact, low, *others)

    monkeypatch.setattr(debugger, "measure", broken)
    status, words = told(run)
    assert status == 1
    assert "values that are not finite out of finite ones" in only("top.0", words)


def test_the_exact_model_runs_once_a_batch(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, passes = debugger.measure, []

    def counting(exact: Any, *others: Any) -> Any:
        exact.lookup.register_forward_hook(lambda *_: passes.append(1))
        return real(exact, *others)

    monkeypatch.setattr(debugger, "measure", counting)
    assert told(run, batch_size=100)[0] == 0
    assert len(passes) == 3


def test_a_link_that_moves_on_while_files_are_read_is_one_snapshot(
    run: Path, snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, link, real = tmp_path / "other", tmp_path / "current", debugger.read_dense
    shutil.copytree(snapshot, other)
    forge_tensors(other, ITEM, swap_scale_and_bias(17))

    def moving(*arguments: Any) -> Any:
        link.unlink()
        link.symlink_to(other)
        return real(*arguments)

    link.symlink_to(snapshot)
    monkeypatch.setattr(debugger, "read_dense", moving)
    status, words = told(run, snapshot=link)
    assert status == 0, words
    assert link.resolve() == other


def test_changed_bytes_are_told_and_compared_all_the_same(run: Path, snapshot: Path) -> None:
    flip_byte(snapshot / ITEM, -1 - (WIDE.embedding_dim + 8))
    status, words = told(run, snapshot=snapshot)
    assert "Files differ from the manifest" in words.splitlines()[0]
    assert ITEM in words.splitlines()[0]
    assert status == 1
    only("table:t_item", words)


def test_the_constant_vector_is_compared(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    run, whole = made["no_dense"]
    snapshot = Path(shutil.copytree(whole, tmp_path / "snapshot"))
    forge_tensors(snapshot, DENSE, scaled("extras/constant", 0, 1.5))
    status, words = told(run, snapshot=snapshot)
    assert status == 1
    assert "is not stored as the checkpoint has it" in only("constant", words)


def test_an_error_grows_behind_the_layer_that_makes_it_not_in_the_others(run: Path, snapshot: Path) -> None:
    before, after = {}, {}
    for figures, spoilt in ((before, False), (after, True)):
        if spoilt:
            forge_tensors(snapshot, DENSE, scaled("layers/bottom.0/scale", slice(None), 3.0))
        path = snapshot.parent / f"{spoilt}.json"
        told(run, snapshot=snapshot, json=path)
        for stage in json.loads(path.read_text())["stages"]:
            figures[stage["name"]] = stage
    # Downstream layers are as good as before by themselves, but what reaches the logits is not.
    assert after["top.0"]["own"] == before["top.0"]["own"]
    assert after["bottom.0"]["own"]["own_db"] < 0 < 25 < before["bottom.0"]["own"]["own_db"]
    for name in ("bottom.1", "interaction", "top.0", "logits"):
        assert after[name]["gathered"]["sqnr_db"] < before[name]["gathered"]["sqnr_db"] - 10, name


def test_limits_of_the_caller_count(run: Path) -> None:
    status, words = told(run, sqnr_db=200.0)
    assert status == 1
    first, second = words.splitlines()[-2:]
    assert first.startswith("table:t_user is the first stage beyond its limits: it (int8) alone leaves ")
    assert first.endswith(" dB, limit 200 dB.")
    assert second == "Beyond as well: table:t_item, bottom.0, bottom.1, top.0, top.1, top.2."
    status, words = told(run, gathered_db=200.0)
    assert status == 1
    assert "with the errors of all before it" in words.splitlines()[-2]
    assert words.splitlines()[-1].endswith("logits.")
    assert told(run, sqnr_db=1.0, gathered_db=1.0)[0] == 0


def test_figures_are_written_as_json(run: Path, snapshot: Path, tmp_path: Path) -> None:
    forge_tensors(snapshot, ITEM, swap_scale_and_bias(17))
    path = tmp_path / "figures.json"
    told(run, snapshot=snapshot, json=path)
    values = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert values["first"] == "table:t_item"
    assert values["rows"] == 300
    by_name = {stage["name"]: stage for stage in values["stages"]}
    assert by_name["table:t_item"]["stored"]["row"] == 17
    assert by_name["top.0"]["kind"] == "int8"
    assert 25 < by_name["top.0"]["own"]["sqnr_db"] < 70
    assert by_name["interaction"]["own"] is None
    assert [path.name for path in tmp_path.iterdir()].count("figures.json") == 1


def test_each_table_is_measured_by_its_own_columns_at_the_types_of_a_file(run: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("tables: {t_user: int8, t_item: int2}\nlayers: {'*': int8, top.1: fp16}\n")
    told(run, precision=str(plan), json=tmp_path / "figures.json")
    stages = json.loads((tmp_path / "figures.json").read_text())["stages"]
    found = {stage["name"]: (stage["kind"], stage["own"] and stage["own"]["own_db"]) for stage in stages}
    assert found["table:t_user"][0] == "int8" and found["table:t_user"][1] > 40
    assert found["table:t_item"][0] == "int2" and 5 < found["table:t_item"][1] < 20
    assert found["top.1"][0] == "fp16" and found["top.1"][1] > 60 > found["top.0"][1]


def test_another_checkpoints_snapshot_is_refused(snapshot: Path, tmp_path: Path) -> None:
    snapshot_run.save(tmp_path / "run", 2)
    with pytest.raises(ValueError, match=r"was not made from .*step-00000002 but from .*step 1\)"):
        told(tmp_path / "run", snapshot=snapshot)


def test_figures_are_those_of_numpy_and_do_not_depend_on_batches() -> None:
    drawn = np.random.default_rng(0)
    exact = drawn.normal(size=(50, 7)).astype(np.float32)
    other = exact + drawn.normal(size=exact.shape).astype(np.float32) / 30
    whole, parts = Difference(), Difference()
    whole.update(torch.from_numpy(exact), torch.from_numpy(other))
    for start in range(0, 50, 9):
        parts.update(torch.from_numpy(exact[start : start + 9]), torch.from_numpy(other[start : start + 9]))
    a, b = exact.astype(np.float64), other.astype(np.float64)
    wanted = 10 * np.log10((a**2).sum() / ((b - a) ** 2).sum())
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    for found in (whole, parts):
        assert found.sqnr_db == pytest.approx(wanted, rel=1e-12)
        assert found.cosine == pytest.approx(cosine, rel=1e-12)
        assert found.max_error == np.abs(b - a).max()
        assert found.not_finite == 0


def test_what_no_ratio_tells() -> None:
    same, silent, broken = Difference(), Difference(), Difference()
    same.update(torch.ones(3), torch.ones(3))
    assert (same.sqnr_db, same.cosine, same.max_error) == (math.inf, 1.0, 0.0)
    silent.update(torch.zeros(3), torch.ones(3))
    assert math.isnan(silent.sqnr_db) and math.isnan(silent.cosine)
    broken.update(torch.ones(3), torch.tensor([1.0, math.nan, math.inf]))
    broken.update(torch.ones(3), torch.ones(3))
    assert math.isnan(broken.sqnr_db) and math.isnan(broken.cosine) and math.isnan(broken.max_error)
    assert broken.not_finite == 2


def test_a_folder_that_is_not_there_is_told_before_the_work(run: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    config = DebugConfig(checkpoint=run, json=tmp_path / "nowhere" / "figures.json")
    with pytest.raises(ValueError, match=r"nowhere does not exist\. Make it first\."):
        debug(config, lines.append)
    assert lines == []
