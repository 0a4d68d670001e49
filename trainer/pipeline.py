"""How steps are run: torchrec's overlapping pipeline, or one thing after another."""

from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from torch import nn
from torch.profiler import record_function
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule
from torchrec.optim.keyed import CombinedOptimizer

from tightrec.trainer.data.batch import Batch
from tightrec.trainer.task import Predictions

PipelineName = Literal["auto", "sparse_dist", "plain"]


class Pipeline(Protocol):
    """Runs one step a call; in evaluation mode of the task, only its forward."""

    def progress(self, batches: Iterator[Batch]) -> Predictions:
        """Run the next batch.

        Raises:
            StopIteration: no batch is left.
        """
        ...


class PlainLoop:
    """Copy, forward, backward, update: no overlap, any device, any model."""

    def __init__(self, task: nn.Module, optimizer: CombinedOptimizer, device: torch.device) -> None:
        self._task = task
        self._optimizer = optimizer
        self._device = device

    def progress(self, batches: Iterator[Batch]) -> Predictions:
        """Run the next batch."""
        batch = next(batches).to(self._device, non_blocking=True)
        if self._task.training:
            self._optimizer.zero_grad()
        loss, predictions = self._task(batch)
        if self._task.training:
            with record_function("## backward ##"):
                loss.backward()
            with record_function("## optimizer ##"):
                self._optimizer.step()
        return predictions


def build_pipeline(
    name: PipelineName, task: nn.Module, optimizer: CombinedOptimizer, device: torch.device
) -> Pipeline:
    """The pipeline ``name``; ``auto`` is torchrec's TrainPipelineSparseDist, which runs on CPU and CUDA.

    It fetches two batches ahead and sends the ids of the next batch during the forward of this one.
    Both compute the same numbers, bit for bit. A task without a sharded table has no ids to send, which
    torchrec's pipeline does not take: it gets the plain one.
    """
    if name == "plain" or not any(isinstance(module, ShardedModule) for module in task.modules()):
        return PlainLoop(task, optimizer, device)
    return TrainPipelineSparseDist(task, optimizer, device, execute_all_batches=True)


class Drained(Iterator[Batch]):
    """The next ``count`` batches of a stream, marked for the profiler.

    A pipeline that looks ahead runs dry at the end of each such segment, so that nothing is in flight
    when the loop evaluates or saves.
    """

    def __init__(self, batches: Iterator[Batch], count: int) -> None:
        self._batches = batches
        self._left = count

    def __next__(self) -> Batch:
        """The next batch; its wait counts as ``data`` in the step's time split."""
        if self._left <= 0:
            raise StopIteration
        self._left -= 1
        with record_function("tightrec::data"):
            return next(self._batches)
