"""Runs a function on several gloo ranks of this machine, for tests.

    def work(rank, world, x):              # a function of a module, so that a rank can import it
        t = torch.tensor([x + rank])
        dist.all_reduce(t)
        return t.item()

    assert run_ranks(2, work, 10) == [21, 21]

Ranks are forked from a server process that has imported torch and torchrec once (multiprocessing's
``forkserver``), so starting them costs tens of milliseconds instead of seconds.
"""

import faulthandler
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

PRELOADED = ["torch", "torch.distributed.checkpoint", "torchrec", "torchrec.distributed.model_parallel"]


class RankFailure(RuntimeError):
    """A rank raised or died; the message holds every failed rank's traceback, ``__cause__`` the first
    error where it pickles."""


def run_ranks(
    world: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0, connect: bool = True
) -> list[Any]:
    """Call ``fn(rank, world, *args)`` on ``world`` ranks; returns what each returned, in order of rank.

    Every rank has torchrun's environment variables and one intra-op thread.

    Args:
        timeout: seconds for all of it; ranks still alive then write their stacks to stderr and are killed.
        connect: join the default gloo process group first, and leave it afterwards.

    Raises:
        RankFailure: a rank raised or ended without an answer. Ranks that fail within a second of it, as
            they do when their peer is gone, are told too; the others are killed.
        TimeoutError: naming the ranks that were not done.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = _free_port()
    ranks: dict[Any, tuple[int, BaseProcess]] = {}
    results: dict[int, Any] = {}
    failures: list[tuple[str, BaseException | None]] = []
    deadline = time.monotonic() + timeout
    try:
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(sender, rank, world, port, timeout, connect, fn, args), daemon=False
            )
            process.start()
            sender.close()
            ranks[receiver] = (rank, process)
        waiting = set(ranks)
        while waiting:
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready and failures:
                break
            if not ready:
                late = sorted(ranks[receiver][0] for receiver in waiting)
                raise TimeoutError(f"rank(s) {late} of {world} were not done after {timeout} s.")
            for receiver in ready:
                waiting.discard(receiver)
                rank, process = ranks[receiver]
                done, payload = _answer(receiver, rank, process)
                if done:
                    results[rank] = payload
                else:
                    failures.append(payload)
                    deadline = min(deadline, time.monotonic() + 1.0)
        # One that died while its children held its pipe open has not been heard of.
        for rank, process in (ranks[receiver] for receiver in waiting):
            if process.exitcode:
                failures.append((f"rank {rank} ended with exit code {process.exitcode}.", None))
        if failures:
            raise RankFailure("\n".join(text for text, _ in failures)) from failures[0][1]
        for _, process in ranks.values():
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for receiver, (_, process) in ranks.items():
            if process.is_alive():
                process.kill()
            process.join()
            receiver.close()
    return [results[rank] for rank in range(world)]


def _answer(receiver: Connection, rank: int, process: BaseProcess) -> tuple[bool, Any]:
    try:
        done, payload = pickle.loads(receiver.recv_bytes())
    except EOFError:
        process.join()
        return False, (f"rank {rank} ended with exit code {process.exitcode} and no answer.", None)
    if done:
        return True, payload
    text, error = payload
    return False, (f"rank {rank} failed:\n{text}", error)


def _rank(
    sender: Connection,
    rank: int,
    world: int,
    port: int,
    timeout: float,
    connect: bool,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    from torch import distributed as dist

    faulthandler.dump_traceback_later(max(0.1, timeout - 0.5))
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        if connect:
            dist.init_process_group("gloo")
        result = fn(rank, world, *args)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        sender.send_bytes(pickle.dumps((True, result)))
    except BaseException as error:
        sender.send_bytes(pickle.dumps((False, (traceback.format_exc(), _picklable(error)))))
    finally:
        faulthandler.cancel_dump_traceback_later()


def _picklable(error: BaseException) -> BaseException | None:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
