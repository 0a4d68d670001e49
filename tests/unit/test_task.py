"""The loss: every row counts the same, padding counts for nothing."""

import numpy as np
import torch
from torch.nn import functional

from tightrec.formats.columns import Bags, Columns
from tightrec.formats.schema import Schema, SparseColumn
from tightrec.models.config import ModelConfig
from tightrec.models.dlrm import DLRM, build_tables
from tightrec.trainer.data.batch import to_batch
from tightrec.trainer.task import ClickTask, predict

CPU = torch.device("cpu")
SCHEMA = Schema(
    dense=("d",),
    sparse=(SparseColumn(name="user", cardinality=9),),
    label="y",
    rows={"train": 3},
    source="a test",
)
ROWS = Columns(
    dense=np.array([[0.5], [1.0], [2.0]], np.float32),
    labels=np.array([1, 0, 1], np.float32),
    sparse=(Bags(np.array([1, 4, 8])),),
)


def _task() -> ClickTask:
    torch.manual_seed(0)
    config = ModelConfig(embedding_dim=4, bottom_layers=(4,), top_layers=(4,))
    return ClickTask(DLRM(build_tables([("user", 9)], config, CPU), 1, config, CPU))


def test_padding_adds_nothing_to_loss_and_gradients():
    whole, padded = _task(), _task()
    loss_of_rows, _ = whole(to_batch(ROWS, SCHEMA, 3))
    loss_of_padded, predictions = padded(to_batch(ROWS, SCHEMA, 12))
    # The mean divides by 12 instead of 3 rows: a row's share of a step is that of a full batch.
    assert torch.allclose(loss_of_padded, loss_of_rows / 4)
    (loss_of_rows / 4).backward()
    loss_of_padded.backward()
    for one, other in zip(whole.parameters(), padded.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-7)
    assert not predictions.logits.requires_grad
    assert predictions.batch.weights.sum() == 3


def test_a_full_batch_has_the_plain_mean():
    batch = to_batch(ROWS, SCHEMA, 3)
    loss, predictions = _task()(batch)
    plain = functional.binary_cross_entropy_with_logits(predictions.logits, batch.labels)
    assert torch.equal(loss.detach(), plain)


def test_predictions_are_probabilities_without_a_graph():
    probabilities = predict(_task().eval(), to_batch(ROWS, SCHEMA, 3))
    assert probabilities.shape == (3,)
    assert not probabilities.requires_grad
    assert ((probabilities > 0) & (probabilities < 1)).all()
