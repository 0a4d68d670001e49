"""conf/ composes into a JobConfig, choice by choice; mistakes and idle settings are told."""

import dataclasses
from pathlib import Path

import pytest

from tightrec.trainer import help_text
from tightrec.trainer.config import JobConfig, load, unused_settings, write_record

CHOICES = [(group, choice) for group, choices in help_text.groups().items() for choice in choices]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_of_every_group_composes(group, choice):
    words = [f"{group}={choice}"]
    if (group, choice) == ("data", "parquet"):
        words.append("data.path=somewhere")
    config, plain = load(words)
    assert set(plain) == {field.name for field in dataclasses.fields(JobConfig)}
    if group == "sharding":
        assert config.sharding.type == choice
    if group == "codec":
        # A published scheme and a dial are settings of the lossy one.
        assert config.codec.forward == {"sc24": "lossy", "budget": "lossy"}.get(choice, choice)


def test_the_groups_are_those_of_the_readme():
    assert list(help_text.groups()) == sorted(
        [
            "data",
            "model",
            "representation",
            "sharding",
            "codec",
            "optimizer",
            "schedule",
            "train",
            "logging",
            "debug",
            "experiment",
        ]
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian.epochs=2"], "trian"),
        (["train.epoks=2"], "'train.epoks'. Did you mean 'train.epochs'?"),
        (["train.epochs=two"], "train.epochs"),
        (["train.epochs=0"], "train.epochs=0 must be at least 1"),
        (["codec=int7"], "int7"),
        (["codec.backward=int7"], "codec.backward"),
        (["model.embedding_dim=10"], "multiple of 4"),
        (["data=parquet"], "data.path"),
        (["epochs"], "epochs"),
        (["sharding=row_wise", "sharding.exclude=[data_parallel]"], "sharding.exclude"),
    ],
)
def test_a_mistake_is_a_sentence_that_names_the_word(words, told):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
        load(words)
    assert told in str(error.value)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        (["data.path=x"], ["data.path"]),
        (["data=movielens", "data.synthetic.train_rows=5"], ["data.synthetic.train_rows"]),
        (["model.cross_rank=3"], ["model.cross_rank"]),
        (["model=dcnv2", "model.cross_rank=3"], []),
        (["schedule.end=0.5"], ["schedule.end"]),
        (["optimizer=sgd", "optimizer.tables.eps=0.1"], ["optimizer.tables.eps"]),
        (["sharding.memory_gb=3"], ["sharding.memory_gb"]),
        (["sharding=auto", "sharding.memory_gb=3"], []),
        (["train.epochs=3", "codec=int8", "data.loader.batch_size=7"], []),
        (["data.loader.seed=3"], ["data.loader.seed"]),
        (["data.loader.shuffle=false", "data.loader.shuffle_groups=3"], ["data.loader.shuffle_groups"]),
        (["train.metrics.auc=exact", "train.metrics.bins=300"], ["train.metrics.bins"]),
        (["data.synthetic.multi_hot_mean=2"], ["data.synthetic.multi_hot_mean"]),
    ],
)
def test_settings_that_nothing_reads_are_named(words, idle):
    config, _ = load(words)
    sentences = unused_settings(config, words)
    assert [sentence.split(" is set")[0] for sentence in sentences] == idle
    assert all("None" not in sentence for sentence in sentences)


def test_resume_repeats_the_recorded_words_and_later_words_win(tmp_path: Path):
    words = ["model=dcnv2", "train.epochs=3", "seed=7"]
    _, plain = load(words)
    write_record(tmp_path, plain, words)
    config, _ = load([f"resume={tmp_path}", "train.epochs=5"])
    assert (config.model.architecture, config.seed, config.train.epochs) == ("dcnv2", 7, 5)
    again = [f"resume={tmp_path}", "train.epochs=5"]
    write_record(tmp_path, plain, again)
    assert load([f"resume={tmp_path}"])[0].train.epochs == 5
    checkpoint = tmp_path / "checkpoints" / "step-00000005"
    assert load([f"resume={checkpoint}"])[0].seed == 7


def test_one_table_can_be_sharded_another_way_from_the_command_line():
    for words in (["sharding.tables={t_C1: row_wise}"], ["sharding.tables.t_C1=row_wise"]):
        config, _ = load(words)
        assert (config.sharding.type, config.sharding.tables) == ("table_wise", {"t_C1": "row_wise"})


def test_resume_auto_needs_no_folder_to_be_there_yet():
    assert load(["resume=auto", "run_folder=somewhere"])[0].resume == "auto"
    with pytest.raises(ValueError, match=r"resume=auto needs run_folder"):
        load(["resume=auto"])


def test_resume_of_a_folder_that_is_no_run_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match=r"not the folder of a run"):
        load([f"resume={tmp_path}"])


def test_help_lists_every_setting_with_its_meaning():
    listed = list(help_text.settings(JobConfig))
    assert len(listed) > 60
    missing = [key for key, _, meaning in listed if not meaning]
    assert missing == []
    text = help_text.text()
    assert "codec=auto|bf16|budget|fp16|fp8|int8|lossy|mx4|none|sc24" in text
    assert max(map(len, text.splitlines())) <= 200
