"""Words and mappings become dataclasses, or a sentence that says what is wrong where."""

from dataclasses import dataclass
from typing import Literal

import pytest

from tightrec.formats.settings import from_mapping, from_words


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Outer:
    path: str
    mode: Literal["fast", "slow"] = "fast"
    share: float | None = 0.5
    inner: Inner = Inner()


def test_words_nest_by_dots_and_convert():
    made = from_words(Outer, ["path=a=b", "inner.size=3", "share=null"], "prepare")
    assert made == Outer(path="a=b", inner=Inner(size=3), share=None)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["path=x", "mod=fast"], "prepare: there is no setting 'mod'. Did you mean 'mode'?"),
        (["path=x", "inner.sise=3"], "prepare.inner: there is no setting 'sise'. Did you mean 'size'?"),
        (["path=x", "zzz=3"], "Known: path, mode, share, inner."),
        (["mode=fast"], "prepare.path: this setting has no default, give it."),
        (["path=x", "mode=medium"], "prepare.mode: Input should be 'fast' or 'slow', not 'medium'."),
        (["path=x", "inner.size=big"], "not 'big'."),
        (["path=x", "inner.size=0"], "prepare.inner: size=0 must be at least 1."),
        (["path=x", "path=y"], "path is given twice"),
        (["path"], "'path' is not of the form key=value"),
    ],
)
def test_a_mistake_is_told_with_its_place(words, told):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole sentence is compared below)
        from_words(Outer, words, "prepare")
    assert told in str(error.value)


def test_nested_words_do_not_swallow_a_plain_value():
    with pytest.raises(ValueError, match="inner"):
        from_words(Outer, ["path=x", "inner=3", "inner.size=4"], "prepare")


def test_mappings_are_checked_like_words():
    made = from_mapping(Outer, {"path": "x", "inner": {"size": 2}}, "")
    assert made == Outer(path="x", inner=Inner(size=2))
