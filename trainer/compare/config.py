"""Configuration of a job that is many runs: each codec with each seed."""

import re
from collections import Counter
from dataclasses import dataclass

PLAIN = "plain"
"""The codec of plain torchrec: no number format, no deduplication."""


@dataclass(frozen=True, kw_only=True)
class AbConfig:
    """Which runs a job makes one after the other to compare them; by default it is one ordinary run."""

    codecs: tuple[str, ...] = ()
    """``plain`` (torchrec as it is) and names of the group ``codec``, the first being what the others are
    compared with; empty: one ordinary run."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds that each codec is run with."""

    def __post_init__(self) -> None:
        if self.codecs and not self.seeds:
            raise ValueError("ab.seeds is empty. Give at least one seed, as in ab.seeds=[0,1,2].")
        for name, values in (("codecs", self.codecs), ("seeds", self.seeds)):
            twice = [value for value, times in Counter(values).items() if times > 1]
            if twice:
                raise ValueError(f"ab.{name} holds {twice[0]} twice. Give each once.")
        # They name folders and are words of a command line.
        strange = [name for name in self.codecs if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]
        if strange:
            raise ValueError(f"ab.codecs holds {strange[0]!r}. Give names of the group codec, or {PLAIN}.")
