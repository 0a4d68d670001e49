"""Three classes of tables with bounds of their own: the table level of SC'24 (arXiv 2407.04272).

The published bounds are 0.01, 0.03 and 0.05 of the range; here they are multiples of the table's configured
bound, 1/3, 1 and 5/3, which is the same at the default of 0.03.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from tightrec.compression.bounds import Bound
from tightrec.compression.policy.config import BoundConfig

TableClass = Literal["tight", "base", "loose"]
MULTIPLES: dict[TableClass, float] = {"tight": 1 / 3, "base": 1.0, "loose": 5 / 3}


def class_by_rows(rows: int, config: BoundConfig) -> TableClass:
    """The class of a table of so many rows.

    A large table is tight: most of its rows are seldom trained and lie close together, so that the same share
    of the range wipes out more of their differences. On Criteo Terabyte the released classes are these.
    """
    if rows <= config.loose_rows:
        return "loose"
    return "tight" if rows >= config.tight_rows else "base"


def class_by_index(index: float, config: BoundConfig) -> TableClass:
    """The class of a table with such a homogenisation index; the cuts are this project's, not published."""
    if index >= config.tight_index:
        return "tight"
    return "loose" if index <= config.loose_index else "base"


def homogenisation_index(before: float, after: float) -> float:
    """The share of distinct rows that quantisation makes equal to another one: 0 none, towards 1 nearly all.

    Args:
        before: distinct rows as looked up, summed over batches and ranks; above 0.
        after: distinct rows of their codes, summed likewise.

    Raises:
        ValueError: there were no rows, or more after than before.
    """
    if not before > 0 or not 0 <= after <= before:
        raise ValueError(f"{before} distinct rows before quantisation and {after} after are no sample")
    return 1 - after / before


def count_distinct(rows: Tensor, bound: Bound) -> tuple[int, int]:
    """Distinct rows before and after quantisation at ``bound``; rows with NaN or Inf are left out.

    Args:
        rows: [N, D], on any device; the two counts are read back, so that the host waits.
        bound: resolved on these rows, as the codec does on a block.

    Raises:
        ValueError: rows are not a matrix.
    """
    if rows.dim() != 2:
        raise ValueError(f"rows to sample must be a matrix [N, D], not of shape {tuple(rows.shape)}")
    rows = rows.detach().float()
    rows = rows[rows.isfinite().all(dim=1)]
    if not rows.numel():
        return 0, 0
    # Adding 0 turns -0 into 0: the two are one row.
    before = torch.unique(rows + 0.0, dim=0).shape[0]
    scale = {"absolute": 1.0, "range": rows.max() - rows.min(), "rms": rows.square().mean().sqrt()}
    error = bound.value * scale[bound.of]
    if not error > 0:
        return before, before
    codes = torch.round(rows / (2 * error)) + 0.0
    return before, torch.unique(codes, dim=0).shape[0]


class Sampling:
    """Classes by homogenisation index, from the batches of a few steps.

    Args:
        config: when to sample, and the cuts.
        bounds: of each table, to quantise samples at; None: lossless, not sampled.
    """

    def __init__(self, config: BoundConfig, bounds: Mapping[str, Bound | None]) -> None:
        self.classes: dict[str, TableClass] = {}
        """By table; empty until sampled on all ranks."""
        self._config = config
        self._bounds = dict(bounds)
        self._start: int | None = None
        self._seen: dict[str, tuple[int, int]] = {}

    @property
    def open(self) -> bool:
        """Whether some table has no class yet."""
        return any(bound and table not in self.classes for table, bound in self._bounds.items())

    def set_step(self, step: int) -> None:
        """Begin at the first step from ``sample_after`` on that comes: a resumed job samples too."""
        if self._start is None and step >= self._config.sample_after:
            self._start = step

    def restore(self, classes: Mapping[str, TableClass]) -> None:
        """Go on from what ``classes`` once was; tables that it does not name make all be sampled again."""
        self.classes = dict(classes)
        self._start = None

    def due(self, step: int) -> bool:
        """Whether the rows of this step count."""
        return self.open and self._start is not None and 0 <= step - self._start < self._config.sample_batches

    def over(self, step: int) -> bool:
        """Whether all samples are taken, and the ranks have to add up what they counted."""
        return self.open and self._start is not None and step - self._start >= self._config.sample_batches

    def observe(self, table: str, rows: Tensor) -> None:
        """Count the distinct rows [N, D] of one table on this rank."""
        bound = self._bounds[table]
        if bound is not None:
            before, after = count_distinct(rows, bound)
            seen = self._seen.get(table, (0, 0))
            self._seen[table] = (seen[0] + before, seen[1] + after)

    def counts(self) -> list[int]:
        """[2T] this rank's distinct rows before and after quantisation, for each table in order."""
        return [count for table in self._bounds for count in self._seen.get(table, (0, 0))]

    def classify(self, counts: Sequence[float]) -> list[str]:
        """Class all tables by the sum of all ranks' ``counts``; what to tell about it.

        Raises:
            ValueError: not two numbers for each table.
        """
        if len(counts) != 2 * len(self._bounds):
            raise ValueError(
                f"{len(counts)} counts for {len(self._bounds)} tables; give the sum over ranks of "
                "homogenisation_counts, two numbers a table"
            )
        told = []
        for table, before, after in zip(self._bounds, counts[::2], counts[1::2], strict=True):
            if self._bounds[table] is None:
                continue
            name: TableClass = "base"
            why = "no rows in the sampled batches"
            if before > 0:
                index = homogenisation_index(before, after)
                name = class_by_index(index, self._config)
                why = f"homogenisation index {index:.3f} of {before:.0f} distinct rows"
            self.classes[table] = name
            told.append(f"table {table} is {name}: {why}")
        self._seen.clear()
        return told
