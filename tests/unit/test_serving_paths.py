"""Paths, their profiles and the file that holds them: what is refused, and what comes back from a file."""

import dataclasses
import json

import pytest
from explored import path, path_set, profile

from tightrec.serving.paths import CacheConfig, Device, PathSet, Profile, read_paths, write_paths


def test_a_profile_lies_on_straight_lines_and_goes_on_in_proportion():
    found = Profile(rows=(1, 3, 10), latency_ms=(1.0, 2.0, 9.0), tail_ms=(2.0, 4.0, 10.0))
    assert [found.expected_ms(rows) for rows in (1, 2, 3, 10)] == [1.0, 1.5, 2.0, 9.0]
    assert found.expected_ms(20) == 18.0
    assert found.expected_tail_ms(2) == 3.0
    assert found.rows_per_s == 1500.0
    later = Profile(rows=(4, 8), latency_ms=(1.0, 2.0), tail_ms=(1.0, 2.0))
    assert later.expected_ms(1) == 1.0


@pytest.mark.parametrize(
    ("rows", "latency", "tail", "told"),
    [
        ((), (), (), "one latency and one tail a batch size"),
        ((1, 2), (1.0,), (1.0, 2.0), "one latency and one tail a batch size"),
        ((1, 2), (1.0, 2.0), (1.0,), "one latency and one tail a batch size"),
        ((2, 1), (1.0, 2.0), (1.0, 2.0), "must ascend from at least 1"),
        ((1, 1), (1.0, 2.0), (1.0, 2.0), "must ascend from at least 1"),
        ((0, 1), (1.0, 2.0), (1.0, 2.0), "must ascend from at least 1"),
        ((1, 2), (1.0, 0.0), (1.0, 2.0), "finite and above 0"),
        ((1, 2), (1.0, 2.0), (1.0, float("inf")), "finite and above 0"),
        ((1, 2), (float("nan"), 2.0), (1.0, 2.0), "finite and above 0"),
    ],
)
def test_a_profile_that_is_none_is_refused(rows, latency, tail, told):
    with pytest.raises(ValueError, match=told):
        Profile(rows=rows, latency_ms=latency, tail_ms=tail)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: CacheConfig(memory_mb=0), "memory_mb=0 must be a finite number above 0"),
        (lambda: CacheConfig(memory_mb=float("nan")), "memory_mb=nan must be a finite number"),
        (lambda: CacheConfig(centroids=0), "centroids=0 must be at least 1"),
        (lambda: Device(name="cpu", slots=0), "device cpu: slots=0 must be at least 1"),
        (lambda: path("p", threads=0), "path p: threads=0 must be at least 1"),
        (lambda: path("p", ne=float("nan")), "path p: accuracy, auc and ne must be finite"),
        (lambda: PathSet(devices=(), paths=()), "needs at least one path"),
        (lambda: path_set(path("p"), path("p")), "two paths have one name: p, p"),
        (lambda: path_set(path("p", device="cuda:0")), "path p is on cuda:0, which is none of cpu"),
        (lambda: path_set(path("p", threads=3)), "path p takes 3 threads, but cpu has 2 slots"),
    ],
)
def test_values_that_do_not_fit_are_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_less_entropy_is_better_and_a_missing_name_is_told():
    paths = path_set(path("a"), path("b", accuracy=0.5))
    assert paths.path("a").quality("ne") > paths.path("b").quality("ne")
    assert paths.path("a").quality("accuracy") == 0.75
    with pytest.raises(ValueError, match="there is no path 'c', only a, b"):
        paths.path("c")


def test_a_file_gives_back_what_was_written_with_places_made_absolute(tmp_path):
    cached = path(
        "cached",
        cache=CacheConfig(levels="both", memory_mb=2.5, centroids=16, space="encoder"),
        cache_bytes=7,
        cache_file="cached.safetensors",
        notes={"batches": [1, 2, 3]},
    )
    absolute = path("absolute", snapshot="/elsewhere/s", cache_file="/elsewhere/c")
    written = path_set(cached, absolute, dropped=((path("gone"), "too slow"),), notes={"made": "today"})
    file = tmp_path / "paths.json"
    write_paths(written, file)
    assert [p.name for p in tmp_path.iterdir()] == ["paths.json"]
    home = str(tmp_path / "snapshots/a")
    assert read_paths(file) == dataclasses.replace(
        written,
        paths=(
            dataclasses.replace(cached, snapshot=home, cache_file=str(tmp_path / "cached.safetensors")),
            absolute,
        ),
        dropped=((dataclasses.replace(path("gone"), snapshot=home), "too slow"),),
    )


def test_what_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "paths.json"
    write_paths(path_set(), file)
    before = file.read_bytes()
    for bad in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_paths(path_set(notes=bad), file)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["paths.json"]


def damaged(values, *keys, value=None):
    """``values`` with what stands at ``keys`` replaced, or taken out where ``value`` is None."""
    place = values
    for key in keys[:-1]:
        place = place[key]
    if value is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    return values


@pytest.mark.parametrize(
    ("keys", "value", "told"),
    [
        (("format",), None, "holds no paths"),
        (("format",), "tightrec snapshot", "holds no paths"),
        (("format_version",), 99, "has format version 99; 1 is known here"),
        (("devices",), None, "no 'devices'"),
        (("paths",), [], "needs at least one path"),
        (("paths",), "x", "does not describe paths"),
        (("paths", 0, "profile"), None, "no 'profile'"),
        (("paths", 0, "profile", "rows"), [1, 2], "one latency and one tail"),
        (("paths", 0, "profile", "latency_ms"), ["a", "b", "c"], "does not describe paths"),
        (("paths", 0, "threads"), 5, "takes 5 threads"),
        (("paths", 0, "device"), "cuda:7", "on cuda:7"),
        (("paths", 0, "cache"), {"levels": "none", "size": 3}, "does not describe paths"),
        (("paths", 0, "snapshot"), 3, "does not describe paths"),
        (("paths", 0, "extra"), 3, "does not describe paths"),
        (("devices", 0, "slots"), 0, "slots=0"),
        (("dropped",), [["a"]], "does not describe paths"),
        (("more",), 1, "does not describe paths"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, keys, value, told):
    file = tmp_path / "paths.json"
    write_paths(path_set(), file)
    file.write_text(json.dumps(damaged(json.loads(file.read_text()), *keys, value=value)))
    with pytest.raises(ValueError, match=told) as error:
        read_paths(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'"x"'])
def test_a_file_that_is_no_object_is_refused_by_name(tmp_path, text):
    file = tmp_path / "paths.json"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=r"paths\.json (cannot be read as JSON|holds no paths)"):
        read_paths(file)


def test_no_file_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match=r"Make it with `python -m tightrec\.serving explore`"):
        read_paths(tmp_path / "none.json")


def test_a_profile_says_which_sizes_it_has():
    assert profile(1.0, 2.0, 3.0).expected_ms(128) == 2.0
