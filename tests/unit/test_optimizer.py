"""Schedules by hand-computed values, optimizers that exist, and words for those that do not."""

import pytest
import torch

from tightrec.trainer.optimizer import (
    DenseOptimizer,
    ScheduleConfig,
    TableOptimizer,
    fused_parameters,
)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {0: 1.0, 10**6: 1.0}),
        ({"warmup_steps": 4}, {0: 0.25, 2: 0.75, 3: 1.0, 4: 1.0}),
        (
            {"decay": "linear", "decay_start": 2, "decay_steps": 4, "end": 0.2},
            {1: 1.0, 2: 0.8, 3: 0.6, 5: 0.2, 99: 0.2},
        ),
        ({"decay": "poly", "decay_steps": 2, "power": 2.0}, {0: 0.25, 1: 0.0, 2: 0.0}),
        ({"decay": "cosine", "decay_steps": 2}, {0: 0.5, 1: 0.0}),
        (
            {"warmup_steps": 2, "decay": "linear", "decay_start": 2, "decay_steps": 2},
            {0: 0.5, 1: 1.0, 2: 0.5},
        ),
    ],
)
def test_the_schedule_has_the_values_its_words_say(config, expected):
    schedule = ScheduleConfig(**config)
    for step, factor in expected.items():
        assert schedule.factor(step) == pytest.approx(factor, abs=1e-12), step


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"decay": "linear"}, "needs schedule.decay_steps"),
        ({"decay": "linear", "decay_steps": 5, "warmup_steps": 9, "decay_start": 3}, "inside the warm-up"),
        ({"end": 1.5}, "end=1.5"),
        ({"power": 0}, "power=0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        ScheduleConfig(**config)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (TableOptimizer, {"lr": 0}, "optimizer.tables.lr=0"),
        (TableOptimizer, {"lr": float("nan")}, "finite"),
        (DenseOptimizer, {"eps": -1}, "optimizer.dense.eps=-1"),
        (DenseOptimizer, {"clip_norm": 0}, "clip_norm=0"),
        (DenseOptimizer, {"weight_decay": -0.1}, "weight_decay=-0.1"),
    ],
)
def test_rates_that_make_no_sense_are_refused(kind, fields, words):
    with pytest.raises(ValueError, match=words):
        kind(**fields)


def test_adam_tables_are_refused_by_name_on_cpu_only():
    adam = TableOptimizer(name="adam")
    with pytest.raises(ValueError, match=r"optimizer.tables.name=adam does not run on CPU"):
        fused_parameters(adam, torch.device("cpu"))
    assert fused_parameters(adam, torch.device("cuda", 0))["learning_rate"] == adam.lr


def test_sgd_takes_no_eps():
    assert "eps" not in fused_parameters(TableOptimizer(name="sgd"), torch.device("cpu"))
