"""Words and files that force the types of a snapshot."""

from pathlib import Path

import pytest

from tightrec.snapshot.config import PrecisionConfig
from tightrec.snapshot.plans import FORCED, forced_plan

TABLES, LAYERS = ["t_user", "t_item", "t_genre"], ["bottom.0", "top.0", "top.1"]


def types(precision: str) -> tuple[dict[str, str], dict[str, str]]:
    plan = forced_plan(PrecisionConfig(precision=precision), TABLES, LAYERS)
    return plan.tables, plan.layers


@pytest.mark.parametrize("word", FORCED)
def test_a_word_gives_every_table_and_layer_its_type(word: str) -> None:
    of_tables, of_layers = FORCED[word]
    assert types(word) == (dict.fromkeys(TABLES, of_tables), dict.fromkeys(LAYERS, of_layers))


def test_settings_of_ranges_and_rows_go_into_the_plan() -> None:
    config = PrecisionConfig(precision="int4", row_search="min_max", ranges="kl")
    plan = forced_plan(config, TABLES, LAYERS)
    assert (plan.row_search, plan.ranges) == ("min_max", "kl")


def test_of_patterns_in_a_file_the_last_that_matches_counts(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("tables: {'*': int4, t_u*: fp16, t_x*: int2}\nlayers: {'*': int8, top.1: fp32}\n")
    tables, layers = types(str(file))
    assert tables == {"t_user": "fp16", "t_item": "int4", "t_genre": "int4"}
    assert list(tables) == TABLES
    assert layers == {"bottom.0": "int8", "top.0": "int8", "top.1": "fp32"}


def test_a_file_may_give_one_type_to_all(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("tables: int2\nlayers: bf16\n")
    assert types(str(file)) == (dict.fromkeys(TABLES, "int2"), dict.fromkeys(LAYERS, "bf16"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tables: int4\n", "must hold the two keys tables and layers"),
        ("tables: int4\nlayers: int8\nlayer: int8\n", "must hold the two keys tables and layers"),
        ("- int4\n", "must hold the two keys tables and layers"),
        ("tables: int3\nlayers: int8\n", r"tables\.\* is 'int3', but must be one of fp32, fp16, int8"),
        ("tables: int4\nlayers: int4\n", r"layers\.\* is 'int4', but must be one of fp32, bf16"),
        ("tables: {t_usr: int4}\nlayers: int8\n", r"tables\.t_usr is not in this model, which has t_user"),
        ("tables: {t_user: int4}\nlayers: int8\n", "tables has no type for t_item, t_genre"),
        ("tables: {\n", "is not valid YAML"),
        ("tables: {t_user: [int4]}\nlayers: int8\n", r"tables\.t_user is \['int4'\], but must be"),
    ],
)
def test_a_wrong_file_is_refused_in_words(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        types(str(file))
    assert str(file) in str(error.value)


def test_a_word_that_is_neither_type_nor_file_is_refused() -> None:
    with pytest.raises(ValueError, match="precision=int9 is neither a file nor one of auto, int8"):
        types("int9")
