"""Our sharded module where torchrec's stands: pipelines, checkpoints, several uses, memory, refusals."""

import gc
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from exchange_cases import (
    CPU,
    Case,
    Trained,
    Unsharded,
    against_unsharded,
    bags,
    batch_of,
    collection,
    difference,
    in_hosts_of,
    initial,
    loss_of,
    lossy,
    our_sharder,
    plain_sharder,
    plan_of,
)
from ranks import run_ranks
from tensordict import TensorDict
from torch import nn
from torch.distributed import checkpoint as dcp
from torchrec.datasets.utils import Batch
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer

from tightrec.sharding import sharder as sharder_module
from tightrec.sharding.config import CodecConfig
from tightrec.sharding.step import Step

pytestmark = pytest.mark.multiprocess
MIX = Case(kinds="tcrhkd")
LOSSY = lossy("range:0.03", "range:0.01")


def _in_turn(rank: int, world: int, jobs: list[Any]) -> list[Any]:
    in_hosts_of(world, rank)
    return [job(rank, world, *rest) for job, *rest in jobs]


def _run(*jobs: Any) -> list[list[Any]]:
    """What each job returned, by rank."""
    return [list(one) for one in zip(*run_ranks(2, _in_turn, list(jobs), timeout=240), strict=True)]


# ---- several uses


def _used_twice(rank: int, world: int) -> float:
    """Two forwards before one backward, which adds both batches' gradients to the tables."""
    ours, whole = Trained(MIX, world, our_sharder(MIX)), Unsharded(MIX, world)
    batches = [[bags(MIX, 5 + 3 * use, 10 * use + r) for r in range(world)] for use in (0, 1)]
    outs = [ours.model(batches[use][rank][0]) for use in (0, 1)]
    losses = [loss_of(out, batches[use][rank][1]) for use, out in enumerate(outs)]
    (losses[0] + losses[1]).backward()
    ours.update()
    whole.step([one for use in batches for one in use], rank)
    parts = [difference(part, whole.tables[name].detach()[at]) for name, part, at in ours.shards()]
    return max(parts)


def _undivided(rank: int, world: int) -> float:
    case = replace(MIX, kinds="tcrhk")
    ours, whole = Trained(case, world, our_sharder(case)), Unsharded(case, world, division=1)
    set_gradient_division(False)
    try:
        ours.step(*batch_of(case, 0, rank, world))
    finally:
        set_gradient_division(True)
    whole.step([batch_of(case, 0, r, world) for r in range(world)], rank)
    return max(difference(part, whole.tables[name].detach()[at]) for name, part, at in ours.shards())


def _two_modules(rank: int, world: int) -> float:
    return max(against_unsharded(replace(MIX, batches=(9, 4)), rank, world, copies=2).values())


def test_modules_used_twice_or_beside_each_other_and_undivided_gradients_are_right():
    for worst in _run((_used_twice,), (_undivided,), (_two_modules,)):
        assert max(worst) <= 1e-6


# ---- pipeline and checkpoint


class _Task(nn.Module):
    def __init__(self, tables: Any) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = self.tables(batch.sparse_features).values()
        loss = (pooled - batch.dense_features).square().sum() / 100
        return loss, loss.detach()


def _pipelined(rank: int, world: int, case: Case) -> tuple[list[float], list[float], int]:
    losses: list[list[float]] = []
    # The same one again and again, so that its loss falls.
    batches = [batch_of(case, 0, rank, world)] * 8
    count = 0
    for piped in (False, True):
        sharder, made = our_sharder(case), collection(case)
        plan = ShardingPlan({"tables": plan_of(case, world, sharder, made)})
        model = DistributedModelParallel(_Task(made), device=CPU, plan=plan, sharders=[sharder])
        for key, value in model.state_dict().items():
            for shard in value.local_shards():
                starts, sizes = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                rows, columns = (slice(a, a + n) for a, n in zip(starts, sizes, strict=True))
                shard.tensor.detach().copy_(initial(case)[key.split(".")[-2]][rows, columns])
        stream = iter([Batch(target, sparse, torch.zeros(0)) for sparse, target in batches])
        if piped:
            optimizer = CombinedOptimizer([model.fused_optimizer])
            pipeline = TrainPipelineSparseDist(model, optimizer, CPU, execute_all_batches=True)
            losses.append([float(pipeline.progress(stream)) for _ in batches])
            count = len(pipeline._pipelined_modules)
            continue
        losses.append([])
        for batch in stream:
            loss, _ = model(batch)
            loss.backward()
            losses[-1].append(loss.item())
    return losses[0], losses[1], count


def test_the_sparse_pipeline_gives_the_losses_of_a_plain_loop():
    cases = [replace(MIX, kinds="tcrhk", codec=codec) for codec in (CodecConfig(), LOSSY)]
    for ranks in _run(*[(_pipelined, case) for case in cases]):
        for plain, piped, count in ranks:
            assert count == 1, "the pipeline did not take our module apart"
            assert plain == piped
            assert plain[-1] < plain[0]


def _exchanged_checkpoint(rank: int, world: int, folder: str, ours_first: bool) -> tuple[bool, float, float]:
    """Train one, save it, load it into the other and train both on: keys, weights, next output."""
    case = replace(MIX, optimizer="adagrad")
    sharders = [our_sharder(case), plain_sharder(case)]
    one, other = (Trained(case, world, s) for s in (sharders if ours_first else sharders[::-1]))
    for step in range(3):
        one.step(*batch_of(case, step, rank, world))
    saved, read = (
        {"model": m.model.state_dict(), "optimizer": m.model.fused_optimizer.state_dict()}
        for m in (one, other)
    )
    same_keys = all(_keys(saved[part]) == _keys(read[part]) for part in saved)
    dcp.save(saved, checkpoint_id=folder)
    dcp.load(read, checkpoint_id=folder)
    other.model.load_state_dict(read["model"])
    other.model.fused_optimizer.load_state_dict(read["optimizer"])
    loaded = max(difference(a, b) for (_, a, _), (_, b, _) in zip(one.shards(), other.shards(), strict=True))
    for model in (one, other):
        # Of the data-parallel tables, whose optimizer is not saved here.
        model.dense = None
        model.step(*batch_of(case, 3, rank, world))
    after = [difference(a, b) for (_, a, _), (_, b, _) in zip(one.shards(), other.shards(), strict=True)]
    return same_keys, loaded, max(after)


def _keys(state: dict[str, Any], path: str = "") -> list[str]:
    found: list[str] = []
    for key, value in state.items():
        found += _keys(value, f"{path}/{key}") if isinstance(value, dict) else [f"{path}/{key}"]
    return sorted(found)


def test_checkpoints_go_from_torchrec_to_ours_and_back(tmp_path: Path):
    jobs = [(_exchanged_checkpoint, str(tmp_path / str(first)), first) for first in (True, False)]
    for ranks in _run(*jobs):
        for same_keys, loaded, after in ranks:
            assert same_keys
            assert loaded == 0
            assert after <= 1e-6


# ---- memory


def _memory(rank: int, world: int, case: Case) -> tuple[bool, int, int]:
    """Whether late steps used the buffers of earlier ones; steps alive; steps made."""
    ours = Trained(case, world, our_sharder(case))
    made: list[weakref.ref[Step]] = []
    launch = Step.launch

    def watched(self: Step, outputs: Any) -> None:
        made.append(weakref.ref(self))
        launch(self, outputs)

    def held() -> set[int]:
        return {buffer.data_ptr() for buffer in ours.module._exchange.buffers._free}

    # Shrinking batches: nothing later is larger.
    batches = [bags(case, 40 - step // 8, 100 * step + rank) for step in range(24)]
    gc.disable()
    try:
        with patch.object(Step, "launch", watched):
            for batch, target in batches[:12]:
                ours.step(batch, target)
            early = held()
            for batch, target in batches[12:]:
                ours.step(batch, target)
            ours.evaluate(batches[0][0])
        alive = sum(ref() is not None for ref in made)
    finally:
        gc.enable()
    return early == held() and len(early) > 0, alive, len(made)


def test_later_steps_allocate_no_buffers_and_nothing_outlives_its_step():
    for ranks in _run(
        *[(_memory, replace(MIX, codec=codec)) for codec in (LOSSY, CodecConfig(backward="int8"))]
    ):
        for same, alive, made in ranks:
            assert made == 25
            assert alive == 0, "steps are kept alive"
            assert same, "a late step allocated a buffer"


# ---- refusals


def _shadowed(rank: int, world: int) -> tuple[str, list[str]]:
    """Torchrec takes the last of several sharders for a module: ours is never used."""
    first = our_sharder(MIX)
    sharders = [first, *get_default_sharders()]
    made = collection(MIX)
    plan = ShardingPlan({"": plan_of(MIX, world, plain_sharder(MIX), made)})
    model = DistributedModelParallel(made, device=CPU, plan=plan, sharders=sharders)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sharder_module._warn_of_unused()
    return type(model.module).__name__, [str(one.message) for one in told]


def _tensordict(rank: int, world: int) -> str:
    ours = Trained(MIX, world, our_sharder(MIX)).module
    try:
        ours.input_dist(ours.create_context(), TensorDict({"f0": torch.zeros(2)}, batch_size=[2]))
    except ValueError as error:
        return str(error)
    return "taken"


def test_a_sharder_before_torchrecs_warns_and_a_tensordict_is_refused():
    shadowed, said = _run((_shadowed,), (_tensordict,))
    for name, told in shadowed:
        assert name == ShardedEmbeddingBagCollection.__name__
        assert len(told) == 1 and "never used" in told[0] and "Put it last" in told[0]
    assert all("TensorDict" in one and "KeyedJaggedTensor" in one for one in said)
