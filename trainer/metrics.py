"""Log loss, normalised entropy, AUC and calibration of click predictions, over all ranks.

Shapes: B rows of one batch. A row's weight is 1, or 0 where the row only fills up a batch.

Accumulating is a handful of operations on the device that holds the logits and never waits for it; the ranks
meet once, in ``compute``, where every sum travels in one float64 all-reduce.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional

from tightrec.models.scores import SUMS, Scores, auc_of_groups, auc_of_rows, row_sums, scores_of

_SQUASH = 8.0
"""Logits z are binned by z / (8 + |z|): finest near 0, unbounded range, no logit out of reach."""


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """How predictions are scored."""

    auc: Literal["binned", "exact"] = "binned"
    """``binned``: from two histograms of the logits, in constant memory. ``exact``: keeps every logit of the
    evaluation on its rank and gathers all of them on every rank at the end, 12 bytes a row."""

    bins: int = 65_536
    """Bins of each histogram (``binned`` only). 65,536 keep the AUC within 1e-5 of the exact one, within 1e-4
    where the logits' standard deviation is as small as 0.01."""

    def __post_init__(self) -> None:
        if not 256 <= self.bins <= 2**24:
            raise ValueError(f"train.metrics.bins={self.bins} must lie between 256 and {2**24}.")


class TrainWindow:
    """Running log loss and NE of the training steps since it was made; has no AUC.

    Args:
        device: where logits, labels and weights will be.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(SUMS, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Add a step's rows; does not synchronise the device.

        Args:
            logits: [B], any float type.
            labels: [B], 0 or 1.
            weights: [B], 1, or 0 for a row to ignore.
        """
        self._sums += row_sums(logits, labels, weights)

    def compute(self, process_group: dist.ProcessGroup | None = None) -> Scores:
        """Scores of all rows of all ranks of ``process_group``, a collective; None: of this rank alone.

        Args:
            process_group: must take tensors in host memory (gloo).
        """
        return scores_of(_reduced(self._sums, process_group), math.nan, "AUC is not kept over training steps")


class Evaluation:
    """Scores over an evaluation's batches.

    Args:
        config: how AUC is computed.
        device: where logits, labels and weights will be.
    """

    def __init__(self, config: MetricsConfig, device: torch.device) -> None:
        self._config = config
        bins = config.bins if config.auc == "binned" else 0
        # One buffer, so that one collective carries it: the sums, then clicks and non-clicks a bin.
        self._buffer = torch.zeros(SUMS + 2 * bins, dtype=torch.float64, device=device)
        self._rows: list[Tensor] = []

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Add a batch; with binned AUC in constant memory and without synchronising the device.

        Args:
            logits: [B], any float type.
            labels: [B], 0 or 1.
            weights: [B], 1, or 0 for a row to ignore.
        """
        self._buffer[:SUMS] += row_sums(logits, labels, weights)
        logits = logits.float()
        if self._config.auc == "exact":
            self._rows.append(torch.stack([logits, labels.float(), weights.float()]).cpu())
            return
        bins = self._config.bins
        place = (1 + logits / (_SQUASH + logits.abs())) * (bins / 2)
        # Not-a-number goes to bin 0 to stay in range; _sums counts it and no AUC is made of it.
        index = place.nan_to_num(0.0).long().clamp_(0, bins - 1) + bins * (labels < 0.5)
        self._buffer[SUMS:].index_add_(0, index, weights.double())

    def compute(self, process_group: dist.ProcessGroup | None = None) -> Scores:
        """Scores of all rows of all ranks of ``process_group``, a collective; None: of this rank alone.

        Args:
            process_group: must take tensors in host memory (gloo).
        """
        buffer = _reduced(self._buffer, process_group)
        if self._config.auc == "exact":
            rows = torch.cat(self._rows, dim=1) if self._rows else torch.zeros(3, 0)
            auc = auc_of_rows(*_gathered(rows, process_group))
        else:
            clicks, others = buffer[SUMS:].view(2, -1)
            auc = auc_of_groups(clicks, others)
        return scores_of(buffer[:SUMS], auc)


def _reduced(values: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the group's ranks, in host memory; ``values`` stay as they are."""
    total = values.detach().to("cpu", copy=True)
    if process_group is not None:
        dist.all_reduce(total, group=process_group)
    return total


def _gathered(rows: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """Columns [3, any] of all ranks side by side, among them some of weight 0.

    gloo gathers equal sizes only: every rank fills up to the longest.
    """
    if process_group is None:
        return rows
    most = torch.tensor(rows.shape[1])
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=process_group)
    padded = functional.pad(rows, (0, int(most) - rows.shape[1]))
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(parts, padded, group=process_group)
    return torch.cat(parts, dim=1)
