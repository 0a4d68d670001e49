"""The explorer's parts: settings, what is measured with what, what is kept, and what is written."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from explored import hashed_snapshot, path, path_set, prepare
from snapshot_made import make_snapshot

from tightrec.serving.explore import explorer
from tightrec.serving.explore.candidates import candidates, open_snapshots, read_held_out
from tightrec.serving.explore.config import ExploreConfig, parse_bytes
from tightrec.serving.explore.plot import plot_paths
from tightrec.serving.explore.recorded import read_recorded
from tightrec.serving.explore.table import WIDTH, table_lines
from tightrec.serving.paths import Device, PathSet, read_paths, write_paths


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with snapshots ``table`` and ``dhe`` and the prepared folder ``rows``."""
    folder = tmp_path_factory.mktemp("made")
    make_snapshot(folder / "table")
    hashed_snapshot(folder / "dhe")
    prepare(folder / "rows")
    return folder


def settings(made: Path, *snapshots: str, **more) -> ExploreConfig:
    chosen = {"data": made / "rows", "rows": (1, 64), "cores": 2, "out": made / "paths.json"} | more
    return ExploreConfig(snapshots=tuple(made / name for name in snapshots or ("table",)), **chosen)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("512mb", 512 * 10**6),
        ("10 kB", 10_000),
        ("1000000", 10**6),
        ("7B", 7),
    ],
)
def test_sizes_of_memory(text, size):
    assert parse_bytes(text, "memory") == size


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"memory": ("4XB",)}, "memory=4XB: '4XB' is no size"),
        ({"memory": ("0",)}, "'0' is no size"),
        ({"memory": ("cpu=4",)}, "memory=cpu=4 is 4 bytes. Write the unit, such as 4GB"),
        ({"memory": ("cpu=1GB", "cpu=2GB")}, "two limits for cpu"),
        ({"devices": ("gpu",)}, "devices: 'gpu' is not known"),
        ({"devices": ()}, "devices is empty"),
        ({"devices": ("cpu", "cpu")}, "names something twice"),
        ({"threads": (3,)}, "threads=3 must lie between 1 and the cores, which are 2"),
        ({"threads": (0,)}, "threads=0 must lie between"),
        ({"rows": (0, 1)}, "batch sizes of at least 1"),
        ({"rows": ()}, "rows is empty"),
        ({"repeats": 3}, "repeats=3 must not be below least_repeats=10"),
        ({"seconds": float("nan")}, "seconds=nan must be a finite number"),
        ({"cores": 0}, "cores=0 must be at least 1"),
        ({"cache_mb": -1.0}, "memory_mb=-1.0"),
        ({"plot": Path("x.pdf")}, "must end in .svg or .png"),
    ],
)
def test_settings_that_do_not_fit_are_refused(made, values, told):
    with pytest.raises(ValueError, match=told):
        settings(made, **values)


def test_limits_by_device_and_for_all():
    limits = ExploreConfig(snapshots=(Path("a"),), memory=("1GB", "cuda:0=2GB"))
    assert limits.memory_bytes("cpu") == 10**9
    assert limits.memory_bytes("cuda:0") == 2 * 10**9
    assert limits.memory_bytes("cpu", named=True) is None


def test_threads_are_powers_of_two_and_the_cores():
    counts = {
        cores: ExploreConfig(snapshots=(Path("a"),), cores=cores).thread_counts for cores in (1, 2, 6, 8)
    }
    assert counts == {1: (1,), 2: (1, 2), 6: (1, 2, 4, 6), 8: (1, 2, 4, 8)}


def test_every_snapshot_is_measured_with_each_thread_count_and_its_caches(made):
    config = settings(made, "table", "dhe", caches=("none", "both"))
    names = [found.name for found in candidates(config, open_snapshots(config.snapshots))]
    assert names == [
        "table-int8-cpu-1",
        "table-int8-cpu-2",
        "dhe-fp32-cpu-1",
        "dhe-fp32-cpu-2",
        "dhe-fp32-cpu-1-both",
        "dhe-fp32-cpu-2-both",
    ]


def test_snapshots_of_one_kind_are_told_apart_by_their_folders_or_a_number(tmp_path):
    places = [tmp_path / "a b", tmp_path / "c", tmp_path / "deep" / "c"]
    for seed, place in enumerate(places):
        make_snapshot(place, seed=seed)
    assert [found.word for found in open_snapshots(places)] == [
        "table-int8-a_b",
        "table-int8-c-2",
        "table-int8-c-3",
    ]


def test_a_link_stays_a_link_and_is_resolved_once(made, tmp_path):
    (tmp_path / "current").symlink_to(made / "table")
    (opened,) = open_snapshots([tmp_path / "current"])
    assert opened.named == tmp_path / "current"
    assert opened.folder == (made / "table").resolve()


def test_snapshots_that_cannot_stand_beside_each_other_are_refused(made, tmp_path):
    make_snapshot(tmp_path / "other", cardinalities=(5, 7, 12))
    make_snapshot(tmp_path / "fewer", cardinalities=(5, 7))
    make_snapshot(tmp_path / "dense", dense=2)
    for name, told in {
        "other": "feature 'f2' of .* is not the feature 'f2' of .*Paths of one file serve",
        "fewer": "has 2 sparse features and .* 3",
        "dense": "reads other dense columns",
    }.items():
        with pytest.raises(ValueError, match=told):
            open_snapshots([made / "table", tmp_path / name])
    with pytest.raises(ValueError, match="are the same snapshot"):
        open_snapshots([made / "table", made / "rows" / ".." / "table"])
    with pytest.raises(ValueError, match="There is no snapshot"):
        open_snapshots([made / "none"])
    with pytest.raises(ValueError, match=r"Leave the quotes out: snapshots=\[A,B\]"):
        open_snapshots([Path('"a"')])
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"training run.* export checkpoint=.*/run out="):
        open_snapshots([tmp_path / "run"])


def test_a_damaged_snapshot_is_found_before_anything_is_measured(tmp_path):
    make_snapshot(tmp_path / "s")
    file = tmp_path / "s" / "dense.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"dense\.safetensors"):
        open_snapshots([tmp_path / "s"])


def test_held_out_rows_come_from_two_splits_or_from_one_if_there_is_no_other(made, tmp_path):
    (opened,) = open_snapshots([made / "table"])
    rows = read_held_out(settings(made, quality_rows=100, latency_rows=200), opened)
    assert (len(rows.quality), len(rows.latency)) == (100, 200)
    alone = prepare(tmp_path / "alone", splits=("test",))
    rows = read_held_out(settings(made, data=alone), opened)
    assert rows.latency is rows.quality


@pytest.mark.parametrize(
    ("folder", "more", "told"),
    [
        ({"cardinalities": (5, 7, 12)}, {}, "'f2' has 12 ids"),
        ({"dense": 2}, {}, "dense column 3 is missing"),
        ({"clicks": 0.0}, {}, "only labels 0: no quality can be measured"),
        ({"clicks": 1.1}, {}, "only labels 1"),
        ({}, {"split": "train"}, "has no split 'train', only valid, test. Give split=NAME"),
    ],
)
def test_rows_that_say_nothing_or_do_not_fit_are_refused(made, tmp_path, folder, more, told):
    (opened,) = open_snapshots([made / "table"])
    with pytest.raises(ValueError, match=told):
        read_held_out(settings(made, data=prepare(tmp_path / "rows", **folder), **more), opened)


def test_without_known_rows_a_folder_is_asked_for(made):
    (opened,) = open_snapshots([made / "table"])
    with pytest.raises(ValueError, match=r"names no held-out rows .* Give data=FOLDER"):
        read_held_out(settings(made, data=None), opened)


def test_what_is_wrong_is_found_before_the_first_measurement(made, tmp_path):
    config = settings(made)
    for more, told in (
        ({"out": tmp_path / "no" / "p.json"}, "out=.*: there is no folder"),
        ({"out": tmp_path}, "is a folder"),
        ({"out": Path("/proc/p.json")}, "out=/proc/p.json: the folder /proc takes no files"),
        ({"plot": tmp_path / "no" / "p.svg"}, "plot=.*: there is no folder"),
        ({"memory": ("cuda:0=1GB",)}, "cuda:0 is none of the devices, which are cpu"),
        ({"recorded": (tmp_path / "gpu.json",)}, "There is no file"),
    ):
        with pytest.raises(ValueError, match=told):
            explorer.gather(dataclasses.replace(config, **more))


def test_a_gpu_that_is_not_there_names_recorded(made, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"has no cuda:0 \(0 CUDA devices.*recorded=FILE"):
        explorer.gather(settings(made, devices=("cpu", "cuda:0")))


def recorded_file(folder: Path, *devices: str) -> Path:
    paths = tuple(path(f"table-fp16-{name}-1", device=name, memory_bytes=10) for name in devices)
    slow = path(f"slow-{devices[0]}-1", device=devices[0])
    write_paths(
        PathSet(
            devices=tuple(Device(name=name, slots=1, memory_bytes=10**6) for name in devices),
            paths=paths,
            dropped=((slow, "too slow"),),
        ),
        folder / "gpu.json",
    )
    return folder / "gpu.json"


def test_recorded_devices_are_marked_and_their_names_differ_from_those_here(tmp_path):
    file = recorded_file(tmp_path, "cpu", "cuda:0")
    first, second = read_recorded([file, file], ["cpu"])
    assert [device.name for device in first.devices] == ["cpu@gpu", "cuda:0"]
    assert [device.name for device in second.devices] == ["cpu@gpu-2", "cuda:0@gpu"]
    assert all(device.recorded for found in (first, second) for device in found.devices)
    assert [found.name for found in first.paths] == ["table-fp16-cpu@gpu-1", "table-fp16-cuda:0-1"]
    assert [found.name for found in second.paths] == ["table-fp16-cpu@gpu-2-1", "table-fp16-cuda:0@gpu-1"]
    assert first.dropped[0][0].device == "cpu@gpu"


def test_measured_and_recorded_paths_come_together(made, tmp_path):
    config = settings(made, recorded=(recorded_file(tmp_path, "cuda:0"),), memory=("cuda:0=10B",))
    found = explorer.choose(config, explorer.gather(config), [path("a"), path("b", ms=(9.0, 9.0, 90.0))])
    assert [(device.name, device.recorded) for device in found.devices] == [("cpu", False), ("cuda:0", True)]
    assert [p.name for p in found.paths] == ["a", "table-fp16-cuda:0-1"]
    assert [p.name for p, _ in found.dropped] == ["b", "slow-cuda:0-1"]
    assert found.device("cuda:0").memory_bytes == 10
    assert found.notes["rows"]["quality"] == 600
    with pytest.raises(ValueError, match="cuda:0: the smallest path needs 10 bytes"):
        explorer.gather(dataclasses.replace(config, memory=("cuda:0=9B",)))


def test_what_is_written_names_places_that_can_move_together(made, tmp_path):
    (tmp_path / "current").symlink_to(made / "table")
    config = settings(made, out=tmp_path / "p.json")
    config = dataclasses.replace(config, snapshots=(tmp_path / "current", made / "dhe"))
    gathered = explorer.gather(config)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "dhe-both.safetensors").write_text("cache")
    (scratch / "unused.safetensors").write_text("cache")
    fingerprints = [opened.fingerprint for opened in gathered.snapshots]
    cached = {"cache_file": str(scratch / "dhe-both.safetensors"), "fingerprint": fingerprints[1]}
    paths = path_set(path("a", fingerprint=fingerprints[0]), path("b", **cached), path("c", **cached))
    explorer._publish(config, gathered, paths, scratch)
    values = json.loads((tmp_path / "p.json").read_text())["paths"]
    assert [value["snapshot"] for value in values] == ["current", str(made / "dhe"), str(made / "dhe")]
    assert [value["cache_file"] for value in values] == [None, *["p.dhe-both.safetensors"] * 2]
    assert sorted(os.listdir(tmp_path)) == [
        "current",
        "p.dhe-both.safetensors",
        "p.json",
        "p.svg",
        "scratch",
    ]
    assert read_paths(tmp_path / "p.json").paths[1].cache_file == str(tmp_path / "p.dhe-both.safetensors")


def shown() -> PathSet:
    note = {
        "hits": {"encoder": 0.91, "decoder": 1.0},
        "change": {"accuracy": -0.0001, "auc": 0.0, "ne": 0.0002},
    }
    long = path("dhe-int8-" + "x" * 40 + "-cpu-1-both", accuracy=0.8, notes={"cache": note})
    gpu = path("table-fp16-cuda:0-1", device="cuda:0")
    return PathSet(
        devices=(
            Device(name="cpu", slots=2, memory_bytes=10**9),
            Device(name="cuda:0", slots=1, recorded=True),
        ),
        paths=(path(), long, gpu),
        dropped=((path("gone"), "no room: " + "very " * 40 + "large"),),
    )


def test_the_table_is_narrow_and_says_what_is_kept_recorded_and_dropped():
    lines = table_lines(shown(), "accuracy")
    assert max(map(len, lines)) <= WIDTH
    text = "\n".join(lines)
    assert "cpu: 2 slots, memory 1,000 MB, measured here; kept, by accuracy:" in text
    assert "cuda:0: 1 slots, recorded on another machine; kept, by accuracy:" in text
    shares = "encoder 91.0% of the ids, decoder 100.0% of the rest"
    assert f"    {shares}; accuracy -0.010 points, AUC +0.00000, NE +0.00020" in lines
    assert lines.index("not kept:") < next(i for i, line in enumerate(lines) if line.startswith("gone"))


@pytest.mark.parametrize("by", ["accuracy", "auc", "ne"])
def test_the_plot_names_kept_paths_and_is_the_same_each_time(tmp_path, by):
    for name in ("a.svg", "b.svg", "c.png"):
        plot_paths(shown(), by, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert "table-int8-cpu-1" in text and "table-fp16-cuda:0-1 (recorded)" in text and "not kept (1)" in text
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
