"""The proof's tables: which runs are made in which order, what their bytes and differences come to."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import guards
import pytest
from compare_run import finished_run

from tightrec.trainer.report.records import RecordFile

BENCHMARKS = guards.ROOT / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The modules by name; benchmarks/ is no package."""
    sys.path.insert(0, str(BENCHMARKS))
    yield lambda name: importlib.import_module(f"exchange_{name}")
    sys.path.remove(str(BENCHMARKS))


def run_of(folder: Path, seed: int, ne: float, windows: dict[int, float]) -> Path:
    """A finished run that sent ``windows``: forward bytes a step by the step at which a window ends."""
    finished_run(folder, seed, ne, steps=())
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    records = RecordFile(folder)
    for step, sent in windows.items():
        records.write({"kind": "train", "step": step, "forward_bytes": sent, "backward_bytes": sent / 2})
    records.close()
    return folder


def test_plain_and_lossy_come_first_for_every_seed(scripts: Any) -> None:
    quality = scripts("quality")
    planned = quality.plan(["movielens", "jester"], quality.WAYS, [0, 1])
    first = [(one.variant, one.data, one.seed) for one in planned[:8]]
    assert {name for name, _, _ in first} == {"plain", "lossy"}
    assert [seed for _, _, seed in first] == [0] * 4 + [1] * 4
    assert len({one.folder(Path()) for one in planned}) == 2 * 2 * len(quality.WAYS)


def test_the_published_decay_is_shortened_to_a_fifth_of_the_data_sets_epoch(scripts: Any) -> None:
    quality = scripts("quality")
    words = {one.data: one.words for one in quality.plan(["movielens", "jester"], quality.WAYS, [0])}
    assert not any(
        "steps" in word for one in quality.plan(["jester"], {"lossy": ()}, [0]) for word in one.words
    )
    assert "codec.bound.steps=78" in words["movielens"]
    assert "codec.bound.steps=122" in words["jester"]


def test_bytes_are_those_of_whole_windows_at_the_end_by_their_steps(scripts: Any, tmp_path: Path) -> None:
    runs = scripts("runs")
    one = runs.Planned(data="jester", variant="lossy", words=(), seed=0)
    run_of(one.folder(tmp_path), 0, 0.8, {20: 900.0, 40: 300.0, 50: 600.0})
    run = runs.made([one], tmp_path)["jester", "lossy", 0]
    assert runs.sent(run, "forward", last=30) == 400.0
    assert runs.sent(run, "backward", last=10) == 300.0
    with pytest.raises(ValueError, match="Take --last higher"):
        runs.sent(run, "forward", last=9)


def test_runs_that_did_not_finish_are_made_again(scripts: Any, tmp_path: Path, monkeypatch: Any) -> None:
    runs = scripts("runs")
    planned = [runs.Planned(data="jester", variant="lossy", words=(), seed=seed) for seed in (0, 1, 2)]
    finished_run(planned[0].folder(tmp_path), 0, 0.8)
    finished_run(planned[1].folder(tmp_path), 1, 0.8, status="stopped")
    words: list[list[str]] = []

    def trained(_config: Any, _plain: Any, given: list[str]) -> None:
        words.append(given)
        folder = Path(next(w for w in given if w.startswith("run_folder=")).partition("=")[2])
        (folder / "run.json").unlink(missing_ok=True)
        folder.parent.mkdir(exist_ok=True)
        if folder.name != "lossy_2":
            (folder / "metrics.jsonl").unlink(missing_ok=True)
            folder.rmdir()
            finished_run(folder, 1, 0.8)

    monkeypatch.setattr(runs, "run", trained)
    monkeypatch.setattr(runs, "load", lambda given: (None, {}))
    with pytest.raises(RuntimeError, match="lossy_2 was stopped"):
        runs.make(planned, tmp_path, Path("prepared"), ["train.steps=3"])
    assert [[w for w in given if w.startswith("seed=")] for given in words] == [["seed=1"], ["seed=2"]]
    assert {"data.path=prepared/jester", "experiment=ab_jester", "train.steps=3"} <= set(words[0])


def test_a_way_of_sending_has_a_name_that_a_folder_can_have(scripts: Any) -> None:
    named_words = scripts("runs").named_words
    assert named_words("tight: codec=lossy a=range:0.02") == ("tight", ("codec=lossy", "a=range:0.02"))
    for wrong in ("lossy", "codec=lossy", "../up: codec=lossy"):
        with pytest.raises(ValueError, match="names no way of sending"):
            named_words(wrong)


def test_a_difference_is_of_equal_seeds_and_judged_by_plains_spread(scripts: Any, tmp_path: Path) -> None:
    quality, runs = scripts("quality"), scripts("runs")
    ways: dict[str, tuple[str, ...]] = {"plain": (), "lossy": (), "int8": ()}
    planned = quality.plan(["jester"], ways, [0, 1, 2])
    # The spread of 0.8, 0.9 and 1.0 is 0.1; lossy misses one seed.
    nes = {"plain": (0.8, 0.9, 1.0), "lossy": (0.83, 0.93), "int8": (0.84, 0.94, 1.04)}
    for one in planned:
        if one.seed < len(nes[one.variant]):
            sent = 600.0 if one.variant == "plain" else 100.0
            run_of(one.folder(tmp_path), one.seed, nes[one.variant][one.seed], {20: sent})
    rows = quality.table(runs.made(planned, tmp_path), "jester", list(ways), last=20).splitlines()[2:]
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}
    assert cells["plain"][3:] == ["-", "-", "-", "1.0x", "1.0x"]
    assert cells["lossy"] == [
        *("2", "0.6200 ± 0.0707", "0.8800 ± 0.0707", "+0.03000 ± 0.00000", "+0.30", "yes", "6.0x", "6.0x")
    ]
    assert cells["int8"][3:6] == ["+0.04000 ± 0.00000", "+0.40", "no"]


def test_a_ratio_is_of_the_plain_run_on_the_same_data(scripts: Any, tmp_path: Path) -> None:
    bytes_, runs = scripts("bytes"), scripts("runs")
    planned = [
        runs.Planned(data="movielens", variant=name, words=(), seed=0)
        for name in ("plain", "lossy", "packed")
    ]
    for one, sent in zip(planned, (4200.0, 200.0, 210.0), strict=True):
        run_of(one.folder(tmp_path), 0, 0.8, {20: sent})
    other = runs.Planned(data="jester", variant="lossy", words=(), seed=0)
    run_of(other.folder(tmp_path), 0, 0.8, {20: 1.0})
    found = runs.made([*planned, other], tmp_path)
    lossy, packed = bytes_.totals(found, ["lossy", "packed"], 0, last=20).splitlines()[2:]
    assert "21.0x | reached" in lossy
    assert lossy.count("reached") == 2
    assert packed.count("20.0x | reached") == 1
    assert packed.count("20.0x | missed") == 1


def test_tables_are_means_of_the_last_samples(scripts: Any, tmp_path: Path) -> None:
    runs, bytes_ = scripts("runs"), scripts("bytes")
    one = runs.Planned(data="jester", variant="lossy", words=(), seed=0)
    run_of(one.folder(tmp_path), 0, 0.8, {20: 1.0})
    records = RecordFile(one.folder(tmp_path))
    common = {"rows": 10, "plain_bytes": 1200.0, "bound": "range:0.03", "mode": "entropy"}
    for step, sent in ((20, 1000.0), (40, 100.0), (60, 200.0)):
        tables = {
            "t_big": {**common, "distinct": step / 10, "sent_bytes": sent},
            "t_low": {**common, "distinct": 1, "sent_bytes": 50.0},
        }
        records.write({"kind": "codec", "step": step, "direction": "forward", "tables": tables})
    records.write({"kind": "codec", "step": 80, "direction": "forward", "tables": {}})
    records.close()
    run = runs.made([one], tmp_path)["jester", "lossy", 0]
    big, low = bytes_.by_table(run, "forward", last=60).splitlines()[2:]
    assert big == "| t_big | 10 | 5 | 150 | 8.0x | range:0.03 | entropy |"
    assert low.startswith("| t_low | 10 | 1 | 50 | 24.0x |")
    assert bytes_.by_table(run, "backward", last=60).splitlines()[2:] == []
