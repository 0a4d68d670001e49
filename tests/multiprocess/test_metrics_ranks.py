"""Scores over several gloo ranks are those of one rank that has all rows, on every rank alike."""

import dataclasses

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch import distributed as dist

from tightrec.models.scores import Scores
from tightrec.trainer.metrics import Evaluation, MetricsConfig, TrainWindow

CPU = torch.device("cpu")
SHARES = {1: (1.0,), 2: (1.0, 0.0), 3: (0.5, 0.0, 0.5)}
"""Share of the rows by rank; with several ranks one has none."""

pytestmark = pytest.mark.multiprocess


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    # Rounded, so that ties lie across ranks.
    logits = torch.randn(701, generator=generator).round(decimals=1) - 1
    return logits, (torch.rand(701, generator=generator) < logits.sigmoid()).float()


def numbers(scores: Scores) -> list[float]:
    return [value for value in dataclasses.astuple(scores) if not isinstance(value, str)]


def measured(rank: int, world: int, auc: str, shares: tuple[float, ...]) -> list[Scores]:
    logits, labels = rows()
    ends = [round(len(logits) * sum(shares[:n])) for n in range(world + 1)]
    own = slice(ends[rank], ends[rank + 1])
    group = dist.group.WORLD if dist.is_initialized() else None
    scores = []
    for one in (Evaluation(MetricsConfig(auc=auc), CPU), TrainWindow(CPU)):
        for some, label in zip(logits[own].split(64), labels[own].split(64), strict=True):
            one.update(some, label, torch.ones(len(some)))
        scores.append(one.compute(group))
        # Computing must not count other ranks' rows into this one's.
        assert one.compute(group).rows == scores[-1].rows
    return scores


@pytest.mark.parametrize("auc", ["binned", "exact"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_together_score_as_one(auc: str, world: int) -> None:
    (expected, expected_window) = measured(0, 1, auc, SHARES[1])
    for evaluation, window in run_ranks(world, measured, auc, SHARES[world]):
        assert numbers(evaluation) == pytest.approx(numbers(expected), rel=1e-12)
        assert evaluation.note == ""
        assert evaluation.rows == window.rows == 701
        assert window.ne == pytest.approx(expected_window.ne, rel=1e-12)


def nothing_anywhere(rank: int, world: int) -> list[str]:
    configs = (MetricsConfig(auc="exact"), MetricsConfig())
    return [Evaluation(config, CPU).compute(dist.group.WORLD).note for config in configs]


def test_no_rows_on_any_rank_is_told() -> None:
    assert run_ranks(2, nothing_anywhere) == [["there were no rows"] * 2] * 2
