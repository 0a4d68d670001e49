"""Figures of predicted probabilities as sums over rows, and a histogram of them to compare with later.

Shapes: n rows, K bins. All sums are float64 and those of parts of the rows add up.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

BINS = 20
"""Of equally many held-out rows each, as far as equal scores allow."""

_LEAST = 2.0**-24
"""Probabilities are taken as at least this far from 0 and 1, where a float32 sigmoid saturates."""

SUMS = 8
"""Rows; sums of log loss l, label y and probability p; then of l l, l y, p p and p y (y y is y)."""


def score_histogram(probabilities: ArrayLike, labels: ArrayLike | None = None) -> dict[str, Any]:
    """What a monitor compares with, in JSON's types, from a snapshot's own scores of held-out rows.

    Args:
        probabilities: [n].
        labels: [n], 0 or 1; without, there is no reference for NE and calibration.

    Returns:
        ``edges`` [K - 1], ascending: bin i holds scores in (edges[i - 1], edges[i]]; ``counts`` [K]; and,
        with labels, ``ne`` and ``calibration``, each with ``value`` and ``error``, its standard error.

    Raises:
        ValueError: no rows, or a value that is no probability or label.
    """
    scores = probabilities_of(probabilities)
    if not len(scores):
        raise ValueError("a histogram needs scores of at least one row.")
    # Edges are scores that occurred, so that rows of equal score share a bin; the outer bins hold what lies
    # beyond all of them, which tells a drift even where all scores are equal.
    least, *inner = np.quantile(scores, np.linspace(0, 1, BINS + 1), method="inverted_cdf")
    edges = np.unique([np.nextafter(least, -1.0), *inner])
    found: dict[str, Any] = {"edges": edges.tolist(), "counts": counts_of(scores, edges).astype(int).tolist()}
    if labels is not None:
        sums = moment_sums(scores, labels_of(labels, len(scores)))
        for what, figure in (("ne", ne_of(sums)), ("calibration", calibration_of(sums))):
            if figure is not None:
                found[what] = {"value": figure[0], "error": figure[1]}
    return found


def moment_sums(scores: Floats, labels: Floats) -> Floats:
    """The sums [SUMS] of n rows with probabilities ``scores`` [n] and ``labels`` [n]."""
    p = np.clip(scores, _LEAST, 1 - _LEAST)
    loss = -np.log(np.where(labels > 0, p, 1 - p))
    pairs = (loss @ loss, loss @ labels, scores @ scores, scores @ labels)
    return np.array([len(p), loss.sum(), labels.sum(), scores.sum(), *pairs])


def ne_of(sums: Floats) -> tuple[float, float] | None:
    """NE and its standard error by the delta method, base rate included; None: the labels are all alike."""
    rows, loss, label = sums[0], sums[1] / max(sums[0], 1), sums[2] / max(sums[0], 1)
    if not 0 < sums[2] < rows:
        return None
    entropy = -label * math.log(label) - (1 - label) * math.log(1 - label)
    ne = loss / entropy
    slope = ne * math.log((1 - label) / label)
    # A row's influence is ((l - mean l) - slope (y - mean y)) / entropy.
    ll, ly, yy = sums[4] / rows - loss**2, sums[5] / rows - loss * label, label - label**2
    variance = max(ll - 2 * slope * ly + slope**2 * yy, 0.0) / entropy**2
    return float(ne), math.sqrt(variance / rows)


def calibration_of(sums: Floats) -> tuple[float, float] | None:
    """Predicted divided by actual clicks and its standard error by the delta method; None: there are none."""
    rows, label, predicted = sums[0], sums[2], sums[3]
    if not label or not predicted:
        return None
    value = predicted / label
    # A row's influence is (p - value y) / mean y; its mean is 0.
    variance = max(sums[6] - 2 * value * sums[7] + value**2 * label, 0.0) / rows / (label / rows) ** 2
    return float(value), math.sqrt(variance / rows)


def counts_of(scores: Floats, edges: Floats) -> Floats:
    """Rows [K] in each bin of ``edges`` [K - 1], see :func:`score_histogram`."""
    return np.bincount(np.searchsorted(edges, scores, side="left"), minlength=len(edges) + 1).astype(float)


def _column(values: ArrayLike, what: str) -> Floats:
    values = values.detach().cpu().numpy() if hasattr(values, "detach") else values  # a tensor on any device
    try:
        column = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{what} must be numbers.") from None
    if column.ndim != 1:
        raise ValueError(f"{what} must have one dimension, not shape {list(column.shape)}.")
    return column


def probabilities_of(values: ArrayLike) -> Floats:
    """``values`` as float64 [n].

    Raises:
        ValueError: not one dimension, or a value outside [0, 1]; names the row.
    """
    column = _column(values, "probabilities")
    wrong = ~((column >= 0) & (column <= 1))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"probabilities must lie between 0 and 1: row {row} has {column[row]}.")
    return column


def labels_of(values: ArrayLike, rows: int) -> Floats:
    """``values`` as float64 [rows].

    Raises:
        ValueError: another number of them, or a value that is neither 0 nor 1; names the row.
    """
    column = _column(values, "labels")
    if len(column) != rows:
        raise ValueError(f"there are {len(column)} labels for {rows} probabilities.")
    wrong = (column != 0) & (column != 1)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"labels must be 0 or 1: row {row} has {column[row]}.")
    return column
