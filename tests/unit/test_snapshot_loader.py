"""Loading a snapshot and scoring with it, damaged ones refused by file."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from snapshot_forged import flip_byte, forge_manifest, forge_tensors
from snapshot_made import make_snapshot
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.models.dlrm import DLRM, build_tables
from tightrec.snapshot import Snapshot, load, store
from tightrec.snapshot.manifest import MANIFEST, DamagedSnapshot
from tightrec.snapshot.model import layer_specs
from tightrec.snapshot.packed import unpack
from tightrec.snapshot.precision import Plan
from tightrec.snapshot.store import DENSE_FILE, read_dense, read_manifest, read_table

FEATURES = ("f0", "f1", "f2")
CARDINALITIES = (5, 7, 11)
LAYERS = ("bottom.0", "bottom.1", "cross.0.v", "cross.0.w", "cross.1.v", "cross.1.w", "top.0", "top.1")
EXACT = Plan(tables={f"t_{f}": "fp32" for f in FEATURES}, layers=dict.fromkeys(LAYERS, "fp32"))


def exact(architecture: str, dense: int) -> Plan:
    """The plan that keeps everything in float32."""
    chosen = [
        name
        for name in LAYERS
        if (dense or not name.startswith("bottom")) and (architecture == "dcnv2" or "cross" not in name)
    ]
    return replace(EXACT, layers=dict.fromkeys(chosen, "fp32"))


def rows(count: int, dense: int = 3, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    random = np.random.default_rng(seed)
    ids = {f: random.integers(0, c, count) for f, c in zip(FEATURES, CARDINALITIES, strict=True)}
    return random.normal(size=(count, dense)).astype(np.float32), ids


def bags(count: int, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(seed)
    made = {}
    for feature, cardinality in zip(FEATURES, CARDINALITIES, strict=True):
        offsets = np.concatenate([[0], np.cumsum(random.integers(0, 4, count))])
        made[feature] = (random.integers(0, cardinality, offsets[-1]), offsets)
    return made


def trained(folder: Path) -> DLRM:
    """The trainer's model with a float32 snapshot's weights."""
    manifest = read_manifest(folder)
    layers, extras = read_dense(folder, manifest)
    columns = [(feature.name, feature.cardinality) for feature in manifest.sparse]
    model = DLRM(
        build_tables(columns, manifest.config, torch.device("cpu")), len(manifest.dense), manifest.config
    )
    state = {
        f"sparse_arch.embedding_bag_collection.embedding_bags.{table.name}.weight": unpack(
            read_table(folder, table), table.kind, table.dim
        )
        for table in manifest.tables
    }
    for spec in layer_specs(manifest.config, len(manifest.dense)):
        state[spec.weight] = layers[spec.name].weight
        if spec.bias:
            state[spec.bias] = layers[spec.name].bias
    state |= {"dense_arch.vector": extras["constant"]} if extras else {}
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("architecture", ["dlrm", "dcnv2"])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("dense", [0, 3])
def test_a_float32_snapshot_scores_as_the_trained_model(
    architecture: str, pooling: str, dense: int, tmp_path: Path
) -> None:
    folder = make_snapshot(
        tmp_path / "a",
        dense=dense,
        architecture=architecture,
        pooling=pooling,
        plan=exact(architecture, dense),
    )
    values, _ = rows(50, dense)
    sparse = bags(50)
    found = load(folder).predict(values if dense else None, sparse)
    jagged = KeyedJaggedTensor(
        keys=list(FEATURES),
        values=torch.from_numpy(np.concatenate([ids for ids, _ in sparse.values()])),
        lengths=torch.from_numpy(np.concatenate([np.diff(offsets) for _, offsets in sparse.values()])),
    )
    with torch.no_grad():
        expected = trained(folder)(torch.from_numpy(values), jagged).sigmoid()
    assert np.std(found) > 0.001
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot with tables and layers of int8."""
    return make_snapshot(tmp_path_factory.mktemp("snapshot") / "a")


@pytest.fixture(scope="module")
def snapshot(folder: Path) -> Snapshot:
    return load(folder)


def test_arrays_give_an_array_and_tensors_a_tensor(snapshot: Snapshot) -> None:
    dense, sparse = rows(9)
    found = snapshot.predict(dense, sparse)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32 and found.shape == (9,)
    assert ((found > 0) & (found < 1)).all()
    tensors = snapshot.predict(torch.from_numpy(dense), {k: torch.from_numpy(v) for k, v in sparse.items()})
    assert isinstance(tensors, Tensor) and not tensors.is_inference() and not tensors.requires_grad
    assert tensors.tolist() == found.tolist()
    ids, offsets = torch.zeros(3, dtype=torch.int64), torch.arange(4)
    assert snapshot.logits(torch.zeros(1, 3), ids, offsets).is_inference()
    assert isinstance(snapshot.predict(torch.from_numpy(dense), sparse), Tensor)


def test_forms_and_order_of_features_do_not_matter(snapshot: Snapshot) -> None:
    dense, sparse = rows(9)
    found = snapshot.predict(dense, sparse).tolist()
    other = {"f2": [[i] for i in sparse["f2"]], "f1": sparse["f1"][:, None]}
    other["f0"] = (sparse["f0"], np.arange(10))
    assert snapshot.predict(dense.tolist(), other).tolist() == found


def test_a_feature_may_hold_bags_whatever_it_held_in_training(snapshot: Snapshot) -> None:
    assert not any(feature.multi_hot for feature in snapshot.features)
    dense, _ = rows(5)
    assert snapshot.predict(dense, bags(5)).shape == (5,)


def test_an_empty_batch_gives_an_empty_result(snapshot: Snapshot) -> None:
    dense, sparse = rows(0)
    found = snapshot.predict(dense, sparse)
    assert found.dtype == np.float32 and found.shape == (0,)
    empty = snapshot.predict(torch.from_numpy(dense), {k: torch.from_numpy(v) for k, v in sparse.items()})
    assert isinstance(empty, Tensor) and empty.shape == (0,) and empty.dtype == torch.float32


def test_mistakes_are_refused_by_predict_itself(snapshot: Snapshot) -> None:
    dense, sparse = rows(3)
    with pytest.raises(ValueError, match="feature 'f1': row 1 has id 7"):
        snapshot.predict(dense, {**sparse, "f1": np.array([0, 7, 0])})
    dense[2, 1] = np.nan
    with pytest.raises(ValueError, match="dense column 'd1': row 2 is nan"):
        snapshot.predict(dense, sparse)


def test_a_score_that_is_not_a_number_is_refused_by_row(tmp_path: Path) -> None:
    exactly = load(make_snapshot(tmp_path / "a", plan=exact("dlrm", 3)))
    dense, sparse = rows(5)
    dense[3] = 3e38
    says = "row 3: the score is not a number, since dense values are too large"
    with pytest.raises(ValueError, match=says):
        exactly.predict(dense, sparse)
    with pytest.raises(ValueError, match=says):
        exactly.predict(torch.from_numpy(dense), sparse)
    dense[3] = 3e3
    assert np.isfinite(exactly.predict(dense, sparse)).all()


def test_the_overflow_row_is_the_zero_vector(tmp_path: Path) -> None:
    for kind in ("fp32", "fp16", "int8", "int4", "int2"):
        plan = replace(exact("dlrm", 3), tables=dict.fromkeys(EXACT.tables, kind))
        lenient = load(make_snapshot(tmp_path / kind, plan=plan), out_of_range="overflow")
        dense, sparse = rows(4)
        far = {name: np.array([10**6, -1, 11, 2**40]) for name in sparse}
        none = {name: [[], [], [], []] for name in sparse}
        assert lenient.predict(dense, far).tolist() == lenient.predict(dense, none).tolist()
        known = {name: [[i, 99] for i in ids] for name, ids in sparse.items()}
        assert lenient.predict(dense, known).tolist() == lenient.predict(dense, sparse).tolist()


def test_what_a_snapshot_says_of_itself(folder: Path, snapshot: Snapshot) -> None:
    assert snapshot.manifest == read_manifest(folder)
    assert snapshot.plan.tables == {"t_f0": "int8", "t_f1": "int8", "t_f2": "int8"}
    assert [feature.name for feature in snapshot.features] == list(FEATURES)
    assert snapshot.dense_names == ("d0", "d1", "d2")
    assert snapshot.size_bytes == sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert not snapshot.scorer.training


def test_a_link_is_followed(folder: Path, tmp_path: Path, snapshot: Snapshot) -> None:
    (tmp_path / "current").symlink_to(folder)
    dense, sparse = rows(2)
    again = load(str(tmp_path / "current")).predict(dense, sparse)
    assert again.tolist() == snapshot.predict(dense, sparse).tolist()


def test_a_link_that_moves_on_while_files_are_read_gives_one_whole_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (make_snapshot(tmp_path / name, seed=seed) for seed, name in enumerate(("old", "new")))
    link, real = tmp_path / "current", store.read_dense
    dense, sparse = rows(9)
    expected = load(old).predict(dense, sparse).tolist()
    assert load(new).predict(dense, sparse).tolist() != expected

    def moving(*arguments: Any) -> Any:
        link.unlink()
        link.symlink_to(new)
        return real(*arguments)

    link.symlink_to(old)
    monkeypatch.setattr(store, "read_dense", moving)
    assert load(link).predict(dense, sparse).tolist() == expected
    assert link.resolve() == new


def test_an_altered_file_is_refused_unless_told(tmp_path: Path) -> None:
    folder = make_snapshot(tmp_path / "a")
    flip_byte(folder / "tables" / "t_f2.safetensors")
    with pytest.raises(DamagedSnapshot, match=r"tables/t_f2.safetensors does not have the SHA-256"):
        load(folder)
    load(folder, check=False)
    (folder / "tables" / "t_f2.safetensors").write_bytes(b"")
    with pytest.raises(DamagedSnapshot, match=r"tables/t_f2.safetensors has 0 bytes"):
        load(folder, check=False)


def test_layers_that_do_not_make_the_model_are_refused(tmp_path: Path) -> None:
    def narrower(tensors: dict[str, Tensor]) -> None:
        for part in ("weight", "bias", "scale"):
            tensors[f"layers/bottom.1/{part}"] = tensors[f"layers/bottom.1/{part}"][:4].clone()

    folder = make_snapshot(tmp_path / "narrow")
    forge_tensors(folder, DENSE_FILE, narrower)
    forge_manifest(folder, lambda values: values["layers"]["bottom.1"].update(outputs=4))
    with pytest.raises(DamagedSnapshot, match=r"dense.safetensors: its layers do not make"):
        load(folder)

    def without_layer(values: dict[str, Any]) -> None:
        del values["layers"]["top.1"]

    folder = make_snapshot(tmp_path / "few")
    forge_manifest(folder, without_layer)
    with pytest.raises(DamagedSnapshot, match=r"manifest.json: its layers are not those of its model"):
        load(folder)

    folder = make_snapshot(tmp_path / "extra")
    forge_tensors(folder, DENSE_FILE, lambda tensors: tensors.update({"extras/constant": torch.ones(8)}))
    with pytest.raises(DamagedSnapshot, match=r"dense.safetensors: its small tensors are not those"):
        load(folder)


def test_layers_quantised_for_other_inputs_are_refused(tmp_path: Path) -> None:
    folder = make_snapshot(tmp_path / "a")
    forge_manifest(folder, lambda values: values.update(activation_bits=5))
    with pytest.raises(DamagedSnapshot, match=r"manifest.json: its int8 layers take inputs of 5 bits"):
        load(folder)
    # Nothing is quantised so where no layer is int8.
    folder = make_snapshot(tmp_path / "exact", plan=exact("dlrm", 3))
    forge_manifest(folder, lambda values: values.update(activation_bits=5))
    load(folder)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"device": "tpu"}, "device='tpu' is not known"),
        ({"device": "meta"}, "device='meta' is not known"),
        ({"device": "cuda:99"}, "device='cuda:99': this process sees"),
        ({"out_of_range": "clamp"}, "out_of_range='clamp' is not known"),
        ({"threads": 0}, "threads=0 must be at least 1"),
        ({"path": "/nowhere/at/all"}, "There is no snapshot /nowhere/at/all"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], says: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=says):
        load(**{"path": folder, **arguments})


def test_threads_are_set_only_if_told(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        load(folder)
        assert torch.get_num_threads() == 2
        load(folder, threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_monitor_has_the_manifests_reference(snapshot: Snapshot, tmp_path: Path) -> None:
    monitor = snapshot.monitor(window=100, least_rows=50, psi=0.5)
    assert (monitor.config.window, monitor.config.psi) == (100, 0.5)
    assert snapshot.monitor().update(np.full(200_000, 0.999))[0].what == "psi"
    with pytest.raises(ValueError, match=r"no setting windows. It has window, "):
        snapshot.monitor(windows=3)
    bare = make_snapshot(tmp_path / "bare")
    forge_manifest(bare, lambda values: values.update(score_histogram=None))
    with pytest.raises(ValueError, match="exported without scoring held-out rows"):
        load(bare).monitor()


def test_threads_that_predict_at_once_get_what_one_gets(snapshot: Snapshot) -> None:
    batches = [rows(1 + 7 * i, seed=i) for i in range(8)]
    expected = [snapshot.predict(*batch).tolist() for batch in batches]
    wrong: list[int] = []
    start = threading.Barrier(4)

    def work(first: int) -> None:
        start.wait()
        for i in range(200):
            which = (first + i) % len(batches)
            if snapshot.predict(*batches[which]).tolist() != expected[which]:
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(2 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_format_is_named_first(folder: Path) -> None:
    assert (
        (folder / MANIFEST).read_text().startswith('{\n "format": "tightrec snapshot",\n "format_version": 1')
    )


@pytest.mark.parametrize("activation", [[0.5, 1.0], [-1.0, -0.5], [1.0, -1.0]])
def test_a_range_that_does_not_hold_zero_is_refused(tmp_path: Path, activation: list[float]) -> None:
    folder = make_snapshot(tmp_path / "snapshot")
    forge_manifest(folder, lambda values: values["layers"]["top.0"].update(activation=activation))
    with pytest.raises(DamagedSnapshot, match="of a layer's input does not hold zero"):
        load(folder)
