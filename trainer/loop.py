"""The training loop: steps, evaluations, checkpoints, and an end that all ranks agree on."""

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import distributed as dist
from torch import nn

from tightrec.formats.checkpoint_files import find_checkpoints, step_of
from tightrec.models.scores import Scores
from tightrec.sharding.traffic import Traffic
from tightrec.trainer.checkpoint import Checkpointer
from tightrec.trainer.config import TrainConfig
from tightrec.trainer.control import Control, NotANumber
from tightrec.trainer.data.batch import Batch
from tightrec.trainer.data.loader import Loader
from tightrec.trainer.data.shards import Position
from tightrec.trainer.exchange_watch import ExchangeWatch
from tightrec.trainer.metrics import Evaluation, TrainWindow
from tightrec.trainer.optimizer import LearningRate
from tightrec.trainer.pipeline import Drained, Pipeline
from tightrec.trainer.ranks import Ranks
from tightrec.trainer.report.run_log import RunLog
from tightrec.trainer.timing import StepProfiler
from tightrec.trainer.trace import StepTrace


class _StopAgreed(Exception):
    """All ranks have agreed to stop here."""


@dataclass
class Progress:
    """Where training stands; saved with every checkpoint."""

    step: int
    """Steps done."""

    position: Position
    """What of the training split has been read; it knows its epoch."""

    evaluation_due: bool = False
    """Whether the validation that belongs to this step is still to come."""


@dataclass(kw_only=True)
class Outcome:
    """How the loop ended and what it measured."""

    status: Literal["finished", "stopped"] = "finished"
    scores: dict[str, Scores] = field(default_factory=dict)
    """Last scores by split."""

    rows: int = 0
    """Real rows trained on, all ranks."""

    seconds: float = 0.0
    """Time spent in training steps; evaluations and checkpoints not counted."""

    steps: int = 0
    """Training steps of this process's life."""

    sent_bytes: dict[str, int] = field(default_factory=lambda: {"input": 0, "forward": 0, "backward": 0})
    """Bytes between ranks in training steps, all ranks together, by purpose."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Runs a sharded task over its data.

    Evaluations and checkpoints happen between segments of steps, when the pipeline has run dry, so that no
    batch is in flight.
    """

    config: TrainConfig
    ranks: Ranks
    task: nn.Module
    optimizer: Any
    pipeline: Pipeline
    learning_rate: LearningRate
    loaders: dict[str, Loader]
    control: Control
    checkpointer: Checkpointer
    traffic: Traffic
    exchange: ExchangeWatch
    profiler: StepProfiler
    trace: StepTrace
    log: RunLog
    about: Mapping[str, Any]
    """What every checkpoint says of itself: model, schema, data."""

    def fit(self, progress: Progress) -> Outcome:
        """Train from ``progress`` to the configured end, or until a stop is agreed; a collective.

        Raises:
            NotANumber: on every rank, when any rank's loss was not finite, naming step, batch and the last
                good checkpoint.
        """
        outcome = Outcome()
        try:
            self._fit(progress, outcome)
        except _StopAgreed:
            outcome.status = "stopped"
            self._save(progress, wait=True)
        except NotANumber as error:
            raise NotANumber(f"{error}. {self._last_good(error.step)}", error.step) from None
        return outcome

    def _fit(self, progress: Progress, outcome: Outcome) -> None:
        self._evaluate_if_due(progress, outcome)
        while progress.position.epoch < self.config.epochs and not self._enough(progress.step):
            self._epoch(progress, outcome)
        if not self.checkpointer.due(progress.step):
            self._save(progress)
        if self.config.test and "test" in self.loaders:
            self._evaluate("test", progress.step, outcome)

    def _epoch(self, progress: Progress, outcome: Outcome) -> None:
        """Train to the end of the epoch."""
        loader, begin = self.loaders["train"], progress.position
        most = max(self.ranks.gather(loader.batches(begin)))
        total = self._at_most(most, progress.step)
        self.log.begin_epoch(epoch=begin.epoch, epochs=self.config.epochs, step=progress.step, steps=total)
        done = 0
        with closing(loader.iterate(begin, steps=total)) as stream:
            while done < total:
                length = min(total - done, self._to_boundary(progress.step))
                ran, stop = self.segment(stream, length, progress.step, outcome)
                done += ran
                progress.step += ran
                progress.position = loader.advance(begin, [done] * self.ranks.world)
                if stop:
                    raise _StopAgreed
                if done < total:
                    self._boundary(progress, outcome)
        if done == most:
            progress.position = loader.start(begin.epoch + 1)
        self._boundary(progress, outcome, end_of_epoch=True)

    def segment(self, stream: Iterator[Batch], length: int, step: int, outcome: Outcome) -> tuple[int, bool]:
        """Run up to ``length`` steps after ``step`` others; a collective.

        Args:
            stream: at least ``length`` batches.
            outcome: gets the rows, seconds and bytes added.

        Returns:
            Steps run, and whether a stop was agreed.

        Raises:
            NotANumber: on every rank, when any rank's loss was not finite.
        """
        batches = Drained(stream, length)
        window = TrainWindow(self.ranks.device)
        self.traffic.take()
        began, logged = time.perf_counter(), 0
        for ran in range(1, length + 1):
            self.learning_rate.set(step)
            self.exchange.begin(step)
            traced = self.trace.covers(step + 1)
            with self.trace.step(step + 1) if traced else self.profiler.step(step):
                predictions = self.pipeline.progress(batches)
            step += 1
            self.exchange.end(step, predictions.batch)
            window.update(predictions.logits, predictions.batch.labels, predictions.batch.weights)
            self.control.watch(step, predictions.loss, predictions.batch)
            stop = self.control.point(step, now=ran == length)
            if stop or ran == length or step % self.log.config.every_steps == 0:
                now = time.perf_counter()
                self._log_window(window, step, ran - logged, now - began, outcome)
                # The next window's clock starts before its log line is written: that cost is training's.
                began, logged = now, ran
                window = TrainWindow(self.ranks.device)
            if stop:
                return ran, True
        return length, False

    def _log_window(
        self, window: TrainWindow, step: int, steps: int, seconds: float, outcome: Outcome
    ) -> None:
        scores = window.compute(self.ranks.control)
        sent = self.traffic.take()
        total = torch.tensor(list(sent.values()), dtype=torch.int64)
        dist.all_reduce(total, group=self.ranks.control)
        sent_all = dict(zip(sent, total.tolist(), strict=True))
        for purpose, count in sent_all.items():
            outcome.sent_bytes[purpose] += count
        outcome.rows += scores.rows
        outcome.seconds += seconds
        outcome.steps += steps
        self.exchange.log(step, {purpose: count / steps for purpose, count in sent_all.items()})
        self.log.train(
            step=step,
            rows=scores.rows,
            loss=scores.log_loss,
            ne=scores.ne,
            rows_per_s=scores.rows / seconds,
            learning_rate_factor=self.learning_rate.factor,
            input_bytes=sent_all["input"] / steps,
            forward_bytes=sent_all["forward"] / steps,
            backward_bytes=sent_all["backward"] / steps,
            split=self.profiler.take(),
        )

    def _boundary(self, progress: Progress, outcome: Outcome, end_of_epoch: bool = False) -> None:
        """Save and evaluate where it is due."""
        due = progress.step % self.config.eval_every == 0 if self.config.eval_every else end_of_epoch
        progress.evaluation_due = due and "valid" in self.loaders
        if self.checkpointer.due(progress.step):
            self._save(progress)
        self._evaluate_if_due(progress, outcome)

    def _evaluate_if_due(self, progress: Progress, outcome: Outcome) -> None:
        if progress.evaluation_due:
            self._evaluate("valid", progress.step, outcome)
            progress.evaluation_due = False

    def _evaluate(self, split: str, step: int, outcome: Outcome) -> None:
        """Score the model on ``split``; a stop that is agreed meanwhile leaves it without scores."""
        loader = self.loaders[split]
        start = loader.start(0)
        total = max(self.ranks.gather(loader.batches(start)))
        total = min(total, self.config.eval_steps or total)
        evaluation = Evaluation(self.config.metrics, self.ranks.device)
        self.task.eval()
        try:
            with torch.no_grad(), closing(loader.iterate(start, steps=total)) as stream:
                batches = Drained(stream, total)
                for done in range(1, total + 1):
                    predictions = self.pipeline.progress(batches)
                    batch = predictions.batch
                    evaluation.update(predictions.logits, batch.labels, batch.weights)
                    if self.control.point(done, now=done == total):
                        raise _StopAgreed
        finally:
            self.task.train()
        scores = evaluation.compute(self.ranks.control)
        outcome.scores[split] = scores
        self.log.evaluation(split, step, scores)

    def _save(self, progress: Progress, wait: bool = False) -> None:
        """Save state, having made sure that it holds numbers."""
        finite = all(bool(weights.isfinite().all()) for weights in self.task.parameters())
        if not all(self.ranks.gather(finite)):
            raise NotANumber(
                f"the weights after step {progress.step} hold values that are not finite numbers",
                progress.step + 1,
            )
        extra = {
            "step": progress.step,
            "position": progress.position.to_dict(),
            "evaluation_due": progress.evaluation_due,
            "exchange": self.exchange.state(),
            **self.about,
        }
        self.checkpointer.save(progress.step, self.state(), extra, wait=wait)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside :class:`Progress`."""
        return {"model": self.task, "optimizer": self.optimizer}

    def _last_good(self, bad_step: int) -> str:
        """The newest checkpoint whose weights gave a finite loss afterwards."""
        self.checkpointer.wait()
        # The loss of step k comes from the weights after step k - 1, so those are not good.
        good = [c for c in find_checkpoints(self.checkpointer.folder) if step_of(c) < bad_step - 1]
        if not good:
            return "There is no good checkpoint yet; lower the learning rates or look at the batch."
        return (
            f"The last good checkpoint is {good[-1].name}: go on from it with resume={good[-1]} and lower "
            "learning rates, say."
        )

    def _enough(self, step: int) -> bool:
        return self.config.steps is not None and step >= self.config.steps

    def _at_most(self, steps: int, done: int) -> int:
        return steps if self.config.steps is None else min(steps, self.config.steps - done)

    def _to_boundary(self, step: int) -> int:
        """Steps to the next multiple of the evaluation and checkpoint intervals."""
        intervals = [self.config.eval_every, self.config.checkpoint.every_steps]
        return min((every - step % every for every in intervals if every), default=2**62)
