"""Ranks agree on stopping and on NaN at the same step, whoever saw it first."""

import math
import os
import signal

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.trainer.control import Control, NotANumber, StopRequest, fingerprint, stop_on_signals
from tightrec.trainer.data.batch import Batch


def batch(seed: int = 0, dense: float = 1.0) -> Batch:
    ids = torch.randint(0, 9, (4,), generator=torch.Generator().manual_seed(seed))
    return Batch(
        dense=torch.full((4, 2), dense),
        sparse=KeyedJaggedTensor(keys=["f"], values=ids, lengths=torch.ones(4, dtype=torch.int32)),
        labels=torch.zeros(4),
        weights=torch.tensor([1.0, 1.0, 1.0, 0.0]),
    )


def _stop_on_one(rank: int, world: int) -> int:
    request = StopRequest()
    control = Control(dist.new_group(backend="gloo"), 4, request)
    for step in range(1, 100):
        if rank == 1 and step == 7:
            request.signal_name = "SIGTERM"
        control.watch(step, torch.tensor(0.5), batch())
        if control.point(step):
            return step
    return 0


def _nan_on_one(rank: int, world: int, now: bool) -> str:
    control = Control(dist.new_group(backend="gloo"), 4, StopRequest())
    try:
        for step in range(1, 100):
            loss = math.inf if rank == 1 and step >= 6 else 0.5
            control.watch(step, torch.tensor(loss), batch(seed=step, dense=math.nan if step == 6 else 1.0))
            control.point(step, now=now)
    except NotANumber as error:
        return f"{step}: {error}"
    return "never"


@pytest.mark.multiprocess
def test_all_ranks_stop_at_the_same_step_within_two_intervals():
    assert run_ranks(2, _stop_on_one) == [12, 12]


@pytest.mark.multiprocess
@pytest.mark.parametrize(("now", "stopped"), [(False, "12"), (True, "6")])
def test_a_loss_that_is_not_a_number_stops_every_rank_with_step_rank_and_batch(now, stopped):
    first, second = run_ranks(2, _nan_on_one, now)
    assert first == second
    assert first.startswith(f"{stopped}: the loss of step 6 on rank 1 is not a finite number; batch of 3")
    assert "8 dense value(s) not finite" in first


def test_fingerprints_tell_batches_apart_and_repeat():
    assert fingerprint(batch(1)) == fingerprint(batch(1))
    assert fingerprint(batch(1)) != fingerprint(batch(2))


def test_sigterm_and_one_ctrl_c_ask_and_a_late_second_ctrl_c_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal_name == "SIGINT"
        # torchrun passes the terminal's Ctrl-C on: the same one, twice.
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal_name == "SIGINT"
        request.asked_at -= 5
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
