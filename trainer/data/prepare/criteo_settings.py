"""Settings of the preparation of Criteo's click logs, and the rules that they amount to, in words."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from tightrec.trainer.data.prepare.common import PrepareSettings, check_shares
from tightrec.trainer.data.prepare.inputs import ENDINGS
from tightrec.trainer.data.prepare.numbering import TEST, TRAIN, VALID
from tightrec.trainer.data.prepare.rejects import ErrorMode

DEFAULT_SHARE = 0.1
LEAST_PART_BYTES, MOST_PART_BYTES = 4 << 10, 1 << 30

_VOCABULARY_RULE = (
    "0 missing; 1 rare or unknown; from 2 on the ids with min_count or more in train, ascending"
)
_HASH_RULE = (
    "0 missing; else 1 + floor(h * (hash_size - 1) / 2**32), h the upper half of mix(id + mix(64 * seed + "
    "column)), column 0 for C1, mix the splitmix64 finaliser"
)
_DRAW_RULE = (
    "u = mix(line + mix(file + mix(seed))) / 2**64, lines from 1 and files from 0, mix the splitmix64 "
    "finaliser: test where u < test_share, else valid where u < test_share + valid_share, else train"
)


@dataclass(frozen=True, kw_only=True)
class CriteoSettings(PrepareSettings):
    """Settings of ``prepare criteo``."""

    src: str
    """The click logs, one or several days: files, globs in quotes, and folders (of *.tsv, train*.txt and
    day_N), separated by commas; plain, gzip or xz."""

    errors: ErrorMode = "tolerant"
    """strict: stop at the first bad line, naming file, line and value. tolerant: count bad lines by kind,
    put a sample of them into DST/rejects.jsonl, and go on without them."""

    row_group_rows: int = 65_536
    """Most rows in a parquet row group, the unit of shuffling and of sharing work between ranks."""

    ids: Literal["vocabulary", "hash"] = "vocabulary"
    """vocabulary: number the ids of the train split that are frequent enough, ascending from 2 on; 0 is a
    missing value, 1 any other id. hash: 0 is a missing value, the others are hashed to 1 .. hash_size - 1;
    one pass over the input instead of two."""

    min_count: int = 2
    """Occurrences in the train split from which an id gets a number of its own (ids=vocabulary). Ids seen
    once teach nothing of their own; sharing one number, they train it for the ids never seen."""

    max_ids: int | None = None
    """Most ids of a column that get a number of their own, the most frequent ones (ids=vocabulary)."""

    hash_size: int = 1_000_000
    """Cardinality of every column (ids=hash)."""

    valid_share: float | None = None
    """Share of the rows drawn into the valid split; 0.1 where no whole files are named."""

    test_share: float | None = None
    """Share of the rows drawn into the test split; 0.1 where no whole files are named."""

    valid_files: str = ""
    """Names of input files, separated by commas, that make up the valid split (whole days)."""

    test_files: str = ""
    """Names of input files, separated by commas, that make up the test split (whole days)."""

    part_bytes: int = 64 << 20
    """Most bytes of text behind one part of the output, the unit that is worked on and continued."""

    memory_gb: float = 2.0
    """Most memory to use, in GiB, whatever the size of the input. It limits threads and vocabulary."""

    threads: int = 0
    """Most parts to work on at a time; 0: one for each core that this process may use."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_count < 1:
            raise ValueError(f"min_count={self.min_count} must be at least 1.")
        if self.max_ids is not None and self.max_ids < 1:
            raise ValueError(f"max_ids={self.max_ids} must be at least 1.")
        if not 2 <= self.hash_size < 1 << 32:
            raise ValueError(f"hash_size={self.hash_size} must lie in [2, 2**32).")
        if not LEAST_PART_BYTES <= self.part_bytes <= MOST_PART_BYTES:
            raise ValueError(
                f"part_bytes={self.part_bytes} must lie in [{LEAST_PART_BYTES}, {MOST_PART_BYTES}]."
            )
        if not self.memory_gb >= 0.5:
            raise ValueError(f"memory_gb={self.memory_gb} must be at least 0.5.")
        if self.threads < 0:
            raise ValueError(f"threads={self.threads} must be at least 0.")
        check_shares(*self.shares())
        whole_files = bool(self.valid_files or self.test_files)
        if whole_files and (self.valid_share is not None or self.test_share is not None):
            raise ValueError(
                "give either valid_share and test_share, or valid_files and test_files, not both."
            )
        idle = ("min_count", "max_ids") if self.ids == "hash" else ("hash_size",)
        for field in fields(self):
            if field.name in idle and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} has no effect with ids={self.ids}. Leave it out.")

    def shares(self) -> tuple[float, float]:
        """Shares of the valid and the test split, where rows are drawn."""
        valid_share = DEFAULT_SHARE if self.valid_share is None else self.valid_share
        return valid_share, DEFAULT_SHARE if self.test_share is None else self.test_share

    def whole_files(self, files: Sequence[Path]) -> dict[Path, int]:
        """Code of the split of each of ``files`` where whole ones are named, else nothing.

        Raises:
            ValueError: a name that is none of them or stands twice, or no file to train on.
        """
        if not self.valid_files and not self.test_files:
            return {}
        splits = dict.fromkeys(files, TRAIN)
        for setting, names, code in (("valid", self.valid_files, VALID), ("test", self.test_files, TEST)):
            for name in filter(None, (name.strip() for name in names.split(","))):
                named = [
                    f for f in files if f.name in {name + ending for ending in ENDINGS} or str(f) == name
                ]
                if len(named) != 1 or splits[named[0]] != TRAIN:
                    known = ", ".join(file.name for file in files)
                    found = "is named twice" if len(named) == 1 else f"names {len(named)} input files"
                    raise ValueError(f"{setting}_files: {name!r} {found}. The input files are: {known}.")
                splits[named[0]] = code
        if TRAIN not in splits.values():
            raise ValueError(
                "valid_files and test_files name all input files. Leave at least one to train on."
            )
        return splits

    def rules(self) -> dict[str, Any]:
        """How columns and splits were made, in words, for the schema."""
        whole_files = self.valid_files or self.test_files
        return {
            "dense_rule": "log(x + 1); blank and negative integers as 0",
            "ids_rule": _HASH_RULE if self.ids == "hash" else _VOCABULARY_RULE,
            "split_rule": "whole files" if whole_files else _DRAW_RULE,
        }
