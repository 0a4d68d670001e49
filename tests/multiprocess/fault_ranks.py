"""Runs ranks that are to fail, and tells with which words each ended and how soon; for tests.

Unlike ``run_ranks`` it lets every rank end by itself: a survivor's last words are what is tested.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from ranks import PRELOADED, _free_port


class End(NamedTuple):
    """How a rank ended."""

    words: str
    """Of its error; empty where it was killed or had not ended."""
    after_s: float
    """Seconds after the fault was made, see ``fault_is_now``."""


def fault_is_now(folder: Path) -> None:
    """To be called by the faulty rank just before its fault."""
    (folder / "fault").write_text(repr(time.time()))


def ends(
    world: int, folder: Path, fn: Callable[..., Any], *args: Any, timeout_s: float, torchrun: bool = False
) -> list[End]:
    """Call ``fn(rank, world, folder, *args)`` on ``world`` gloo ranks until all but the stuck have ended.

    Args:
        timeout_s: of the process group.
        torchrun: keep the store outside the ranks as torchrun's agent does, instead of in rank 0.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = _free_port()
    store = None
    if torchrun:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        port = store.port
    folder.mkdir(parents=True, exist_ok=True)
    given = (world, port, timeout_s, torchrun, folder, fn, args)
    processes = [context.Process(target=_rank, args=(rank, *given)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not _all_ended(world, folder, processes):
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.join()
    began = float((folder / "fault").read_text()) if (folder / "fault").exists() else 0.0
    found = []
    for rank in range(world):
        written = folder / f"end{rank}.json"
        words, when = json.loads(written.read_text()) if written.exists() else ("", began)
        found.append(End(words, when - began))
    return found


def _all_ended(world: int, folder: Path, processes: list[Any]) -> bool:
    """Whether no more can come: all are gone but those that have stopped themselves."""
    stuck = [int(path.name.removeprefix("stuck")) for path in folder.glob("stuck*")]
    return all(rank in stuck or not processes[rank].is_alive() for rank in range(world))


def _rank(
    rank: int,
    world: int,
    port: int,
    timeout_s: float,
    torchrun: bool,
    folder: Path,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    from torch import distributed as dist

    from tightrec.sharding.obituary import last_words

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE=str(torchrun),
        TORCH_CPP_LOG_LEVEL="ERROR",
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    try:
        fn(rank, world, folder, *args)
        words = "finished"
    except Exception as error:
        words = last_words(error) or str(error)
    part = folder / f"part{rank}.json"
    part.write_text(json.dumps([words, time.time()]))
    part.rename(folder / f"end{rank}.json")
    # Without Python's own end, which could wait for connections to ranks that are gone.
    os._exit(0)
