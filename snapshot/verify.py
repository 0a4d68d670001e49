"""Replaying rows through the float32 model and through a snapshot, and what the snapshot lost."""

import time
from dataclasses import dataclass
from math import ceil
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from tightrec.formats.columns import Columns
from tightrec.models.scores import Scores, score
from tightrec.snapshot.parts import Run, batches, logits_of

TIMED_BATCHES = 30


@dataclass(frozen=True, kw_only=True)
class Verification:
    """A snapshot beside the float32 model, on the same rows."""

    rows: int
    """Rows that were replayed."""

    split: str
    """Of which split."""

    budget_ne: float
    """Relative loss of NE that was allowed."""

    ne_loss: float
    """NE of the snapshot divided by that of float32, minus 1; below 0 it is better."""

    ne_loss_error: float
    """Standard error of ``ne_loss``, from the differences of the rows' log losses."""

    float32: dict[str, float]
    """ne, auc, log_loss and calibration of the float32 model."""

    snapshot: dict[str, float]
    """The same of the snapshot."""

    worst_change: float
    """Largest difference of a row's two probabilities."""

    p999_change: float
    """99.9 % of the rows' probabilities differ by at most this."""

    float32_bytes: int
    """Size of all tables and layers in float32."""

    snapshot_bytes: int
    """Size of the snapshot's weights, without their files' headers."""

    float32_ms: float
    """Median time of a batch on this machine: eager float32 layers, and float32 tables of the replayed rows
    alone in the operator that serves snapshots."""

    snapshot_ms: float
    """Median time of a batch of the snapshot, alternating with the other."""

    batch_size: int
    """Rows of these batches."""

    passed: bool
    """Whether ``ne_loss`` stays within ``budget_ne``."""

    @property
    def sentence(self) -> str:
        """One line that says it all."""
        before, after = self.float32, self.snapshot
        return (
            f"{'verified' if self.passed else 'REFUSED'} on {self.rows:,} {self.split} rows: "
            f"NE {before['ne']:.5f} -> {after['ne']:.5f} ({self.ne_loss:+.4%} +- {self.ne_loss_error:.4%}, "
            f"budget {self.budget_ne:.4%}), AUC {before['auc']:.5f} -> {after['auc']:.5f}, calibration "
            f"{before['calibration']:.4f} -> {after['calibration']:.4f}, score change at most "
            f"{self.worst_change:.2g} (99.9 %: {self.p999_change:.2g}), "
            f"{self.snapshot_bytes / self.float32_bytes:.1%} of float32's size, batch of {self.batch_size:,} "
            f"in {self.snapshot_ms:.2f} ms against {self.float32_ms:.2f}"
        )


def ne_loss(exact: Tensor, other: Tensor, labels: Tensor) -> tuple[float, float]:
    """Relative loss of NE and its standard error, paired by rows.

    The entropy of the base rate cancels, so that NE's relative loss is log loss's.

    Args:
        exact: logits [n] of the model to compare with.
        other: logits [n].
        labels: [n], 0 or 1.
    """
    before, after = (
        functional.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="none")
        for logits in (exact, other)
    )
    difference = after - before
    error = float(difference.std()) / len(labels) ** 0.5 if len(labels) > 1 else float("nan")
    return float(difference.mean() / before.mean()), error / float(before.mean())


def verify(
    exact: Run,
    exact_columns: Columns,
    served: Run,
    columns: Columns,
    *,
    split: str,
    budget_ne: float,
    batch_size: int,
    float32_bytes: int,
    snapshot_bytes: int,
    logits: Tensor | None = None,
) -> Verification:
    """Compare two models on the same rows.

    Args:
        exact: the float32 model.
        exact_columns: the rows with the ids that it knows.
        served: the snapshot.
        columns: the same rows with the ids that the snapshot knows.
        logits: what the snapshot gives for them, [n], where it is known already.

    Raises:
        ValueError: the rows cannot tell, for they are none or of one label only.
    """
    if logits is None:
        logits = logits_of(served, columns, batch_size)
    found = logits_of(exact, exact_columns, batch_size), logits
    labels = torch.from_numpy(columns.labels)
    before, after = (score(logits, labels) for logits in found)
    if not 0 < before.base_rate < 1:
        raise ValueError(
            f"the {split} rows cannot verify anything: {before.note}. Give data=FOLDER or "
            "verify_split=NAME with rows of both labels, or verify=false."
        )
    loss, error = ne_loss(found[0], found[1], labels)
    change = (found[0].double().sigmoid() - found[1].double().sigmoid()).abs()
    exact_ms, served_ms = _times(exact, exact_columns, served, columns, batch_size)
    return Verification(
        rows=len(labels),
        split=split,
        budget_ne=budget_ne,
        ne_loss=loss,
        ne_loss_error=error,
        float32=_figures(before),
        snapshot=_figures(after),
        worst_change=float(change.max()),
        p999_change=float(change.kthvalue(ceil(0.999 * len(change))).values),
        float32_bytes=float32_bytes,
        snapshot_bytes=snapshot_bytes,
        float32_ms=exact_ms,
        snapshot_ms=served_ms,
        batch_size=batch_size,
        # Not `loss > budget`: a loss that is not a number passes nothing.
        passed=loss <= budget_ne,
    )


def _times(
    exact: Run, exact_columns: Columns, served: Run, columns: Columns, batch_size: int
) -> tuple[float, float]:
    """Median milliseconds of a batch of each, taken in turns so that a busy machine slows both."""
    rows = TIMED_BATCHES * batch_size
    pairs = zip(
        batches(exact_columns.slice(0, min(rows, len(columns))), batch_size),
        batches(columns.slice(0, min(rows, len(columns))), batch_size),
        strict=True,
    )
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for pair in pairs:
            for run, batch, spent in zip((exact, served), pair, times, strict=True):
                began = time.perf_counter()
                run(*batch)
                spent.append(1e3 * (time.perf_counter() - began))
    return median(times[0]), median(times[1])


def _figures(scores: Scores) -> dict[str, float]:
    return {name: getattr(scores, name) for name in ("ne", "auc", "log_loss", "calibration")}
