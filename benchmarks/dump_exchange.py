"""What crosses the embedding exchange while a DLRM learns MovieLens-1M, written to one .npz file.

    .venv/bin/python -m tightrec.trainer.data.prepare movielens src=FOLDER dst=data/movielens
    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/dump_exchange.py dump.npz [--peers 4] [data.path=FOLDER ...]

One process trains ``experiment=movielens`` with a global batch of --peers x --rows; peer p is rows p * --rows
to (p + 1) * --rows of each batch, as if so many ranks stood in for it. At each of --epochs, --count steps are
written, --every steps apart. The rest is trained too, and the test AUC printed, to show that the tensors
belong to a model that learns. Keys are STEP/KIND/TABLE/PEER, for N rows, M distinct bags of ids and dim D:

* forward, float32 [N, D]: the pooled embeddings, duplicate bags included;
* backward, float32 [N, D]: the loss's gradients with respect to them (of the mean over the global batch,
  which is what torchrec exchanges: it divides a rank's own mean by the number of ranks);
* bag, int32 [N]: number of the row's bag, counted by first use;
* summed, float32 [M, D]: the gradients of equal bags added up, in order of the bags.
"""

import argparse
import dataclasses
import math
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.formats.columns import Source
from tightrec.models.scores import Scores
from tightrec.trainer.build import build_task, open_sources
from tightrec.trainer.config import JobConfig, load
from tightrec.trainer.data.loader import Loader
from tightrec.trainer.metrics import Evaluation
from tightrec.trainer.noise import hush
from tightrec.trainer.pipeline import PlainLoop
from tightrec.trainer.ranks import connected

Arrays = dict[str, np.ndarray[Any, Any]]


class Recorder:
    """Keeps what leaves the tables and what comes back to them while a step is open.

    Args:
        pooled: the module whose output is a list of pooled embeddings, [B, D] a table.
        names: the tables' names, in that list's order.
        peers: parts that a batch is cut into.
    """

    def __init__(self, pooled: nn.Module, names: list[str], peers: int) -> None:
        self.arrays: Arrays = {}
        self._names, self._peers = names, peers
        self._step: int | None = None
        pooled.register_forward_hook(self._forward)

    def open(self, step: int) -> None:
        """Keep the next forward and backward as those of ``step``."""
        self._step = step

    def close(self, sparse: KeyedJaggedTensor) -> None:
        """Add the bags of the step's batch and the gradients summed by them."""
        step, self._step = self._step, None
        bags = sparse.to_dict()
        for name in self._names:
            offsets = bags[name].offsets().tolist()
            ids = bags[name].values().tolist()
            for peer, rows in enumerate(np.array_split(np.arange(len(offsets) - 1), self._peers)):
                keys = [tuple(ids[offsets[row] : offsets[row + 1]]) for row in rows]
                numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
                bag = np.array([numbers[key] for key in keys], np.int32)
                gradients = self.arrays[f"{step}/backward/{name}/{peer}"]
                summed = np.zeros((len(numbers), gradients.shape[1]), np.float32)
                np.add.at(summed, bag, gradients)
                self.arrays[f"{step}/bag/{name}/{peer}"] = bag
                self.arrays[f"{step}/summed/{name}/{peer}"] = summed

    def _forward(self, _module: nn.Module, _inputs: Any, columns: list[Tensor]) -> None:
        if self._step is None:
            return
        for name, column in zip(self._names, columns, strict=True):
            self._keep("forward", name, column)
            column.register_hook(lambda gradient, name=name: self._keep("backward", name, gradient))

    def _keep(self, kind: str, name: str, values: Tensor) -> None:
        for peer, part in enumerate(values.detach().chunk(self._peers)):
            self.arrays[f"{self._step}/{kind}/{name}/{peer}"] = part.float().clone().numpy()


def wanted_steps(epochs: list[float], count: int, every: int, epoch_steps: int) -> list[int]:
    """The steps to write: ``count`` at each of ``epochs``, ``every`` steps apart, the last at the point.

    Raises:
        ValueError: a point so early that its steps would begin before the first.
    """
    lasts = [round(epoch * epoch_steps) for epoch in epochs]
    steps = sorted({last - every * back for last in lasts for back in range(count)})
    if steps[0] < 1:
        raise ValueError(f"--epochs {min(epochs)} has no room for {count} steps, {every} apart, before it.")
    return steps


def trained(config: JobConfig, words: argparse.Namespace) -> tuple[Arrays, Scores]:
    """Train the job in this process; returns the recorded arrays and the test scores."""
    sources = open_sources(config.data)
    rows, size = sum(sources["train"].row_counts), words.peers * words.rows
    epoch_steps = math.ceil(rows / size)
    steps = wanted_steps(words.epochs, words.count, words.every, epoch_steps)
    # The experiment's schedule counts steps of its own batches: it decays over the second epoch.
    schedule = dataclasses.replace(config.schedule, decay_start=epoch_steps, decay_steps=epoch_steps)
    loader_config = dataclasses.replace(config.data.loader, batch_size=size, seed=config.seed)
    data = dataclasses.replace(config.data, loader=loader_config)
    config = dataclasses.replace(config, data=data, schedule=schedule)
    with connected("cpu", config.train.timeout_s) as ranks:
        built = build_task(config, ranks, sources["train"].schema)
        loop = PlainLoop(built.task, built.optimizer, ranks.device)
        names = sources["train"].schema.sparse_names
        recorder = Recorder(built.task.module.model.sparse_arch.pooled, names, words.peers)
        step = 0
        for epoch in range(config.train.epochs):
            loader = Loader(sources["train"], loader_config, 0, 1)
            with closing(loader.iterate(loader.start(epoch))) as batches:
                for _ in range(loader.batches(loader.start(epoch))):
                    built.learning_rate.set(step)
                    step += 1
                    if step in steps:
                        recorder.open(step)
                    predictions = loop.progress(batches)
                    if step in steps:
                        recorder.close(predictions.batch.sparse)
        return recorder.arrays, tested(built.task, loop, sources["test"], config)


def tested(task: nn.Module, loop: PlainLoop, source: Source, config: JobConfig) -> Scores:
    """Scores of the trained ``task`` on the test split."""
    loader = Loader(source, dataclasses.replace(config.data.loader, shuffle=False), 0, 1)
    evaluation = Evaluation(config.train.metrics, torch.device("cpu"))
    task.eval()
    with torch.no_grad(), closing(loader.iterate(loader.start(0))) as batches:
        for _ in range(loader.batches(loader.start(0))):
            predictions = loop.progress(batches)
            evaluation.update(predictions.logits, predictions.batch.labels, predictions.batch.weights)
    return evaluation.compute()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="the .npz file to write")
    parser.add_argument("--peers", type=int, default=4, help="parts that a batch is cut into")
    parser.add_argument("--rows", type=int, default=512, help="rows of a batch for each peer")
    parser.add_argument("--epochs", type=_floats, default=[0.5, 1.5], help="where to write, as 0.5,1.5")
    parser.add_argument("--count", type=int, default=4, help="steps written at each point")
    parser.add_argument("--every", type=int, default=10, help="steps between them")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of experiment=movielens")
    words = parser.parse_args()
    config, _ = load(["experiment=movielens", *words.overrides])
    hush()
    began = time.perf_counter()
    arrays, scores = trained(config, words)
    np.savez(words.out, **arrays)  # type: ignore[arg-type]
    steps = sorted({int(key.split("/")[0]) for key in arrays})
    print(f"{words.out}: steps {', '.join(map(str, steps))}; {len(arrays):,} arrays")
    print(f"test AUC {scores.auc:.4f}, NE {scores.ne:.4f}; {time.perf_counter() - began:.0f} s")
    return 0


def _floats(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
