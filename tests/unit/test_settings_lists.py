"""Words of the command line that hold lists become tuples, or a sentence that says how to write one."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tightrec.formats.settings import from_words


@dataclass(frozen=True, kw_only=True)
class Inner:
    sizes: tuple[int, ...] = (1,)


@dataclass(frozen=True, kw_only=True)
class Lists:
    folders: tuple[Path, ...]
    names: list[str] | None = None
    select: int | tuple[str, ...] = 5
    pair: tuple[int, int] = (1, 2)
    inner: Inner | None = None
    word: str = ""


def read(*words: str) -> Lists:
    return from_words(Lists, words, "explore")


def test_lists_take_brackets_or_one_value_and_convert():
    assert read("folders=[a/b.c,/d e]").folders == (Path("a/b.c"), Path("/d e"))
    assert read("folders=a=b").folders == (Path("a=b"),)
    assert read("folders=[]").folders == ()
    assert read("folders=[ a , b ]").folders == (Path("a"), Path("b"))
    assert read("folders=a", "pair=[3,4]", "inner.sizes=[5,6]", "names=[x]") == Lists(
        folders=(Path("a"),), pair=(3, 4), inner=Inner(sizes=(5, 6)), names=["x"]
    )


def test_commas_inside_brackets_or_parentheses_do_not_part():
    made = read("folders=a", "names=[2x gpu(speed=20,overhead_ms=0.3),cpu,[1,2]]")
    assert made.names == ["2x gpu(speed=20,overhead_ms=0.3)", "cpu", "[1,2]"]


def test_what_is_no_list_stays_a_word():
    assert read("folders=a", "word=[a,b]").word == "[a,b]"
    assert read("folders=a", "names=null").names is None


def test_a_number_or_a_list_of_names():
    assert read("folders=a", "select=7").select == 7
    assert read("folders=a", "select=[u,m]").select == ("u", "m")


@pytest.mark.parametrize(
    "word", ["folders=[a,b", "folders=[", "folders=[a]]", "folders=[a,(b]", "folders=[a,,b]"]
)
def test_a_list_that_is_not_closed_or_has_a_hole_is_refused(word):
    with pytest.raises(ValueError, match=r"^explore: folders=\[.* is not a list. Write folders=\[A,B\] "):
        read(word)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["folders=a", "pair=[1,x]"], "explore.pair.1: Input should be a valid integer"),
        (["folders=a", "inner.sizes=[1.5]"], "explore.inner.sizes.0: "),
        (["folders=a", "inner.size=[1]"], "explore.inner: there is no setting 'size'. Did you mean 'sizes'?"),
        (["folders=a", "folder=[b]"], "there is no setting 'folder'. Did you mean 'folders'?"),
        (["folders=a", "word.more=[b]"], "explore.word: Input should be a valid string"),
    ],
)
def test_mistakes_in_lists_are_told_with_their_place(words, told):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the sentence is compared below)
        read(*words)
    assert told in str(error.value)
