"""The harness itself: answers in order, errors re-raised, hung ranks killed."""

import os
import time

import pytest
import torch
from ranks import RankFailure, run_ranks
from torch import distributed as dist

pytestmark = pytest.mark.multiprocess


def _sum(rank: int, world: int, x: int) -> tuple[int, int]:
    total = torch.tensor([x + rank])
    dist.all_reduce(total)
    return rank, int(total)


def _raise_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise KeyError("only here")
    dist.barrier()


def _die(rank: int, world: int) -> None:
    if rank == 0:
        os._exit(3)
    dist.barrier()


def _hang(rank: int, world: int) -> None:
    if rank == 1:
        time.sleep(60)


def test_results_come_in_order_of_rank() -> None:
    assert run_ranks(3, _sum, 10) == [(0, 33), (1, 33), (2, 33)]


def test_error_of_one_rank_is_raised_while_another_waits_for_it() -> None:
    with pytest.raises(RankFailure, match="only here") as caught:
        run_ranks(2, _raise_on_one)
    assert isinstance(caught.value.__cause__, Exception)


def test_death_of_a_rank_is_told() -> None:
    with pytest.raises(RankFailure, match="rank 0 ended with exit code 3"):
        run_ranks(2, _die)


def test_hung_rank_is_killed_and_named() -> None:
    with pytest.raises(TimeoutError, match=r"\[0, 1\] of 2|\[1\] of 2"):
        run_ranks(2, _hang, timeout=2)
