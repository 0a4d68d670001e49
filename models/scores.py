"""Log loss, normalised entropy, AUC and calibration of click predictions.

Shapes: B rows. A row's weight is 1, or 0 where the row only fills up a batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SUMS = 5
"""Sums over rows: weight, log loss, label, predicted probability, logits that are not finite."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a set of predictions is worth; NaN where the rows do not say, with the reason in ``note``."""

    rows: int
    """Real rows, all ranks together."""

    log_loss: float
    """Mean binary cross-entropy, in nats."""

    ne: float
    """Log loss divided by the entropy of the base rate: 1 is a constant guess, less is better (He et al.,
    "Practical Lessons from Predicting Clicks on Ads at Facebook", 2014, section 3)."""

    auc: float
    """Probability that a random click is ranked above a random non-click, ties counting half."""

    calibration: float
    """Predicted clicks divided by actual clicks; 1 is perfect."""

    base_rate: float
    """Share of rows that are clicks."""

    note: str = ""
    """Why something above is NaN."""


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Scores of B predictions, with the exact AUC.

    Args:
        logits: [B], any float type.
        labels: [B], 0 or 1.
    """
    weights = torch.ones_like(labels, dtype=torch.float32)
    return scores_of(row_sums(logits, labels, weights), auc_of_rows(logits.float(), labels, weights))


def auc_of_groups(clicks: Tensor, others: Tensor) -> float:
    """AUC from the weight of clicks and of non-clicks [G] in groups of equal score, ascending.

    Pairs inside a group count half, which is what midranks do. NaN where one kind is missing.
    """
    pairs = float(clicks.sum() * others.sum())
    below = others.cumsum(0) - others
    return float((clicks * (below + others / 2)).sum()) / pairs if pairs else math.nan


def auc_of_rows(logits: Tensor, labels: Tensor, weights: Tensor) -> float:
    """Exact AUC of B rows: logits, labels and weights [B]."""
    logits, order = logits.sort()
    labels, weights = labels[order].double(), weights[order].double()
    _, group = logits.unique_consecutive(return_inverse=True)
    zeros = torch.zeros(int(group[-1]) + 1 if len(group) else 0, dtype=torch.float64)
    clicks = zeros.index_add(0, group, weights * labels)
    return auc_of_groups(clicks, zeros.index_add(0, group, weights * (1 - labels)))


def row_sums(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The sums [SUMS] of B rows, float64, without waiting for the device; sums of batches add up."""
    logits, labels, weights = logits.double(), labels.double(), weights.double()
    finite = logits.isfinite()
    losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    # A padding row's logit may be anything, and 0 x NaN is NaN.
    rows = torch.stack([torch.ones_like(labels), losses, labels, logits.sigmoid(), (~finite).double()])
    return torch.where(weights != 0, rows * weights, 0.0).sum(dim=1)


def scores_of(sums: Tensor, auc: float, note: str = "") -> Scores:
    """What the sums [SUMS] of all rows say; ``auc`` is passed on."""
    rows, loss, clicks, predicted, odd = sums.tolist()
    if not rows:
        note = "there were no rows"
    elif odd:
        note, auc = f"{odd:.0f} of {rows:.0f} logits are not finite", math.nan
    elif clicks in (0.0, rows):
        note, auc = f"all {rows:.0f} labels are {1 if clicks else 0}", math.nan
    rate = clicks / rows if rows else math.nan
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)) if 0 < rate < 1 else math.nan
    return Scores(
        rows=round(rows),
        log_loss=loss / rows if rows else math.nan,
        ne=loss / rows / entropy if rows else math.nan,
        auc=auc,
        calibration=predicted / clicks if clicks else math.nan,
        base_rate=rate,
        note=note,
    )
