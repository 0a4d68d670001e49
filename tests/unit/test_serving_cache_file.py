"""The file of a cache: taken as it is, or built anew when the snapshot, the settings or its bytes changed."""

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_made import frequencies, made_hashed

from tightrec.serving.caching import cache
from tightrec.serving.caching.cache import attach
from tightrec.serving.caching.cache_file import Unusable, read, write
from tightrec.serving.paths import CacheConfig

CONFIG = CacheConfig(levels="both", memory_mb=0.01, centroids=16, pieces=1)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each time that something is built: its ``warm``."""
    made: list[Any] = []
    build = cache.build

    def watched(hashed: Any, config: Any, warm: Any) -> Any:
        made.append(warm)
        return build(hashed, config, warm)

    monkeypatch.setattr(cache, "build", watched)
    return made


def found(hashed: Any, **settings: Any) -> torch.Tensor:
    caches = attach(hashed, **{"config": CONFIG, "fingerprint": "a", **settings})
    ids = torch.arange(1000)
    return caches.together(ids, torch.full_like(ids, 2))


def test_a_second_start_reads_what_the_first_built(tmp_path: Path, builds: list[Any]) -> None:
    file = tmp_path / "cache.safetensors"
    warm = frequencies(made_hashed())
    first = found(made_hashed(), cache_file=file, warm=warm)
    again = found(made_hashed(), cache_file=file)
    same = found(made_hashed(), cache_file=file, warm=warm)
    assert len(builds) == 1
    assert torch.equal(first, again) and torch.equal(first, same)
    assert os.listdir(tmp_path) == [file.name]


def test_another_snapshot_invalidates_the_cache(tmp_path: Path, builds: list[Any]) -> None:
    file = tmp_path / "cache.safetensors"
    before = found(made_hashed(0), cache_file=file)
    after = found(made_hashed(1), cache_file=file, fingerprint="b")
    assert len(builds) == 2
    assert torch.equal(after, found(made_hashed(1), cache_file=None, fingerprint="b"))
    assert not torch.equal(before, after)


def test_frequencies_outlive_the_snapshot(tmp_path: Path, builds: list[Any]) -> None:
    file = tmp_path / "cache.safetensors"
    warm = [(torch.arange(3), torch.tensor([9, 8, 7])) for _ in range(3)]
    found(made_hashed(0), cache_file=file, warm=warm)
    for fingerprint in "bc":
        after = found(made_hashed(1), cache_file=file, fingerprint=fingerprint)
        assert torch.equal(after[:3], made_hashed(1).compute(2, torch.arange(3)))
        kept = [(ids.tolist(), times.tolist()) for ids, times in builds[-1]]
        assert kept == [([0, 1, 2], [9, 8, 7])] * 3
    assert len(builds) == 3


@pytest.mark.parametrize(
    "changed",
    [{"centroids": 17}, {"space": "encoder"}, {"memory_mb": 0.02}, {"levels": "decoder"}, {"pieces": 2}],
)
def test_other_settings_invalidate_the_cache(
    tmp_path: Path, builds: list[Any], caplog: pytest.LogCaptureFixture, changed: dict[str, Any]
) -> None:
    file = tmp_path / "cache.safetensors"
    caplog.set_level(logging.INFO)
    found(made_hashed(), cache_file=file)
    config = CacheConfig(**{"levels": "both", "memory_mb": 0.01, "centroids": 16, "pieces": 1, **changed})
    found(made_hashed(), cache_file=file, config=config)
    found(made_hashed(), cache_file=file, config=config)
    assert len(builds) == 2
    assert "its config changed" in caplog.text


def test_other_columns_and_frequencies_invalidate_the_cache(tmp_path: Path, builds: list[Any]) -> None:
    file = tmp_path / "cache.safetensors"
    found(made_hashed(), cache_file=file)
    warm = frequencies(made_hashed())
    found(made_hashed(), cache_file=file, warm=warm)
    found(made_hashed(columns=(("a", 7), ("b", 30), ("c", 1000))), cache_file=file)
    assert [one is None for one in builds] == [True, False, True]


def test_a_damaged_file_is_built_anew(
    tmp_path: Path, builds: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "cache.safetensors"
    caplog.set_level(logging.INFO)
    wanted = found(made_hashed(), cache_file=file)
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[-100] ^= 1
    for number, damaged in enumerate([b"", good[:100], good[:-8], bytes(flipped), b"{}" + good], 2):
        file.write_bytes(damaged)
        assert torch.equal(found(made_hashed(), cache_file=file), wanted)
        assert len(builds) == number
        assert file.read_bytes() == good
    assert "SHA-256 differs" in caplog.text and "cannot be read" in caplog.text


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found(made_hashed(), cache_file=tmp_path / "absent" / "cache.safetensors")
    assert "could not be written" in caplog.text
    folder = tmp_path / "cache.safetensors"
    folder.mkdir()
    found(made_hashed(), cache_file=folder)
    assert os.listdir(tmp_path) == [folder.name]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    tensors = {"a": torch.arange(5), "b": torch.zeros(0, 3), "c": torch.ones(2, 2).t().to(torch.int16)}
    write(file, tensors, {"word": "value"})
    back, values = read(file)
    assert values["word"] == "value" and back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_a_file_of_another_kind_is_unusable(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(Unusable, match="another format"):
        read(file)
    with pytest.raises(Unusable, match="there is no"):
        read(tmp_path / "absent")


def test_a_file_built_from_stored_frequencies_is_not_taken_for_one_of_all(
    tmp_path: Path, builds: list[Any]
) -> None:
    file = tmp_path / "cache.safetensors"
    warm = frequencies(made_hashed())
    found(made_hashed(), cache_file=file, warm=warm)
    # The file has the hottest ids alone.
    found(made_hashed(), cache_file=file, fingerprint="b")
    assert sum(len(ids) for ids, _ in builds[1]) < sum(len(ids) for ids, _ in warm)
    found(made_hashed(), cache_file=file, fingerprint="b")
    assert len(builds) == 2
    found(made_hashed(), cache_file=file, fingerprint="b", warm=warm)
    assert len(builds) == 3


def test_who_does_not_keep_leaves_a_file_of_another_snapshot(tmp_path: Path, builds: list[Any]) -> None:
    file = tmp_path / "cache.safetensors"
    found(made_hashed(), cache_file=file, keep=False)  # there was none: it is written
    before = file.read_bytes()
    after = found(made_hashed(1), cache_file=file, fingerprint="b", keep=False)
    assert torch.equal(after, found(made_hashed(1), cache_file=None, fingerprint="b"))
    assert file.read_bytes() == before and len(builds) == 3


def test_of_several_that_start_together_one_builds(tmp_path: Path, builds: list[Any]) -> None:
    file = tmp_path / "cache.safetensors"
    wanted = found(made_hashed(), cache_file=None)
    begin = threading.Barrier(3)
    # Made one after the other: their weights come from torch's one generator.
    snapshots = [made_hashed() for _ in range(3)]

    def start(hashed: Any) -> torch.Tensor:
        begin.wait()
        return found(hashed, cache_file=file)

    with ThreadPoolExecutor(3) as threads:
        for one in [threads.submit(start, hashed) for hashed in snapshots]:
            assert torch.equal(one.result(60), wanted)
    assert len(builds) == 2 and os.listdir(tmp_path) == [file.name]


def test_a_file_has_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "some.safetensors", {"a": torch.zeros(1)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "some.safetensors").stat().st_mode & 0o777 == 0o640
