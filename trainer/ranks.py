"""The ranks of a job: device, process groups, and words when they cannot meet."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, Literal

import torch
from torch import distributed as dist


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among all of a job's."""

    rank: int
    """0 .. world - 1."""

    world: int
    """Number of ranks."""

    local_world: int
    """Ranks on this machine."""

    device: torch.device
    """Where this rank computes."""

    control: dist.ProcessGroup
    """A gloo group over all ranks for small agreements."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's (small, picklable) ``value``, in order of rank, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's (small, picklable) ``value`` on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]


@contextmanager
def connected(device: Literal["auto", "cpu", "cuda"], timeout_s: float) -> Iterator[Ranks]:
    """Join the job that torchrun's environment describes, or a job of one rank without it.

    Raises:
        ValueError: CUDA is asked for and a local rank has no GPU of its own, or torchrun's variables are
            incomplete.
    """
    _single_rank_environment()
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    except KeyError as error:
        raise ValueError(
            f"{error.args[0]} is not set beside RANK: start the job with torchrun, or unset RANK for a "
            "single process."
        ) from None
    place = _device(device, local_rank, local_world)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    store, numbers = _meeting_place(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], timeout)
    # torchrun's store outlives a job of this process, and the processes that torchrun restarts: without a
    # prefix of its own, the next job would read the addresses that this one leaves there. Several machines
    # may count restarts differently; their launchers give every attempt a store of its own (launch/).
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if local_world == world else "any"
    store = dist.PrefixStore(f"attempt_{attempt}/job_{next(numbers)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    try:
        control = dist.new_group(backend="gloo", timeout=timeout)
        yield Ranks(rank=rank, world=world, local_world=local_world, device=place, control=control)
    finally:
        dist.destroy_process_group()


@cache
def _meeting_place(address: str, port: str, timeout: timedelta) -> tuple[dist.Store, Iterator[int]]:
    """The store in which the ranks find each other, and a number for each job that meets there."""
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return store, count()


def _single_rank_environment() -> None:
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def _device(wanted: Literal["auto", "cpu", "cuda"], local_rank: int, local_world: int) -> torch.device:
    gpus = torch.cuda.device_count()
    if wanted == "cuda" and gpus < local_world:
        raise ValueError(
            f"train.device=cuda with {local_world} rank(s) on this machine, but torch sees {gpus} GPU(s). "
            "Start fewer ranks, or use train.device=cpu; `python -m tightrec.trainer.doctor` says more."
        )
    if wanted == "cpu" or gpus < local_world:
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
