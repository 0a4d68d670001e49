"""The group ``representation``: words, per feature too, mistakes, and settings that nothing reads."""

import pytest

from tightrec.trainer.compare.config import AbConfig
from tightrec.trainer.config import load, unused_settings


def test_a_word_for_all_features_settings_and_single_features_go_together():
    words = [
        "representation=dhe",
        "model.representation.hashes=256",
        "model.representation.decoder=[64,32]",
        "model.representation.features.user=hybrid",
    ]
    config, plain = load(words)
    made = config.model.representation
    assert (made.kind, made.hashes, made.decoder, made.features) == ("dhe", 256, (64, 32), {"user": "hybrid"})
    assert plain["model"]["representation"]["features"] == {"user": "hybrid"}
    assert unused_settings(config, words) == []


def test_features_in_one_word_and_with_another_model():
    config, _ = load(["model=dcnv2", "model.representation.features={C3: dhe, C4: hybrid}"])
    assert config.model.architecture == "dcnv2"
    assert config.model.representation.features == {"C3": "dhe", "C4": "hybrid"}


def test_select_takes_a_number_or_names():
    assert load(["representation=select"])[0].model.representation.select == 5
    assert (
        load(["representation=select", "model.representation.select=2"])[0].model.representation.select == 2
    )
    words = ["representation=select", "model.representation.select=[C3,C4]"]
    assert load(words)[0].model.representation.select == ("C3", "C4")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["representation=deep"], "deep"),
        (["model.representation.hashs=3"], "Did you mean 'model.representation.hashes'?"),
        (["model.representation.features.user=deep"], "model.representation.features.user"),
        (["representation=dhe", "model.representation.hashes=1"], "hashes=1 must be at least 2"),
        (["model.representation.select=many"], "model.representation.select"),
        (["ab.codecs=[plain,fp16]", "ab.representations=[table]"], "varies one thing"),
        (["ab.representations=[table,table]"], "ab.representations holds table twice"),
        (["ab.representations=[a/b]"], "ab.representations holds 'a/b'"),
        (["ab.representations=[table]", "ab.seeds=[]"], "ab.seeds is empty"),
    ],
)
def test_a_mistake_is_a_sentence_that_names_the_word(words, told):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
        load(words)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        (["model.representation.hashes=8"], ["model.representation.hashes"]),
        (["model.representation.hash_seed=8", "representation=table"], ["model.representation.hash_seed"]),
        (["model.representation.hashes=8", "model.representation.features.C3=dhe"], []),
        (["model.representation.decoder=[8]", "representation=select"], []),
        (["model.representation.select=2", "representation=dhe"], ["model.representation.select"]),
        (["model.representation.select=2", "representation=select"], []),
        (["ab.seeds=[1]"], ["ab.seeds"]),
        (["ab.seeds=[1]", "ab.representations=[table,dhe]"], []),
    ],
)
def test_settings_that_nothing_reads_are_named(words, idle):
    config, _ = load(words)
    sentences = unused_settings(config, words)
    assert [sentence.split(" is set")[0] for sentence in sentences] == idle
    assert all("None" not in sentence for sentence in sentences)


def test_the_experiment_compares_representations_of_movielens():
    config, _ = load(["experiment=representations_movielens"])
    assert config.ab.variants == ("table", "dhe", "hybrid", "select")
    assert config.ab.seeds == (0, 1, 2)
    assert config.data.path == "data/movielens"
    assert AbConfig(codecs=("plain",)).varied == "codecs"
