"""Which features have which representation, and the settings that say so."""

import dataclasses
import json

import pytest

from tightrec.models.config import ModelConfig, RepresentationConfig, config_of
from tightrec.models.representation import representations, with_dhe, with_table

COLUMNS = [("user", 50), ("item", 20), ("city", 50), ("genre", 7)]


def kinds(**settings) -> list[str]:
    found = representations(COLUMNS, RepresentationConfig(**settings))
    assert list(found) == [name for name, _ in COLUMNS]
    return list(found.values())


def test_one_word_for_all_features():
    assert kinds() == ["table"] * 4
    assert kinds(kind="dhe") == ["dhe"] * 4
    assert kinds(kind="hybrid") == ["hybrid"] * 4


def test_single_features_win_over_the_word_for_all():
    assert kinds(features={"item": "hybrid", "genre": "dhe"}) == ["table", "hybrid", "table", "dhe"]
    assert kinds(kind="dhe", features={"user": "table"}) == ["table", "dhe", "dhe", "dhe"]
    assert kinds(kind="select", select=1, features={"user": "hybrid"}) == ["hybrid", *["table"] * 3]


def test_select_takes_the_features_with_the_most_ids_the_first_of_equal_ones():
    assert kinds(kind="select", select=1) == ["dhe", "table", "table", "table"]
    assert kinds(kind="select", select=3) == ["dhe", "dhe", "dhe", "table"]
    assert kinds(kind="select") == ["dhe"] * 4


def test_select_takes_names():
    assert kinds(kind="select", select=("genre", "item")) == ["table", "dhe", "table", "dhe"]
    # Only where it is asked for.
    assert kinds(select=("nobody",)) == ["table"] * 4


def test_a_hybrid_feature_has_both():
    config = RepresentationConfig(features={"item": "hybrid", "genre": "dhe"})
    assert with_table(COLUMNS, config) == ["user", "item", "city"]
    assert with_dhe(COLUMNS, config) == ["item", "genre"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"features": {"usr": "dhe"}}, "features names 'usr', .* Did you mean 'user'"),
        ({"features": {"zzz": "dhe"}}, "features names 'zzz', .* There are user, item, city, genre"),
        ({"kind": "select", "select": ("itme",)}, "select names 'itme', .* Did you mean 'item'"),
    ],
)
def test_a_feature_that_is_not_there_is_told_with_its_setting(settings, words):
    with pytest.raises(ValueError, match=rf"model\.representation\.{words}"):
        representations(COLUMNS, RepresentationConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hashes": 1}, "hashes=1 must be at least 2"),
        ({"buckets": 1}, "buckets=1 must be at least 2"),
        ({"buckets": 2**24}, r"buckets=16777216 must be below 2\*\*24"),
        ({"hashes": 7, "transform": "gaussian"}, "hashes=7 must be even with transform=gaussian"),
        ({"decoder": (8, 0)}, "decoder must hold widths of at least 1"),
        ({"select": 0}, "select=0 must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=rf"model\.representation\.{words}"):
        RepresentationConfig(**settings)


def test_whether_anything_is_hashed():
    assert not RepresentationConfig().hashing
    assert not RepresentationConfig(features={"user": "table"}).hashing
    assert RepresentationConfig(features={"user": "hybrid"}).hashing
    assert RepresentationConfig(kind="select").hashing


@pytest.mark.parametrize(
    "representation",
    [
        RepresentationConfig(),
        RepresentationConfig(kind="select", select=("user", "item"), decoder=(), hash_seed=3),
        RepresentationConfig(kind="dhe", select=2, features={"user": "hybrid"}, decoder=(9, 4), hashes=6),
    ],
)
def test_a_configuration_survives_json(representation):
    config = ModelConfig(top_layers=(3, 2), representation=representation)
    assert config_of(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_a_description_from_before_representations_means_tables():
    saved = dataclasses.asdict(ModelConfig(embedding_dim=8))
    del saved["representation"]
    assert config_of(saved) == ModelConfig(embedding_dim=8)
