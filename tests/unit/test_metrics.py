"""Scores of click predictions against those of torchrec and torchmetrics, and rows that say nothing."""

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import BinaryAUROC
from torchrec.metrics.calibration import compute_calibration
from torchrec.metrics.ne import compute_cross_entropy, compute_ne

from tightrec.models.scores import Scores, auc_of_groups
from tightrec.trainer.metrics import Evaluation, MetricsConfig, TrainWindow

CPU = torch.device("cpu")
ETA = 1e-12


def clicks(rows: int, rate: float, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [rows] of a model that knows the truth of about ``rate``, and labels drawn from it."""
    generator = torch.Generator().manual_seed(seed)
    logits = math.log(rate / (1 - rate)) + spread * torch.randn(rows, generator=generator)
    return logits, (torch.rand(rows, generator=generator) < logits.sigmoid()).float()


def scored(config: MetricsConfig, logits: Tensor, labels: Tensor, batch: int = 1000) -> Scores:
    evaluation = Evaluation(config, CPU)
    for some_logits, some_labels in zip(logits.split(batch), labels.split(batch), strict=True):
        evaluation.update(some_logits, some_labels, torch.ones(len(some_labels)))
    return evaluation.compute()


def test_log_loss_ne_and_calibration_are_torchrecs() -> None:
    logits, labels = clicks(5000, 0.05, 1.2)
    scores = scored(MetricsConfig(), logits, labels)
    ones, positive = torch.ones(5000, dtype=torch.float64), labels.double()
    predictions = logits.double().sigmoid()
    entropy = compute_cross_entropy(positive, predictions.clone(), ones, ETA).sum()
    ne = compute_ne(entropy, ones.sum(), positive.sum(), (1 - positive).sum(), ETA)
    assert scores.ne == pytest.approx(float(ne), rel=1e-9)
    # torchrec's cross entropy is in bits.
    assert scores.log_loss == pytest.approx(float(entropy) * math.log(2) / 5000, rel=1e-9)
    assert scores.calibration == pytest.approx(float(compute_calibration(predictions.sum(), positive.sum())))
    assert (scores.rows, scores.base_rate) == (5000, pytest.approx(float(labels.mean())))
    assert scores.note == ""


@pytest.mark.parametrize("decimals", [None, 1], ids=["distinct", "with ties"])
def test_exact_auc_is_torchmetrics(decimals: int | None) -> None:
    logits, labels = clicks(3000, 0.2, 1.0)
    if decimals is not None:
        logits = logits.round(decimals=decimals)
    expected = BinaryAUROC(thresholds=None)(logits.double().sigmoid(), labels.int())
    assert scored(MetricsConfig(auc="exact"), logits, labels).auc == pytest.approx(float(expected), abs=1e-6)


def test_a_tie_between_a_click_and_a_non_click_counts_half() -> None:
    # Pairs (click, other): 3 > 1, 3 > 2, 2 > 1 right, 2 = 2 tied: 3.5 of 4.
    logits, labels = torch.tensor([3.0, 2.0, 2.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert scored(MetricsConfig(auc="exact"), logits, labels).auc == 3.5 / 4
    assert scored(MetricsConfig(), logits, labels).auc == 3.5 / 4
    assert auc_of_groups(torch.tensor([0.0, 1, 1]), torch.tensor([1.0, 1, 0])) == 3.5 / 4


@pytest.mark.parametrize(
    ("rate", "spread", "shift"),
    [
        (0.3, 1.0, 0.0),
        (0.003, 1.5, 0.0),
        (0.0005, 1.0, 0.0),
        (0.2, 0.02, 0.0),
        (0.3, 30.0, 0.0),
        (0.3, 1.0, -60.0),
    ],
    ids=["usual", "rare", "very rare", "almost constant", "far too sure", "far off"],
)
def test_binned_auc_is_within_1e_4_of_exact(rate: float, spread: float, shift: float) -> None:
    logits, labels = clicks(60_000, rate, spread)
    logits = logits + shift
    binned = scored(MetricsConfig(), logits, labels, batch=20_000).auc
    assert binned == pytest.approx(scored(MetricsConfig(auc="exact"), logits, labels).auc, abs=1e-4)


@pytest.mark.parametrize("auc", ["binned", "exact"])
def test_padding_rows_change_nothing_whatever_they_hold(auc: str) -> None:
    config = MetricsConfig(auc=auc)
    logits, labels = clicks(500, 0.3, 1.0)
    evaluation, window = Evaluation(config, CPU), TrainWindow(CPU)
    for one in (evaluation, window):
        one.update(
            torch.cat([logits, torch.tensor([math.nan, math.inf, 9.0])]),
            torch.cat([labels, torch.tensor([0.0, 1.0, 1.0])]),
            torch.cat([torch.ones(500), torch.zeros(3)]),
        )
    plain = scored(config, logits, labels)
    padded = evaluation.compute()
    assert (padded.rows, padded.note) == (500, "")
    for name in ("log_loss", "ne", "auc", "calibration", "base_rate"):
        assert getattr(padded, name) == pytest.approx(getattr(plain, name), rel=1e-12), name
    assert window.compute().log_loss == pytest.approx(plain.log_loss, rel=1e-12)
    assert window.compute().ne == pytest.approx(plain.ne, rel=1e-12)
    assert math.isnan(window.compute().auc)


@pytest.mark.parametrize("auc", ["binned", "exact"])
@pytest.mark.parametrize(
    ("logits", "labels", "reason"),
    [
        ([], [], "no rows"),
        ([0.5, -1.0], [0.0, 0.0], "all 2 labels are 0"),
        ([0.5, -1.0], [1.0, 1.0], "all 2 labels are 1"),
        ([math.nan, 1.0, -1.0], [0.0, 1.0, 0.0], "1 of 3 logits are not finite"),
        ([math.inf, 1.0, -math.inf], [1.0, 1.0, 0.0], "2 of 3 logits are not finite"),
    ],
)
def test_rows_that_do_not_say_give_nan_with_a_reason(
    auc: str, logits: list[float], labels: list[float], reason: str
) -> None:
    scores = scored(MetricsConfig(auc=auc), torch.tensor(logits), torch.tensor(labels), batch=1)
    assert math.isnan(scores.auc)
    assert reason in scores.note
    if "labels" in reason:
        assert math.isnan(scores.ne)
        assert math.isfinite(scores.log_loss)


def test_an_evaluation_without_a_single_batch_has_scores() -> None:
    for auc in ("binned", "exact"):
        scores = Evaluation(MetricsConfig(auc=auc), CPU).compute()
        assert (scores.rows, math.isnan(scores.log_loss), scores.note) == (0, True, "there were no rows")


def test_updates_never_read_the_device_back() -> None:
    # A tensor on the meta device has no values: whatever reads one, as a synchronisation does, raises.
    meta = torch.device("meta")
    batch = [torch.empty(8, device=meta) for _ in range(3)]
    TrainWindow(meta).update(*batch)
    Evaluation(MetricsConfig(), meta).update(*batch)
    with pytest.raises(NotImplementedError):
        Evaluation(MetricsConfig(auc="exact"), meta).update(*batch)


def test_low_precision_logits_are_scored_in_float64() -> None:
    logits, labels = clicks(2000, 0.2, 1.0)
    low = logits.to(torch.bfloat16)
    assert scored(MetricsConfig(), low, labels) == scored(MetricsConfig(), low.float(), labels)


@pytest.mark.parametrize("bins", [0, 255, 2**24 + 1])
def test_a_useless_number_of_bins_is_refused(bins: int) -> None:
    with pytest.raises(ValueError, match=f"train.metrics.bins={bins} must lie between"):
        MetricsConfig(bins=bins)
