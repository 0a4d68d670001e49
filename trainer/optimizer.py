"""Optimizers of tables and dense layers, and the learning-rate schedule over both."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

TableOptimizerName = Literal["sgd", "adagrad", "rowwise_adagrad", "adam"]

_FUSED: dict[TableOptimizerName, EmbOptimType] = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adam": EmbOptimType.ADAM,
}


def _require_positive(config: Any, where: str, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0 or not math.isfinite(getattr(config, name)):
            raise ValueError(f"{where}.{name}={getattr(config, name)} must be a finite number above 0.")


@dataclass(frozen=True, kw_only=True)
class TableOptimizer:
    """The optimizer fused into the backward of the table lookup."""

    name: TableOptimizerName = "rowwise_adagrad"
    """``rowwise_adagrad`` keeps one number a row. ``adam`` exists on CUDA only. Data-parallel tables have no
    fused optimizer: the dense one trains them."""

    lr: float = 0.05
    """Learning rate before the schedule's factor."""

    eps: float = 1e-8
    """Added to the denominator (adagrad, rowwise_adagrad, adam)."""

    def __post_init__(self) -> None:
        _require_positive(self, "optimizer.tables", "lr", "eps")

    def floats_per_value(self, dim: int) -> float:
        """Floats of optimizer state a float of table, for rows of ``dim`` values."""
        return {"sgd": 0.0, "adagrad": 1.0, "rowwise_adagrad": 1.0 / dim, "adam": 2.0}[self.name]


@dataclass(frozen=True, kw_only=True)
class DenseOptimizer:
    """The optimizer of the MLPs, the interaction and data-parallel tables."""

    name: Literal["sgd", "adagrad", "adam"] = "adagrad"
    """A ``torch.optim`` class."""

    lr: float = 0.02
    """Learning rate before the schedule's factor."""

    eps: float = 1e-8
    """Added to the denominator (adagrad, adam)."""

    weight_decay: float = 0.0
    """L2 penalty."""

    clip_norm: float | None = None
    """Clip the norm of all dense gradients together; tables' gradients are applied inside backward and are
    not clipped."""

    def __post_init__(self) -> None:
        _require_positive(self, "optimizer.dense", "lr", "eps")
        if self.weight_decay < 0:
            raise ValueError(f"optimizer.dense.weight_decay={self.weight_decay} must not be negative.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"optimizer.dense.clip_norm={self.clip_norm} must be above 0, or null.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Both optimizers."""

    tables: TableOptimizer = TableOptimizer()
    """Of the embedding tables."""

    dense: DenseOptimizer = DenseOptimizer()
    """Of everything else."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning-rate factor by step, the same for tables and dense layers."""

    warmup_steps: int = 0
    """Steps over which the factor rises linearly to 1."""

    decay: Literal["constant", "linear", "cosine", "poly"] = "constant"
    """Shape of the fall from 1 to ``end`` between the two decay settings."""

    decay_start: int = 0
    """First step of the decay; not before the end of the warm-up."""

    decay_steps: int = 0
    """Length of the decay in steps; required unless constant."""

    end: float = 0.0
    """Factor after the decay."""

    power: float = 2.0
    """Exponent (poly only); 2 is MLPerf's DLRM schedule."""

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "decay_start", "decay_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"schedule.{name}={getattr(self, name)} must not be negative.")
        if self.decay != "constant" and self.decay_steps < 1:
            raise ValueError(f"schedule.decay={self.decay} needs schedule.decay_steps of at least 1.")
        if self.decay != "constant" and self.decay_start < self.warmup_steps:
            raise ValueError(
                f"schedule.decay_start={self.decay_start} lies inside the warm-up of "
                f"{self.warmup_steps} steps. Start the decay after it."
            )
        if not 0 <= self.end <= 1:
            raise ValueError(f"schedule.end={self.end} must lie in [0, 1].")
        if not self.power > 0:
            raise ValueError(f"schedule.power={self.power} must be above 0.")

    def factor(self, step: int) -> float:
        """The factor of step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant" or step < self.decay_start:
            return 1.0
        done = min(1.0, (step - self.decay_start + 1) / self.decay_steps)
        left = {
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "poly": (1 - done) ** self.power,
        }[self.decay]
        return self.end + (1 - self.end) * left


def fused_parameters(config: TableOptimizer, device: torch.device) -> dict[str, Any]:
    """The sharder's ``fused_params``.

    Raises:
        ValueError: adam on CPU, which fbgemm does not have.
    """
    if config.name == "adam" and device.type == "cpu":
        raise ValueError(
            "optimizer.tables.name=adam does not run on CPU: fbgemm's CPU operators have sgd, adagrad and "
            "rowwise_adagrad. Use one of them, or train on CUDA."
        )
    parameters: dict[str, Any] = {"optimizer": _FUSED[config.name], "learning_rate": config.lr}
    return parameters if config.name == "sgd" else parameters | {"eps": config.eps}


def build_optimizer(model: nn.Module, config: DenseOptimizer) -> CombinedOptimizer:
    """The fused optimizer of a sharded ``model`` (a DistributedModelParallel) and the dense one together."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        if config.name == "sgd":
            return torch.optim.SGD(parameters, lr=config.lr, weight_decay=config.weight_decay)
        kind = {"adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}[config.name]
        return kind(parameters, lr=config.lr, eps=config.eps, weight_decay=config.weight_decay)

    parameters: Mapping[str, nn.Parameter] = dict(in_backward_optimizer_filter(model.named_parameters()))
    dense: KeyedOptimizer = KeyedOptimizerWrapper(parameters, make)
    if config.clip_norm is not None:
        dense = GradientClippingOptimizer(
            dense, clipping=GradientClipping.NORM, max_gradient=config.clip_norm, norm_type=2.0
        )
    return CombinedOptimizer([model.fused_optimizer, dense])


class LearningRate:
    """Sets every parameter group's rate from the schedule; a function of the step, so it keeps no state."""

    def __init__(
        self, optimizer: CombinedOptimizer, config: OptimizerConfig, schedule: ScheduleConfig
    ) -> None:
        self._schedule = schedule
        self.factor = 1.0
        """The factor in force."""
        (_, fused), *dense = optimizer.optimizers
        # Base rates come from the configuration and not from the groups: a loaded checkpoint has put
        # scheduled rates there.
        self._groups = [(group, config.tables.lr) for group in fused.param_groups]
        self._groups += [(group, config.dense.lr) for _, o in dense for group in o.param_groups]

    def set(self, step: int) -> None:
        """Set the rates of step ``step`` (from 0), before its forward."""
        self.factor = self._schedule.factor(step)
        for group, base in self._groups:
            group["lr"] = base * self.factor
