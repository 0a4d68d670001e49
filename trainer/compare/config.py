"""Configuration of a job that is many runs: each codec, or each representation, with each seed."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

PLAIN = "plain"
"""The codec of plain torchrec: no number format, no deduplication."""


@dataclass(frozen=True, kw_only=True)
class AbConfig:
    """Which runs a job makes one after the other to compare them; by default it is one ordinary run."""

    codecs: tuple[str, ...] = ()
    """``plain`` (torchrec as it is) and names of the group ``codec``, the first being what the others are
    compared with; empty: one ordinary run, or those of ``representations``."""

    representations: tuple[str, ...] = ()
    """Names of the group ``representation``, the first being what the others are compared with; one of this
    and ``codecs`` is empty."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds that each codec or representation is run with."""

    @property
    def varied(self) -> Literal["codecs", "representations"]:
        """Which of the two lists holds what is compared."""
        return "representations" if self.representations else "codecs"

    @property
    def variants(self) -> tuple[str, ...]:
        """What is compared; empty: one ordinary run."""
        return self.representations or self.codecs

    def __post_init__(self) -> None:
        if self.codecs and self.representations:
            raise ValueError(
                "ab.codecs and ab.representations are both given, and a comparison varies one thing. Leave "
                "one of them empty, and choose the other for all runs with codec=... or representation=..."
            )
        if self.variants and not self.seeds:
            raise ValueError("ab.seeds is empty. Give at least one seed, as in ab.seeds=[0,1,2].")
        lists = {"codecs": self.codecs, "representations": self.representations, "seeds": self.seeds}
        for name, values in lists.items():
            twice = [value for value, times in Counter(values).items() if times > 1]
            if twice:
                raise ValueError(f"ab.{name} holds {twice[0]} twice. Give each once.")
        # They name folders and are words of a command line.
        strange = [name for name in self.variants if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]
        if strange:
            choices = f"codec, or {PLAIN}" if self.varied == "codecs" else "representation"
            raise ValueError(f"ab.{self.varied} holds {strange[0]!r}. Give names of the group {choices}.")
