"""Steps of benchmarks/step_speed.py: batches made before they are timed, and turns of one variant's steps."""

import copy
import dataclasses
import gc
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import distributed as dist

from tightrec.sharding.traffic import Purpose, counted_traffic
from tightrec.trainer.build import build_task
from tightrec.trainer.config import JobConfig, load
from tightrec.trainer.control import Control, StopRequest
from tightrec.trainer.data.batch import Batch, to_batch
from tightrec.trainer.data.synthetic import SyntheticSource
from tightrec.trainer.metrics import TrainWindow
from tightrec.trainer.pipeline import build_pipeline
from tightrec.trainer.ranks import Ranks
from tightrec.trainer.step_split import PARTS, TimeSplit, mean
from tightrec.trainer.timing import StepProfiler

# A pipeline holds this many batches beyond the step it has ended.
_AHEAD = 3


class Turn(NamedTuple):
    """What one variant's turn of steps showed; the same on every rank."""

    step_ms: float
    """Of the slowest rank, mean over the turn."""

    split: TimeSplit
    """Of the steps profiled after the timed ones, mean over ranks; ``data`` holds the ranks' waiting for
    each other before the first of them, and is not part of a step."""

    loss: float
    """Mean over steps and ranks."""

    sent_bytes: dict[Purpose, float]
    """A step, all ranks together."""

    @property
    def exchange_ms(self) -> float:
        """Milliseconds a profiled step spends in the exchanges of embeddings and of their gradients."""
        return self.split.embedding_exchange + self.split.backward_exchange

    @property
    def profiled_ms(self) -> float:
        """Milliseconds of a profiled step."""
        return self.split.total - self.split.data


class Feed:
    """Batches of one rank by their number, each as it is and deduplicated; no row comes twice.

    Args:
        dedup: deduplicate where batches are made, as a loader's workers do; else the batches are plain and
            the step deduplicates.
    """

    def __init__(self, config: JobConfig, ranks: Ranks, dedup: bool) -> None:
        batch_size = config.data.loader.batch_size
        # A row group is a batch: every rank makes its own rows only.
        groups = dataclasses.replace(
            config.data.synthetic, row_group_rows=batch_size, train_rows=2**20 * batch_size
        )
        self.source = SyntheticSource(groups, "train")
        self._batch_size = batch_size
        self._ranks = ranks
        self._dedup = dedup
        self._made: dict[int, dict[bool, Batch]] = {}

    def prepare(self, first: int, count: int) -> None:
        """Make ``count`` batches from number ``first`` on, and drop those before."""
        self._made = {number: pair for number, pair in self._made.items() if number >= first}
        for number in range(first, first + count):
            if number not in self._made:
                columns = self.source.read(number * self._ranks.world + self._ranks.rank)
                schema = self.source.schema
                plain = to_batch(columns, schema, self._batch_size)
                deduped = to_batch(columns, schema, self._batch_size, dedup=True) if self._dedup else plain
                self._made[number] = {False: plain, True: deduped}

    def get(self, number: int, dedup: bool) -> Batch:
        """A batch that was prepared; its copy, because torchrec caches what it computes in a batch."""
        batch = self._made[number][dedup]
        return dataclasses.replace(batch, sparse=copy.copy(batch.sparse))


class Variant:
    """One configuration's model and our loop's step.

    Args:
        words: the configuration, as on the command line of the trainer.

    Raises:
        ValueError: the configuration cannot run, in words; on this rank.
    """

    def __init__(self, words: list[str], ranks: Ranks, feed: Feed) -> None:
        config, _ = load(words)
        built = build_task(config, ranks, feed.source.schema)
        self.dedup = config.codec.dedup
        self._learning_rate = built.learning_rate
        self._pipeline = build_pipeline(config.train.pipeline, built.task, built.optimizer, ranks.device)
        self._control = Control(ranks.control, config.train.agree_every, StopRequest())
        self._profiler = StepProfiler(1, ranks.device)
        self._ranks = ranks
        self._feed = feed
        self._stream = self._batches()
        self._steps = 0
        self.next_batch = 0

    def turn(self, first: int, steps: int, settle: int, profiled: int) -> Turn:
        """``settle`` steps, then ``steps`` timed and ``profiled`` profiled ones, on batches from ``first``.

        The pipeline is never drained; its first steps are on batches that it holds from its last turn.
        """
        self.next_batch = max(self.next_batch, first)
        window = TrainWindow(self._ranks.device)
        losses = []
        with counted_traffic() as traffic:
            for _ in range(settle):
                self._step(window)
            traffic.take()
            gc.collect()
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(steps):
                losses.append(self._step(window))
            seconds = (time.perf_counter() - begin) / steps
            with self._profiler.step(0):
                # Ranks leave the profiler's start one by one; as waiting for data it stays out of the step.
                with torch.profiler.record_function("tightrec::data"):
                    dist.barrier()
                for _ in range(profiled):
                    self._step(window)
            sent = traffic.take()
        sampled = self._profiler.take()
        assert sampled
        loss = statistics.fmean(float(loss) for loss in losses)
        gathered = self._ranks.gather((seconds, sampled, loss, sent))
        whole = mean(split for _, split, _, _ in gathered)
        return Turn(
            step_ms=1e3 * max(s for s, _, _, _ in gathered),
            split=TimeSplit(**{part: getattr(whole, part) / profiled for part in PARTS}),
            loss=statistics.fmean(loss for _, _, loss, _ in gathered),
            sent_bytes={
                purpose: sum(counts[purpose] for _, _, _, counts in gathered) / (steps + profiled)
                for purpose in sent
            },
        )

    def _step(self, window: TrainWindow) -> torch.Tensor:
        """What our loop does for one step."""
        self._learning_rate.set(self._steps)
        predictions = self._pipeline.progress(self._stream)
        self._steps += 1
        window.update(predictions.logits, predictions.batch.labels, predictions.batch.weights)
        self._control.watch(self._steps, predictions.loss, predictions.batch)
        self._control.point(self._steps)
        return predictions.loss

    def _batches(self) -> Iterator[Batch]:
        while True:
            batch = self._feed.get(self.next_batch, self.dedup)
            self.next_batch += 1
            yield batch


def build_variants(
    words: dict[str, list[str]], ranks: Ranks, feed: Feed
) -> tuple[dict[str, Variant], dict[str, str]]:
    """Every variant that can run, and why each other one cannot, by name; a collective."""
    variants: dict[str, Variant] = {}
    refused: dict[str, str] = {}
    for name, own in words.items():
        reason = None
        try:
            variants[name] = Variant(own, ranks, feed)
        except ValueError as error:
            reason = str(error).splitlines()[0]
        reasons = [why for why in ranks.gather(reason) if why]
        if reasons:
            variants.pop(name, None)
            refused[name] = reasons[0]
    return variants, refused


def take_turns(
    variants: dict[str, Variant], feed: Feed, rounds: int, steps: int, settle: int, profiled: int
) -> dict[str, list[Turn]]:
    """``rounds`` rounds, in each of which every variant has one turn on the same batches.

    Each round starts with another variant.
    """
    names = list(variants)
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    count = settle + steps + profiled
    for round_ in range(rounds):
        first = max(variant.next_batch for variant in variants.values())
        feed.prepare(first, count + _AHEAD)
        start = round_ % len(names)
        for name in names[start:] + names[:start]:
            turns[name].append(variants[name].turn(first, steps, settle, profiled))
    return turns
