"""A minimal torchrec program in the style of MLCommons' torchrec_dlrm: the control of our trainer.

    OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc-per-node 2 benchmarks/plain_torchrec.py \
        --steps 200 --compare

Everything between the batch and the update is torchrec's own: its DLRM, DLRMTrain, sharder, pipeline and
optimizers. Batches, seeds, table placement and hyper-parameters are those of our default job, but for
``codec.dedup=false``, so that the losses must agree bit for bit. With ``--compare`` our trainer's loop runs
on the same batches in the same processes, in turns with the plain one, and the ratio of rows per second is
printed.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import distributed as dist
from torchrec.datasets.utils import Batch as TorchrecBatch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from tightrec.models.dlrm import build_tables
from tightrec.sharding.plan import Cluster, make_plan
from tightrec.sharding.traffic import Traffic, counted_traffic
from tightrec.trainer.build import build_task, derived_seed
from tightrec.trainer.checkpoint import Checkpointer
from tightrec.trainer.config import JobConfig, load
from tightrec.trainer.control import Control, StopRequest
from tightrec.trainer.data.batch import Batch
from tightrec.trainer.data.loader import Loader
from tightrec.trainer.data.synthetic import SyntheticSource
from tightrec.trainer.exchange_watch import ExchangeWatch
from tightrec.trainer.loop import Outcome, Trainer
from tightrec.trainer.pipeline import build_pipeline
from tightrec.trainer.ranks import Ranks, connected
from tightrec.trainer.report.run_log import RunLog
from tightrec.trainer.timing import StepProfiler
from tightrec.trainer.trace import StepTrace


class PlainRun:
    """torchrec's own step."""

    def __init__(self, config: JobConfig, ranks: Ranks, source: SyntheticSource) -> None:
        schema, model = source.schema, config.model
        tables = build_tables([(c.name, c.cardinality) for c in schema.sparse], model)
        torch.manual_seed(derived_seed(config.seed, 0, "dense"))
        train_model = DLRMTrain(
            DLRM(
                embedding_bag_collection=tables,
                dense_in_features=len(schema.dense),
                dense_arch_layer_sizes=[*model.bottom_layers, model.embedding_dim],
                over_arch_layer_sizes=[*model.top_layers, 1],
            )
        )
        fused = {
            "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "learning_rate": config.optimizer.tables.lr,
            "eps": config.optimizer.tables.eps,
        }
        sharder = EmbeddingBagCollectionSharder(fused_params=fused)
        cluster = Cluster(world=ranks.world, local_world=ranks.local_world, device=ranks.device)
        batch_size = config.data.loader.batch_size
        plan = make_plan(tables, sharder, config.sharding, cluster, batch_size)
        torch.manual_seed(derived_seed(config.seed, ranks.rank, "tables"))
        self.model = DistributedModelParallel(
            train_model,
            device=ranks.device,
            plan=ShardingPlan({"model.sparse_arch.embedding_bag_collection": plan}),
            sharders=[sharder],
        )
        dense = KeyedOptimizerWrapper(
            dict(in_backward_optimizer_filter(self.model.named_parameters())),
            lambda p: torch.optim.Adagrad(p, lr=config.optimizer.dense.lr, eps=config.optimizer.dense.eps),
        )
        self.optimizer = CombinedOptimizer([self.model.fused_optimizer, dense])
        self.pipeline = TrainPipelineSparseDist(
            self.model, self.optimizer, ranks.device, execute_all_batches=True
        )

    def steps(self, batches: list[Batch]) -> list[torch.Tensor]:
        """The loss of each batch, [steps] scalars."""
        stream = (TorchrecBatch(b.dense, b.sparse, b.labels) for b in batches)
        return [self.pipeline.progress(stream)[0] for _ in batches]


class OurRun:
    """The same by our trainer's own loop; its log says nothing, no step is profiled, nothing is saved."""

    def __init__(
        self, config: JobConfig, ranks: Ranks, source: SyntheticSource, request: StopRequest
    ) -> None:
        built = build_task(config, ranks, source.schema)
        # A segment of steps saves and traces nothing; the folder is for what is asked for one at its start.
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        # No rank 0, which alone would write.
        log = RunLog(folder, rank=1, config=config.logging)
        self.losses: list[torch.Tensor] = []
        self.trainer = Trainer(
            config=config.train,
            ranks=ranks,
            task=built.task,
            optimizer=built.optimizer,
            pipeline=build_pipeline(config.train.pipeline, built.task, built.optimizer, ranks.device),
            learning_rate=built.learning_rate,
            loaders={},
            control=_Losses(self.losses, ranks.control, config.train.agree_every, request),
            checkpointer=Checkpointer(folder, config.train.checkpoint),
            traffic=Traffic(),
            exchange=ExchangeWatch(built.steering, built.task, built.plain_plan, ranks, log),
            profiler=StepProfiler(0, ranks.device),
            trace=StepTrace(folder, ranks.rank, None),
            log=log,
            about={},
        )
        self.step = 0

    def steps(self, batches: list[Batch]) -> list[torch.Tensor]:
        """The loss of each batch, [steps] scalars."""
        with counted_traffic() as traffic:
            trainer = dataclasses.replace(self.trainer, traffic=traffic)
            done, _ = trainer.segment(iter(batches), len(batches), self.step, Outcome())
        self.step += done
        losses, self.losses[:] = list(self.losses), []
        return losses


class _Losses(Control):
    """Keeps every step's loss beside what the loop does with it."""

    def __init__(self, kept: list[torch.Tensor], *rest: Any) -> None:
        super().__init__(*rest)
        self._kept = kept

    def watch(self, step: int, loss: torch.Tensor, batch: Batch) -> None:
        self._kept.append(loss)
        super().watch(step, loss, batch)


def compared(
    config: JobConfig, ranks: Ranks, steps: int, turn: int, compare: bool
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Losses of each step, and seconds a step in each turn, of the plain run and ours, on this rank."""
    if config.model.representation.hashing:
        raise ValueError("torchrec has no deep hash embeddings. Leave model.representation at its tables.")
    source = SyntheticSource(config.data.synthetic, "train")
    loader = Loader(source, config.data.loader, ranks.rank, ranks.world)
    batches = list(islice(loader.iterate(loader.start(0)), steps))
    if len(batches) < steps or bool((batches[-1].weights == 0).any()):
        raise ValueError(f"{steps} steps need more data.synthetic.train_rows: torchrec knows no padding.")
    runs: dict[str, Any] = {"plain": PlainRun(config, ranks, source)}
    if compare:
        runs["ours"] = OurRun(config, ranks, source, StopRequest())
    losses: dict[str, list[float]] = {name: [] for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for start in range(0, steps, turn):
        part = batches[start : start + turn]
        for name, run in runs.items():
            dist.barrier()
            begin = time.perf_counter()
            losses[name] += [float(loss) for loss in run.steps(part)]
            seconds[name].append((time.perf_counter() - begin) / len(part))
    return losses, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="training steps")
    parser.add_argument("--turn", type=int, default=25, help="steps in one timed turn")
    parser.add_argument("--compare", action="store_true", help="run our trainer's step beside it")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of our default job")
    words = parser.parse_args()
    config, _ = load(["codec.dedup=false", *words.overrides])
    with connected("cpu", 120) as ranks:
        losses, seconds = compared(config, ranks, words.steps, words.turn, words.compare)
        if ranks.rank == 0:
            _print(words, config, ranks, losses, seconds)
    return int(words.compare and losses["plain"] != losses["ours"])


def _print(
    words: argparse.Namespace,
    config: JobConfig,
    ranks: Ranks,
    losses: dict[str, list[float]],
    seconds: dict[str, list[float]],
) -> None:
    rows = config.data.loader.batch_size * ranks.world
    for name, values in seconds.items():
        speeds = sorted(rows / s for s in values[1:] or values)
        print(
            f"{name:>5}: rows/s min {speeds[0]:,.0f} median {statistics.median(speeds):,.0f} "
            f"max {speeds[-1]:,.0f}; first loss {losses[name][0]!r}, last loss {losses[name][-1]!r}"
        )
    if words.compare:
        ratios = [p / o for p, o in zip(seconds["plain"], seconds["ours"], strict=True)][1:]
        same = losses["plain"] == losses["ours"]
        print(f"losses of {words.steps} steps bit-identical: {same}")
        if ratios:
            print(
                f"ours / plain rows/s, turn by turn: min {min(ratios):.3f} "
                f"median {statistics.median(ratios):.3f} max {max(ratios):.3f}"
            )
    else:
        print(json.dumps({"losses": losses["plain"]}))


if __name__ == "__main__":
    sys.exit(main())
