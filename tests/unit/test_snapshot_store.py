"""A snapshot's folder: written, read back, and refused when damaged."""

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from snapshot_forged import flip_byte, forge_manifest, forge_tensors
from snapshot_made import make_snapshot

from tightrec.snapshot import store
from tightrec.snapshot.layers import StoredLayer, store_layer
from tightrec.snapshot.manifest import MANIFEST, DamagedSnapshot, plain
from tightrec.snapshot.packed import pack
from tightrec.snapshot.precision import Plan
from tightrec.snapshot.store import (
    DENSE_FILE,
    SnapshotWriter,
    check,
    read_dense,
    read_manifest,
    read_table,
)

MIXED = Plan(
    tables={"t_f0": "fp32", "t_f1": "int4", "t_f2": "fp16"},
    layers={"bottom.0": "bf16", "bottom.1": "fp16", "top.0": "int8", "top.1": "fp32"},
    ranges="min_max",
)


def read_all(folder: Path) -> None:
    manifest = read_manifest(folder)
    check(folder, manifest)
    for table in manifest.tables:
        read_table(folder, table)
    read_dense(folder, manifest)


def a_layer(**changes: Any) -> StoredLayer:
    stored = store_layer(torch.ones(2, 3), torch.zeros(2), "fp32")
    return StoredLayer(**{**vars(stored), **changes})


def test_what_was_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    writer = SnapshotWriter(tmp_path / "a")
    tables = {}
    for i, (name, kind) in enumerate(MIXED.tables.items()):
        tables[name] = pack(torch.randn(4 + i, 8, generator=generator), kind)
        writer.write_table(name, kind, 8, tables[name])
    layers = {}
    for name, kind in MIXED.layers.items():
        weight = torch.randn(5, 6, generator=generator)
        bias = torch.randn(5, generator=generator) if name.startswith("top") else None
        layers[name] = store_layer(weight, bias, kind, (-1.5, 0.1) if kind == "int8" else None)
    extras = {"constant": torch.randn(8, generator=generator)}
    writer.write_dense(layers, extras)
    written = writer.finish(
        step=7,
        source={"fingerprint": "f", "path": Path("/x")},
        model={"embedding_dim": 8, "bottom_layers": (6,)},
        features={
            "dense": ["d0"],
            "sparse": [{"name": f"f{i}", "cardinality": 4 + i, "multi_hot": i == 1} for i in range(3)],
        },
        plan=MIXED,
        verification={"ne": 0.5, "auc": float("nan")},
        notes={"why": "test"},
    )
    manifest = read_manifest(tmp_path / "a")
    assert manifest == written
    assert manifest.precision == MIXED
    assert manifest.config.bottom_layers == (6,)
    assert [(f.name, f.cardinality, f.multi_hot) for f in manifest.sparse][1] == ("f1", 5, True)
    assert (manifest.step, manifest.source["path"], manifest.notes) == (7, "/x", {"why": "test"})
    # JSON has no word for what is not a number.
    assert manifest.verification == {"ne": 0.5, "auc": None}
    check(tmp_path / "a", manifest)
    for table in manifest.tables:
        assert torch.equal(read_table(tmp_path / "a", table), tables[table.name])
    read, small = read_dense(tmp_path / "a", manifest)
    assert list(read) == list(layers)
    for name, layer in layers.items():
        for part, value in vars(layer).items():
            again = getattr(read[name], part)
            if isinstance(value, torch.Tensor):
                assert again.dtype == value.dtype and torch.equal(again, value)
            else:
                assert again == value
    assert list(small) == ["constant"] and torch.equal(small["constant"], extras["constant"])
    weights = sum(p.stat().st_size for p in (tmp_path / "a").rglob("*.safetensors"))
    assert manifest.weight_bytes == weights


def test_a_second_manifest_replaces_the_first(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path / "a")
    writer.write_table("t_f", "fp32", 4, pack(torch.ones(2, 4), "fp32"))
    writer.write_dense({"top.0": a_layer()}, {})
    with writer.new_file("plot.svg") as path:
        path.write_text("<svg/>")
    writer.write_file("search.json", b"{}")
    facts: dict[str, Any] = {
        "step": 1,
        "source": {},
        "model": {"embedding_dim": 4},
        "features": {"dense": [], "sparse": [{"name": "f", "cardinality": 2, "multi_hot": False}]},
        "plan": Plan(tables={"t_f": "fp32"}, layers={"top.0": "fp32"}),
    }
    assert writer.finish(**facts).verification is None
    writer.finish(**facts, verification={"ok": True})
    manifest = read_manifest(tmp_path / "a")
    assert manifest.verification == {"ok": True}
    assert {"plot.svg", "search.json", DENSE_FILE} < set(manifest.files)
    (tmp_path / "a" / "plot.svg").write_text("<SVG/>")
    with pytest.raises(DamagedSnapshot, match=r"plot.svg does not have the SHA-256"):
        check(tmp_path / "a", manifest)


def test_only_json_and_safetensors_are_written(tmp_path: Path) -> None:
    folder = make_snapshot(tmp_path / "a")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 5
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                assert opened.keys()
        else:
            assert path.name == MANIFEST and json.loads(path.read_text())["format"] == "tightrec snapshot"


def test_every_file_and_folder_is_flushed_and_the_manifest_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{handle}").readlink().relative_to(tmp_path).as_posix())
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    make_snapshot(tmp_path / "a")
    assert flushed == [
        *(f"a/tables/t_f{i}.safetensors" for i in range(3)),
        f"a/{DENSE_FILE}",
        "a/tables",
        f"a/{MANIFEST}.partial",
        "a",
    ]


def test_any_table_name_makes_a_file_of_its_own_in_the_folder(tmp_path: Path) -> None:
    names = ["t_a", "..", "../../x", "a/b", "a%2Fb", "é ~.x", "n" * 300, "n" * 300 + "m", ""]
    writer = SnapshotWriter(tmp_path / "a")
    for name in names:
        writer.write_table(name, "fp32", 4, pack(torch.ones(1, 4), "fp32"))
    files = list((tmp_path / "a" / "tables").iterdir())
    assert len(files) == len(names)
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    assert (tmp_path / "a" / "tables" / "t_a.safetensors") in files
    assert not any(file.name.startswith(".") and file.name != ".safetensors" for file in files)


def test_the_writer_refuses_what_it_cannot_keep(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path / "a")
    rows = pack(torch.ones(2, 4), "fp32")
    with pytest.raises(ValueError, match=r"table t: torch.uint8 \[2, 16\] is not uint8 \[2, 8\]"):
        writer.write_table("t", "fp16", 4, rows)
    with pytest.raises(ValueError, match=r"table t: torch.float32"):
        writer.write_table("t", "fp32", 4, torch.ones(2, 16))
    writer.write_table("t", "fp32", 4, rows)
    with pytest.raises(ValueError, match="written already"):
        writer.write_table("t", "fp32", 4, rows)
    weight = torch.tensor([[1.0, torch.inf, 0.0]])
    with pytest.raises(ValueError, match=r"layers/top\.0/weight holds a value that is not finite"):
        writer.write_dense({"top.0": a_layer(weight=weight, bias=None)}, {})
    with pytest.raises(ValueError, match="is there already"):
        SnapshotWriter(tmp_path / "a")
    with pytest.raises(TypeError, match="Tensor"):
        plain({"x": [torch.ones(1)]})


def test_a_view_is_written_without_what_lies_around_it(tmp_path: Path) -> None:
    whole = pack(torch.randn(100, 4, generator=torch.Generator().manual_seed(0)), "fp32")
    SnapshotWriter(tmp_path / "a").write_table("t", "fp32", 4, whole[10:14:2])
    (file,) = (tmp_path / "a" / "tables").iterdir()
    assert torch.equal(load_file(file)["rows"], whole[[10, 12]])
    assert file.stat().st_size < 400


def test_a_full_disk_is_told_with_the_files_name(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path / "a")
    rows = pack(torch.ones(10_000, 4), "fp32")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="the file cannot be written") as refusal:
            writer.write_table("t", "fp32", 4, rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = refusal.value
    assert (error.errno, error.filename) == (errno.EFBIG, str(tmp_path / "a" / "tables" / "t.safetensors"))
    assert error.strerror == f"the file cannot be written: {os.strerror(errno.EFBIG)}"


def test_a_refusal_without_a_number_is_an_error_of_the_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise SafetensorError("something else")

    monkeypatch.setattr(store, "save_file", refuse)
    with pytest.raises(OSError, match=r"dense\.safetensors") as refusal:
        SnapshotWriter(tmp_path / "a").write_dense({"top.0": a_layer()}, {})
    assert refusal.value.errno == errno.EIO


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_weights_are_as_readable_as_other_files(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        folder = make_snapshot(tmp_path / "a")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(modes, 0o666 & ~mask)


def test_there_is_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no snapshot .*nowhere"):
        read_manifest(tmp_path / "nowhere")


TABLE = "tables/t_f1.safetensors"


def damages() -> dict[str, tuple[Callable[[Path], Any], str]]:
    """What is done to a whole snapshot, and what its refusal says."""

    def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        return lambda folder: forge_manifest(folder, change)

    def renamed(name: str) -> Callable[[Path], None]:
        def change(values: dict[str, Any]) -> None:
            values["files"][name] = values["files"].pop(TABLE)
            values["tables"][1]["file"] = name

        return manifest(change)

    def dense(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
        return lambda folder: forge_tensors(folder, DENSE_FILE, change)

    def table(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
        return lambda folder: forge_tensors(folder, TABLE, change)

    def with_nan(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers/top.0/bias"][2] = torch.nan

    def text(content: str) -> Callable[[Path], Any]:
        return lambda folder: (folder / MANIFEST).write_text(content)

    def truncated(folder: Path) -> None:
        data = (folder / TABLE).read_bytes()
        (folder / TABLE).write_bytes(data[:-5])

    def truncated_and_told(folder: Path) -> None:
        truncated(folder)
        size = (folder / TABLE).stat().st_size
        import hashlib

        record = {"size_bytes": size, "sha256": hashlib.sha256((folder / TABLE).read_bytes()).hexdigest()}
        forge_manifest(folder, lambda values: values["files"].update({TABLE: record}))

    return {
        "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing"),
        "empty manifest": (text(""), "manifest.json is not valid JSON"),
        "half a manifest": (
            lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text()[:200]),
            "manifest.json is not valid JSON",
        ),
        "binary manifest": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        "a list": (text("[1]"), "manifest.json is not a snapshot's"),
        "a checkpoint's": (text('{"format_version": 1, "files": {}}'), "manifest.json is not a snapshot's"),
        "version 99": (
            manifest(lambda v: v.update(format_version=99)),
            "format version 99, and 1 to 2 are known",
        ),
        "altered": (
            lambda f: (f / MANIFEST).write_text(
                (f / MANIFEST).read_text().replace('"step": 1,', '"step": 2,')
            ),
            "manifest.json does not match its own checksum",
        ),
        "no plan": (manifest(lambda v: v.pop("plan")), "does not describe a model"),
        "a new field": (manifest(lambda v: v.update(more=1)), "does not describe a model"),
        "files is a list": (manifest(lambda v: v.update(files=[])), "does not describe a model"),
        "architecture": (manifest(lambda v: v["model"].update(architecture="x")), "architecture 'x'"),
        "pooling": (manifest(lambda v: v["model"].update(pooling="max")), "pooling 'max'"),
        "dim": (manifest(lambda v: v["model"].update(embedding_dim=12)), "t_f0 is 5 x 8 where .* 5 x 12"),
        "rows": (manifest(lambda v: v["tables"][1].update(rows=6)), "t_f1 is 6 x 8 where .* 7 x 8"),
        "kind": (manifest(lambda v: v["tables"][0].update(kind="int3")), "type 'int3' of table t_f0"),
        "plan's kind": (manifest(lambda v: v["plan"]["tables"].update(t_f0="fp32")), "another type for t_f0"),
        "layer's kind": (
            manifest(lambda v: v["plan"]["layers"].update({"top.0": "bf16"})),
            "another type for top.0",
        ),
        "order": (manifest(lambda v: v["tables"].reverse()), "tables and features differ"),
        "twice": (manifest(lambda v: v["features"].update(dense=["f0", "x", "y"])), "stands in it twice"),
        "unknown file": (manifest(lambda v: v["tables"][0].update(file="x.y")), "x.y is not among the files"),
        "size": (
            manifest(lambda v: v["files"][TABLE].update(size_bytes="1")),
            "record of tables/t_f1.safetensors",
        ),
        "hash": (
            manifest(lambda v: v["files"][TABLE].update(sha256="..")),
            "record of tables/t_f1.safetensors",
        ),
        "outside": (renamed("../x.safetensors"), r"'\.\./x.safetensors' leaves the folder"),
        "absolute": (renamed("/tmp/x.safetensors"), "'/tmp/x.safetensors' leaves the folder"),
        "deep": (renamed("tables/../../x"), "leaves the folder"),
        "dots": (renamed(".."), "leaves the folder"),
        "hidden": (renamed("tables/.x"), "leaves the folder"),
        "newline": (renamed("x\n"), "leaves the folder"),
        "itself": (renamed(MANIFEST), "leaves the folder"),
        "no dense": (lambda f: (f / DENSE_FILE).unlink(), "dense.safetensors is missing"),
        "no table": (lambda f: (f / TABLE).unlink(), "tables/t_f1.safetensors is missing"),
        "a folder": (
            lambda f: ((f / TABLE).unlink(), (f / TABLE).mkdir()),
            "tables/t_f1.safetensors (has|cannot be read)",
        ),
        "short": (truncated, "tables/t_f1.safetensors has [0-9]+ bytes where the manifest says"),
        "short and told": (truncated_and_told, "tables/t_f1.safetensors is not a whole safetensors file"),
        "one byte": (
            lambda f: flip_byte(f / TABLE),
            "tables/t_f1.safetensors does not have the SHA-256",
        ),
        "rows in file": (
            table(lambda t: t.update(rows=t["rows"][:-1].clone())),
            r"tables/t_f1.safetensors: 'rows' should be torch.uint8 \[7, 12\], found torch.uint8 \[6, 12\]",
        ),
        "type in file": (table(lambda t: t.update(rows=t["rows"].view(torch.int8))), "found torch.int8"),
        "name in file": (table(lambda t: t.update(raws=t.pop("rows"))), "found no such tensor"),
        "weight's type": (
            dense(lambda t: t.update({"layers/top.1/weight": t["layers/top.1/weight"].float()})),
            "dense.safetensors: layers/top.1/weight should be torch.int8",
        ),
        "weight's shape": (
            dense(lambda t: t.update({"layers/top.1/weight": t["layers/top.1/weight"].t().contiguous()})),
            r"layers/top.1/weight should be torch.int8 \[1, 10\], found torch.int8 \[10, 1\]",
        ),
        "no scale": (dense(lambda t: t.pop("layers/top.1/scale")), "lacks layers/top.1/scale"),
        "more": (dense(lambda t: t.update(x=torch.ones(1))), "dense.safetensors holds an unknown x"),
        "NaN": (dense(with_nan), "dense.safetensors: layers/top.0/bias holds a value that is not finite"),
    }


@pytest.mark.parametrize("damage", list(damages()))
def test_a_damaged_snapshot_is_refused_by_file_name(damage: str, tmp_path: Path) -> None:
    folder = make_snapshot(tmp_path / "a")
    read_all(folder)
    change, says = damages()[damage]
    change(folder)
    with pytest.raises(DamagedSnapshot, match=says) as refusal:
        read_all(folder)
    assert str(folder) in str(refusal.value)


def test_files_that_the_manifest_does_not_name_are_let_be(tmp_path: Path) -> None:
    folder = make_snapshot(tmp_path / "a")
    (folder / "notes.txt").write_text("mine")
    read_all(folder)


def test_sizes_alone_are_checked_where_contents_are_not(tmp_path: Path) -> None:
    folder = make_snapshot(tmp_path / "a")
    flip_byte(folder / TABLE)
    manifest = read_manifest(folder)
    check(folder, manifest, contents=False)
    (folder / TABLE).write_bytes(b"")
    with pytest.raises(DamagedSnapshot, match=r"t_f1.safetensors has 0 bytes"):
        check(folder, manifest, contents=False)
