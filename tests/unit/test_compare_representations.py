"""Comparing representations: which runs with which words, the table of sizes, and no false cautions."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from compare_run import finished_run

from tightrec.trainer.compare.ab import run_all
from tightrec.trainer.compare.cautions import cautions
from tightrec.trainer.compare.groups import grouped
from tightrec.trainer.compare.runs import read_runs
from tightrec.trainer.compare.tables import tables
from tightrec.trainer.config import JobConfig, load
from tightrec.trainer.model_size import ModelSize
from tightrec.trainer.report.html import render
from tightrec.trainer.report.records import finite

WORDS = ["ab.representations=[table,hybrid]", "ab.seeds=[3,1]", "model.embedding_dim=8"]
SIZES = {
    "table": ModelSize(
        features={"table": 4, "dhe": 0, "hybrid": 0},
        table_parameters=3000,
        dhe_parameters=0,
        dense_parameters=50,
    ),
    "hybrid": ModelSize(
        features={"table": 1, "dhe": 2, "hybrid": 1},
        table_parameters=2000,
        dhe_parameters=400,
        dense_parameters=70,
    ),
}


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that a job of one rank sets for itself go away with the test."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def compared(folder: Path, *more: str, one: Any = None) -> int:
    words = [*WORDS, *more, f"run_folder={folder}"]
    config, _ = load(words)
    return run_all(dataclasses.replace(config, run_folder=str(folder)), words, one)


def test_each_representation_is_run_with_each_seed_and_the_given_codec(tmp_path: Path, capsys) -> None:
    seen: list[tuple[JobConfig, list[str]]] = []

    def one(config: JobConfig, plain: dict[str, Any], words: list[str]) -> int:
        seen.append((config, words))
        kind = config.model.representation.kind
        facts = {"config": finite(plain), "world": 1, "size": SIZES[kind].to_json()}
        finished_run(Path(config.run_folder or ""), config.seed, 0.8, steps=(), **facts)
        return 0

    assert compared(tmp_path, "codec=fp16", one=one) == 0
    assert [Path(str(config.run_folder)).name for config, _ in seen] == [
        *("table_3", "hybrid_3", "table_1", "hybrid_1")
    ]
    assert [config.model.representation.kind for config, _ in seen] == ["table", "hybrid"] * 2
    assert {config.codec.forward for config, _ in seen} == {"fp16"}
    # What a run records about itself makes that one run again.
    assert load(seen[1][1])[0] == seen[1][0]
    told = capsys.readouterr().out
    assert "Representations" in told
    assert "do not compare" not in told


def test_words_that_the_job_sets_itself_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"representation=dhe does not go with ab\.representations"):
        compared(tmp_path, "representation=dhe")
    with pytest.raises(ValueError, match=r"ab\.representations and ab\.seeds make a single run"):
        compared(tmp_path, "ab.representations=[dhe]", "ab.seeds=[1]")


def test_a_representation_that_does_not_exist_is_told_before_the_first_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="deep") as error:
        compared(tmp_path, "ab.representations=[table,deep]")
    assert error.value.__notes__ == ["(in the run deep of ab.representations)"]


def test_the_table_tells_scores_sizes_and_speed(tmp_path: Path) -> None:
    for kind, size in SIZES.items():
        for seed in (0, 1):
            settings = {"model": {"embedding_dim": 16, "representation": {"kind": kind}}}
            finished_run(tmp_path / f"{kind}_{seed}", seed, 0.8 - seed / 100, settings, size=size.to_json())
    groups = grouped(read_runs([tmp_path / f"{kind}_{seed}" for kind in SIZES for seed in (0, 1)]))
    (grid,) = [grid for grid in tables(groups) if grid.title == "Representations"]
    cells = dict(zip(grid.headings, grid.rows[1], strict=True))
    assert cells["run"] == "hybrid"
    assert cells["table / dhe / hybrid"] == "1 / 2 / 1"
    assert [cells[name] for name in ("table parameters", "dhe parameters", "parameters")] == [
        *("2,000", "400", "2,470")
    ]
    assert cells["bytes"] == "9.9 kB"
    assert cells["test NE"].startswith("0.795")
    assert cells["rows/s"].startswith("1,000")
    # A difference that is the subject is none to be warned of; one of another setting of the model is.
    assert cautions(groups) == []
    finished_run(tmp_path / "wide_0", 0, 0.8, {"model.embedding_dim": 32})
    told = cautions(grouped(read_runs([tmp_path / "table_0", tmp_path / "wide_0"])))
    assert any("model.embedding_dim 32, there 16" in caution for caution in told)


def test_models_of_one_size_have_no_such_table(tmp_path: Path) -> None:
    for codec in ("plain", "lossy"):
        settings = {"codec.forward": codec}
        finished_run(tmp_path / f"{codec}_0", 0, 0.8, settings, size=SIZES["table"].to_json())
    groups = grouped(read_runs([tmp_path / "plain_0", tmp_path / "lossy_0"]))
    assert "Representations" not in [grid.title for grid in tables(groups)]


def test_a_size_in_words() -> None:
    told = SIZES["hybrid"].words()
    assert told == (
        "features: 1 table, 2 deep hash embedding, 1 both (hybrid); 2,470 parameters, 9.9 kB, of which deep "
        "hash embeddings 400, 1.6 kB, on every rank"
    )
    assert SIZES["table"].words() == "features: 4 table; 3,050 parameters, 12.2 kB"


def test_the_report_tells_the_size_and_pages_of_old_runs_are_made_without() -> None:
    page = render({"size": SIZES["hybrid"].to_json()}, [], "x")
    assert "2,470 parameters, 9.9 kB; features: table 1, dhe 2, hybrid 1" in page
    assert "parameters" not in render({}, [], "x")
