"""What a verification finds between two models on the same rows."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tightrec.formats.columns import Bags, Columns
from tightrec.models.scores import score
from tightrec.snapshot.verify import Verification, ne_loss, verify

ROWS = 4_001


def columns(labels: np.ndarray | None = None) -> Columns:
    """Rows whose one dense value is the true logit."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (ROWS, 1)).astype(np.float32)
    drawn = generator.random(ROWS) < 1 / (1 + np.exp(-logits[:, 0]))
    ids = np.zeros(ROWS, np.int64)
    return Columns(logits, (drawn if labels is None else labels).astype(np.float32), (Bags(ids),))


def exact(dense: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    return dense[:, 0]


def halved(dense: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    return dense[:, 0] / 2


def compare(served, budget_ne: float = 0.0002, rows: Columns | None = None) -> Verification:
    rows = columns() if rows is None else rows
    return verify(
        exact,
        rows,
        served,
        rows,
        split="test",
        budget_ne=budget_ne,
        batch_size=300,
        float32_bytes=400,
        snapshot_bytes=100,
    )


def test_a_model_beside_itself_loses_nothing_and_passes_a_budget_of_nothing() -> None:
    found = compare(exact, budget_ne=0)
    assert found.passed
    assert (found.ne_loss, found.ne_loss_error, found.worst_change, found.p999_change) == (0, 0, 0, 0)
    assert found.float32 == found.snapshot
    assert found.rows == ROWS


def test_figures_are_those_of_all_rows() -> None:
    rows = columns()
    found = compare(halved, rows=rows)
    logits, labels = torch.from_numpy(rows.dense[:, 0]), torch.from_numpy(rows.labels)
    before, after = score(logits, labels), score(logits / 2, labels)
    for name in ("ne", "auc", "log_loss", "calibration"):
        assert found.float32[name] == pytest.approx(getattr(before, name))
        assert found.snapshot[name] == pytest.approx(getattr(after, name))
    assert found.ne_loss == pytest.approx(after.ne / before.ne - 1)
    change = (logits.double().sigmoid() - (logits.double() / 2).sigmoid()).abs().sort().values
    assert found.worst_change == pytest.approx(float(change[-1]))
    assert found.p999_change == pytest.approx(float(change[math.ceil(0.999 * ROWS) - 1]))


def test_all_but_a_thousandth_of_the_rows_change_by_at_most_what_it_says() -> None:
    rows = columns()
    # Every probability moves by an amount of its own: from 0.5 to itself.
    found = compare(lambda dense, ids, offsets: 0 * dense[:, 0], rows=rows)
    change = (torch.from_numpy(rows.dense[:, 0]).double().sigmoid() - 0.5).abs()
    assert int((change > found.p999_change).sum()) == ROWS // 1000
    assert int((change >= found.p999_change).sum()) == ROWS // 1000 + 1


def test_logits_that_are_known_already_are_taken() -> None:
    rows = columns()
    known = verify(
        exact,
        rows,
        exact,
        rows,
        split="test",
        budget_ne=0.5,
        batch_size=300,
        float32_bytes=4,
        snapshot_bytes=1,
        logits=torch.from_numpy(rows.dense[:, 0]) / 2,
    )
    assert known.ne_loss == compare(halved).ne_loss > 0


def test_the_budget_decides() -> None:
    loss = compare(halved).ne_loss
    assert loss > 0.01
    assert not compare(halved, budget_ne=loss * 0.999).passed
    assert compare(halved, budget_ne=loss * 1.001).passed
    assert "REFUSED" in compare(halved).sentence
    assert "verified on 4,001 test rows" in compare(halved, budget_ne=0.9).sentence
    assert "25.0% of float32's size" in compare(halved).sentence


def test_scores_that_are_not_numbers_pass_no_budget() -> None:
    found = compare(lambda dense, ids, offsets: dense[:, 0] * math.nan, budget_ne=0.9)
    assert not found.passed


@pytest.mark.parametrize("label", [0, 1])
def test_rows_of_one_label_verify_nothing(label: int) -> None:
    with pytest.raises(ValueError, match=f"test rows cannot verify anything: all 4001 labels are {label}"):
        compare(exact, rows=columns(np.full(ROWS, label)))


def test_no_rows_verify_nothing() -> None:
    with pytest.raises(ValueError, match="there were no rows"):
        compare(exact, rows=columns().slice(0, 0))


def test_the_standard_error_is_that_of_samples() -> None:
    """Over many samples of rows the loss scatters by what each sample says."""
    generator = torch.Generator().manual_seed(0)
    losses, errors = [], []
    for _ in range(300):
        logits = torch.randn(1_000, generator=generator)
        labels = (torch.rand(1_000, generator=generator) < logits.sigmoid()).float()
        loss, error = ne_loss(logits, 0.9 * logits, labels)
        losses.append(loss)
        errors.append(error)
    assert float(torch.tensor(losses).std()) == pytest.approx(sum(errors) / len(errors), rel=0.2)
