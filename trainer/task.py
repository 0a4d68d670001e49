"""What a training step computes from a batch: logits and the loss."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tightrec.models.dlrm import DLRM
from tightrec.trainer.data.batch import Batch


class Predictions(NamedTuple):
    """What a step hands on to metrics and checks; nothing holds a graph."""

    loss: Tensor
    """Scalar: mean log loss over the B rows of the batch, padding rows as 0."""

    logits: Tensor
    """[B]"""

    batch: Batch
    """The batch on the device, with labels [B] and weights [B]."""


class ClickTask(nn.Module):
    """Binary cross-entropy of a model's logits; the module that is sharded and pipelined.

    Padding rows weigh 0 while the mean divides by the whole batch size: a row counts the same in a
    full batch, in a rank's short last one and beside ranks that have none left.
    """

    def __init__(self, model: DLRM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Predictions]:
        """The loss to differentiate (scalar) and what metrics need, as torchrec's pipelines expect."""
        logits = self.model(batch.dense, batch.sparse)
        loss = functional.binary_cross_entropy_with_logits(logits, batch.labels, weight=batch.weights)
        return loss, Predictions(loss.detach(), logits.detach(), batch)


def predict(task: nn.Module, batch: Batch) -> Tensor:
    """Click probabilities [B] of a batch, in evaluation mode of whatever wraps the task."""
    with torch.no_grad():
        return torch.sigmoid(task(batch)[1].logits)
