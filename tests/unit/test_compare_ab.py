"""Many runs in one job: what is run with which words, what is left out, and how it stops and goes on."""

import dataclasses
import signal
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from compare_run import finished_run

from tightrec.trainer.compare.ab import run_all
from tightrec.trainer.compare.config import AbConfig
from tightrec.trainer.config import JobConfig, load
from tightrec.trainer.report.records import finite, read_run, write_run

WORDS = ["ab.codecs=[plain,fp16]", "ab.seeds=[3,1]", "model.embedding_dim=8"]


@cache
def once(*words: str) -> tuple[JobConfig, dict[str, Any]]:
    """Composing takes half a second: the tests share it."""
    return load(words)


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that a job of one rank sets for itself go away with the test."""
    monkeypatch.setattr("tightrec.trainer.compare.ab.load", lambda words: once(*words))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


class Runs:
    """Stands for the training of a run: writes a finished run's folder, after ``before`` has been called."""

    def __init__(self, before: Callable[[JobConfig], str | None] = lambda config: None) -> None:
        self.before = before
        self.made: list[str] = []
        self.words: list[Sequence[str]] = []

    def __call__(self, config: JobConfig, plain: dict[str, Any], words: Sequence[str]) -> int:
        folder = Path(config.run_folder or "")
        self.made.append(folder.name)
        self.words.append(words)
        status = self.before(config) or "finished"
        facts = {"config": finite(plain), "world": 1, "status": status}
        if (folder / "run.json").is_file():
            write_run(folder, {"started": "later", **facts})
        else:
            finished_run(folder, config.seed, 0.8, steps=(), **facts)
        return 0


def ab(folder: Path, runs: Runs, *more: str) -> int:
    config = dataclasses.replace(once(*WORDS, *more)[0], run_folder=str(folder))
    return run_all(config, [*WORDS, *more, f"run_folder={folder}"], runs)


def test_each_codec_is_run_with_each_seed_and_ends_in_the_comparison(tmp_path: Path, capsys) -> None:
    seen: list[JobConfig] = []
    runs = Runs(lambda config: seen.append(config))
    assert ab(tmp_path, runs, "codec.forward=fp16") == 0
    assert runs.made == ["plain_3", "fp16_3", "plain_1", "fp16_1"]
    assert [config.seed for config in seen] == [3, 3, 1, 1]
    assert [config.codec.backward for config in seen] == ["none", "fp16"] * 2
    assert [config.codec.dedup for config in seen] == [False, True] * 2
    assert {(config.model.embedding_dim, config.ab.codecs, config.resume) for config in seen} == {
        (8, (), "auto")
    }
    assert [Path(str(config.run_folder)).parent for config in seen] == [tmp_path] * 4
    assert read_run(tmp_path / "plain_1")["config"]["seed"] == 1
    # What a run records about itself makes that one run again.
    assert load(runs.words[0])[0] == seen[0]
    assert [word for word in runs.words[0] if word.startswith("ab.")] == ["ab.codecs=[]"]
    told = capsys.readouterr().out
    assert "run 2 of 4, fp16_3" in told
    assert f"comparison {tmp_path / 'comparison.html'}" in told
    assert (tmp_path / "comparison.html").read_text().count("plain_3") > 0


def test_what_is_finished_is_left_out_when_the_folder_is_given_again(tmp_path: Path, capsys) -> None:
    ab(tmp_path, Runs())
    (tmp_path / "fp16_3" / "run.json").unlink()
    (tmp_path / "comparison.html").unlink()
    (tmp_path / "fp16_3").rename(tmp_path / "gone")
    again = Runs()
    assert ab(tmp_path, again) == 0
    assert again.made == ["fp16_3"]
    assert "run 1 of 4, plain_3: finished before" in capsys.readouterr().out
    assert (tmp_path / "comparison.html").is_file()


def test_a_run_that_was_stopped_stops_the_job_and_is_gone_on_with(tmp_path: Path, capsys) -> None:
    runs = Runs(lambda config: "stopped" if config.codec.backward == "fp16" else None)
    assert ab(tmp_path, runs) == 0
    assert runs.made == ["plain_3", "fp16_3"]
    assert f"the same words with run_folder={tmp_path} go on" in capsys.readouterr().out
    assert not (tmp_path / "comparison.html").exists()
    again = Runs()
    ab(tmp_path, again)
    assert again.made == ["fp16_3", "plain_1", "fp16_1"]


def test_a_signal_between_two_runs_stops_the_job_too(tmp_path: Path) -> None:
    runs = Runs(lambda config: signal.raise_signal(signal.SIGTERM))
    assert ab(tmp_path, runs) == 0
    assert runs.made == ["plain_3"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_runs_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    ab(tmp_path, Runs(lambda config: "stopped"))
    runs = Runs()
    with pytest.raises(
        ValueError, match=r"plain_3 was begun with other settings \(train.epochs was 1, is 2\)"
    ):
        ab(tmp_path, runs, "train.epochs=2")
    assert runs.made == []
    ab(tmp_path, runs, "logging.every_steps=7")
    assert len(runs.made) == 4


def test_a_failing_run_is_named_with_how_to_go_on(tmp_path: Path) -> None:
    def fail(config: JobConfig) -> None:
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing") as error:
        ab(tmp_path, Runs(fail))
    assert (
        f"in run 1 of 4, plain_3; the same words with run_folder={tmp_path} go on" in error.value.__notes__[0]
    )


def test_a_codec_that_does_not_exist_is_told_before_anything_runs(tmp_path: Path) -> None:
    runs = Runs()
    with pytest.raises(ValueError, match="int7") as error:
        ab(tmp_path, runs, "ab.codecs=[plain,int7]")
    assert "in the run int7 of ab.codecs" in error.value.__notes__[0]
    assert (runs.made, list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("codec=fp16", "ab.codecs names the codecs"),
        ("seed=3", "ab.seeds names the seeds"),
        ("resume=x", "run_folder names the folder"),
        ("train.epochs=2", None),
    ],
)
def test_words_that_the_job_sets_itself_are_refused(tmp_path: Path, word: str, told: str | None) -> None:
    config = dataclasses.replace(once(*WORDS)[0], ab=AbConfig(codecs=("fp16",), seeds=(1,)))
    with pytest.raises(ValueError, match=told or "make a single run"):
        run_all(config, [*WORDS, word], Runs())


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("representation=dhe", "ab.representations names the representations"),
        ("model.representation.kind=dhe", "ab.representations names the representations"),
        ("++model.representation={kind:dhe}", "ab.representations names the representations"),
        ("model.representation.hashes=64", None),
    ],
)
def test_a_comparison_of_representations_takes_no_kind_for_all(
    tmp_path: Path, word: str, told: str | None
) -> None:
    config = dataclasses.replace(once(*WORDS)[0], ab=AbConfig(representations=("table",), seeds=(1,)))
    with pytest.raises(ValueError, match=told or "make a single run"):
        run_all(config, [*WORDS, word], Runs())


def test_a_folder_with_odd_characters_reaches_the_runs(tmp_path: Path) -> None:
    folder = tmp_path / "it's a=b, c"
    runs = Runs()
    ab(folder, runs)
    assert load(runs.words[0])[0].run_folder == str(folder / "plain_3")


def test_without_a_folder_a_new_one_is_made_below_the_jobs_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*WORDS, "name=trial"]
    run_all(once(*words)[0], words, Runs())
    (page,) = tmp_path.glob("runs/trial/*/comparison.html")
    assert page.parent.name.startswith("20")


def test_an_ordinary_job_is_no_comparison() -> None:
    assert load([])[0].ab.codecs == ()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"codecs": ("fp16",), "seeds": ()}, "ab.seeds is empty"),
        ({"codecs": ("fp16", "fp16")}, "ab.codecs holds fp16 twice"),
        ({"seeds": (1, 1)}, "ab.seeds holds 1 twice"),
        ({"codecs": ("fp16,x=3",)}, "names of the group codec"),
    ],
)
def test_impossible_comparisons_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        AbConfig(**settings)
