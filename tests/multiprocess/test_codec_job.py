"""Whole jobs with the compressed exchange: records add up, a budget is followed, mistakes are told."""

from pathlib import Path
from typing import Any

import pytest
from jobs import SMALL, records, run_job
from ranks import run_ranks

from tightrec.formats import checkpoint_files as files
from tightrec.trainer.config import load

pytestmark = pytest.mark.multiprocess

LOSSLESS_BATCHES = ["data.synthetic.valid_rows=0", "data.synthetic.test_rows=0", "train.test=false"]
MIXED = ["sharding=table_wise", "sharding.tables={t_C1: row_wise, t_C2: row_wise, t_C3: column_wise}"]
LOOKING = ["codec.stats_every=1", "codec.shadow_every=1"]
BUDGET = [
    "train.epochs=2",
    *("codec=budget", "codec.budget_ne=0.01", "codec.stats_every=1", "codec.bound.probe_every=2"),
    *("codec.bound.probe_tables=80", "codec.bound.probe_needed=1", "train.eval_every=3"),
]


def _jobs(rank: int, world: int, jobs: list[tuple[Path, list[str]]]) -> None:
    """Several jobs in the same processes, to save their start."""
    for folder, words in jobs:
        resumed = [f"resume={folder}"] if (folder / "checkpoints").is_dir() else [f"run_folder={folder}"]
        run_job(rank, world, [*SMALL, *LOSSLESS_BATCHES, *words, *resumed])


def _run(world: int, *jobs: tuple[Path, list[str]]) -> None:
    run_ranks(world, _jobs, list(jobs), connect=False, timeout=200)


def _codec(folder: Path, direction: str) -> list[dict[str, Any]]:
    return [record for record in records(folder, "codec") if record["direction"] == direction]


def _traffic(folder: Path, direction: str) -> dict[int, float]:
    return {record["step"]: record[f"{direction}_bytes"] for record in records(folder)}


def _bounds(record: dict[str, Any]) -> dict[str, str]:
    return {table: found["bound"] for table, found in record["tables"].items()}


def test_codec_records_add_up_to_the_traffic_and_compare_with_what_plain_torchrec_sends(tmp_path: Path):
    words = [*MIXED, "train.steps=3"]
    lossy = [*words, "codec=lossy", *LOOKING]
    _run(
        2,
        (tmp_path / "plain", [*words, "codec=none", "codec.dedup=false"]),
        (tmp_path / "lossy", lossy),
        (tmp_path / "sum", [*lossy, "sharding=row_wise", "sharding.tables={}", "codec.stats_every=2"]),
    )
    for direction in ("forward", "backward"):
        plain, sent = _traffic(tmp_path / "plain", direction), _traffic(tmp_path / "lossy", direction)
        found = _codec(tmp_path / "lossy", direction)
        assert [record["step"] for record in found] == [1, 2, 3]
        for record in found:
            assert record["plain_bytes"] == plain[record["step"]]
            assert record["sent_bytes"] == sent[record["step"]] < plain[record["step"]]
            tables = record["tables"].values()
            assert len(tables) == 26
            # Three types of sharding, each tells one size to one peer from two ranks.
            sizes = 8 * 3 * 2
            assert sum(table["sent_bytes"] for table in tables) + sizes == pytest.approx(sent[record["step"]])
            assert sum(table["plain_bytes"] for table in tables) == record["plain_bytes"]
            assert all(0 < table["distinct"] <= table["rows"] for table in tables)
            assert sum(table["distinct"] for table in tables) < 0.9 * sum(table["rows"] for table in tables)
            assert all(record[f"{part}_ms"] > 0 for part in ("encode", "exchange", "decode"))
        summed = _codec(tmp_path / "sum", direction)
        # Steps 1 and 3 are looked into; errors are in every step.
        assert [len(record["tables"]) for record in summed] == [26, 0, 26]
        for record in (*found, summed[0], summed[2]):
            worst = [table["error_over_bound"] for table in record["tables"].values()]
            # The last bit of float32 aside, and there are errors at all.
            assert 0.5 < max(worst) <= 1.0, direction


def test_a_budget_moves_all_bounds_and_outlives_checkpoints_on_other_numbers_of_ranks(tmp_path: Path):
    folder = tmp_path / "job"
    _run(2, (folder, [*BUDGET, "train.steps=9"]))
    probes = records(folder, "probe")
    assert [record["step"] for record in probes] == [3, 5, 7, 9]
    assert all(record["budget"] == 0.01 and record["total_dne"] is not None for record in probes)
    last = _bounds(probes[-1])
    assert len(last) == 26 and "range:0.03" not in last.values()
    assert probes[-1]["tables"]["t_C1"]["dne"] is not None
    # A generous budget for so small a model: bounds go up, by no more than a quarter in each probe.
    shares = {table: float(word.partition(":")[2]) for table, word in last.items()}
    assert sum(share > 0.03 for share in shares.values()) > 13
    assert max(shares.values()) <= 0.1
    # On one rank nothing is exchanged and no probe is due in this step; then on two again, and on four.
    for steps, world in ((10, 1), (11, 2)):
        _run(world, (folder, [*BUDGET, "codec.bound.probe_every=1000", f"train.steps={steps}"]))
    forward = _codec(folder, "forward")[-1]
    assert forward["step"] == 11 and _bounds(forward) == last
    assert forward["multiplier"] == pytest.approx(probes[-1]["multiplier"])
    _strip_exchange(folder)
    _run(4, (folder, [*BUDGET, "train.steps=12"]))
    fresh = _codec(folder, "forward")[-1]
    assert fresh["step"] == 12 and set(_bounds(fresh).values()) == {"range:0.03"}, "an old checkpoint"


def _strip_exchange(folder: Path) -> None:
    """Make the newest checkpoint one of a release that kept nothing of the exchange."""
    checkpoints = folder / "checkpoints"
    newest = files.find_checkpoints(checkpoints)[-1]
    manifest = files.read_manifest(newest)
    assert manifest.extra.pop("exchange")["bounds"]["tables"]
    newest.rename(files.partial_of(checkpoints, manifest.step))
    files.publish(checkpoints, manifest)


def test_sc24_classes_by_rows_falls_by_steps_and_chooses_dedup_or_entropy(tmp_path: Path):
    words = [
        *("codec=sc24", "codec.stats_every=1", "codec.bound.schedule=step", "codec.bound.steps=20"),
        *("codec.bound.loose_rows=10", "codec.bound.tight_rows=40", "train.steps=24", "train.epochs=2"),
        *("sharding=table_wise", "data.synthetic.train_rows=1536"),
    ]
    plain = [*words[8:], "codec=none", "codec.dedup=false", "train.steps=1"]
    _run(2, (tmp_path / "sc24", words), (tmp_path / "plain", plain))
    forward = _codec(tmp_path / "sc24", "forward")
    assert len(forward) == 24
    first, final = forward[0], forward[-1]
    assert (first["multiplier"], final["multiplier"]) == (2.0, 1.0)
    (choice,) = records(tmp_path / "sc24", "choice")
    assert choice["direction"] == "forward" and len(choice["tables"]) == 26
    assert {table["mode"] for table in choice["tables"].values()} <= {"dedup", "entropy"}
    assert all("published" in table["reason"] for table in choice["tables"].values())
    # What was asked for; a block that it would make larger falls back.
    fallback = {"packed", "raw"}
    for name, table in final["tables"].items():
        wanted = {"dedup": {"dedup"}, "entropy": {"entropy", "dedup", "dedup_entropy"}}
        assert table["mode"] in wanted[choice["tables"][name]["mode"]] | fallback, name
    assert set(_bounds(final).values()) == {"range:0.01", "range:0.03", "range:0.05"}
    assert set(_bounds(first).values()) == {"range:0.02", "range:0.06", "range:0.1"}
    # Backward as plain torchrec.
    assert not _codec(tmp_path / "sc24", "backward")
    assert set(_traffic(tmp_path / "sc24", "backward").values()) == set(
        _traffic(tmp_path / "plain", "backward").values()
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["codec=lossy", "codec.budget_ne=0"], r"codec\.budget_ne=0(\.0)? must be above 0"),
        (["codec=none", "codec.budget_ne=0.1"], "codec.forward=none has none"),
        (["codec=lossy", "codec.bound.forward=3%"], "codec.bound.forward=3% is no bound"),
        (["codec=lossy", "codec.bound.backward=range:0.9"], "at most 0.5 of the range"),
        (["codec=lossy", "codec.bound.tables={t_C1: {forward: rms}}"], "codec.bound.tables.t_C1.forward=rms"),
    ],
)
def test_mistakes_in_bounds_are_told_before_anything_starts(words: list[str], told: str):
    with pytest.raises(ValueError, match=told):
        load(words)


def _refused(rank: int, world: int, folder: Path, all_words: list[list[str]]) -> list[str]:
    told = []
    for words in all_words:
        with pytest.raises(ValueError, match="codec") as error:
            run_job(rank, world, [*SMALL, f"run_folder={folder}", "codec=lossy", *words])
        told.append(str(error.value))
    return told


def test_bounds_that_do_not_fit_the_tables_or_the_schedule_are_told(tmp_path: Path):
    words = [["codec.bound.tables={t_C99: {forward: range:0.01}}"], ["codec.bound.schedule=feedback"]]
    pattern, schedule = run_ranks(1, _refused, tmp_path, words, connect=False)[0]
    assert "codec.bound.tables.t_C99 matches no table. The tables are: t_C1, t_C10" in pattern
    assert "codec.budget_ne, which is not set" in schedule
