"""A rank that sends nonsense, dies or stops ends the job on all ranks, in words that name it and the step."""

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_ranks import End, ends, fault_is_now
from torch import Tensor
from torch import distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.compression.policy.config import BoundConfig
from tightrec.sharding import framed_wire
from tightrec.sharding.config import CodecConfig, ShardingConfig
from tightrec.sharding.plan import Cluster, make_plan
from tightrec.sharding.sharder import CompressedEmbeddingBagCollectionSharder

TABLES, ROWS, BATCH, STEPS, FAULT = 3, 50, 16, 6, 3
FORWARD, BACKWARD = (f"the {way} exchange of step {FAULT}" for way in ("forward", "backward"))
BAD = 1
"""The rank at fault, where it is not the one that keeps the store."""


def _train(rank: int, world: int, folder: Path, kind: str, settings: dict[str, Any], fault: Any) -> None:
    name, bad, *rest = fault
    if rank == bad:
        FAULTS[name](folder, rank, *rest)
    dims = [8] * TABLES
    if name == "other tables" and rank == bad:
        dims = [12] * TABLES
    if name == "no checksums" and rank == bad:
        settings = {**settings, "checksums": False}
    codec = CodecConfig(forward="lossy", backward="lossy", bound=BoundConfig(), **settings)
    tables = EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingBagConfig(name=f"t{i}", feature_names=[f"f{i}"], num_embeddings=ROWS, embedding_dim=dim)
            for i, dim in enumerate(dims)
        ],
    )
    cpu = torch.device("cpu")
    sharder = CompressedEmbeddingBagCollectionSharder(codec=codec)
    cluster = Cluster(world=world, local_world=world, device=cpu)
    plan = make_plan(tables, sharder, ShardingConfig(type=kind), cluster, BATCH)
    torch.manual_seed(rank)
    model = DistributedModelParallel(tables, device=cpu, plan=ShardingPlan({"": plan}), sharders=[sharder])
    generator = torch.Generator().manual_seed(rank)
    for step in range(1, STEPS + 1):
        # Few rows make small slots, which the fault's step then outgrows.
        rows = ROWS if settings.get("transport") != "capacity" or step == FAULT else 2
        ids = torch.randint(0, rows, (TABLES * BATCH,), generator=generator)
        lengths = torch.ones(TABLES * BATCH, dtype=torch.int32)
        keys = [f"f{i}" for i in range(TABLES)]
        pooled = model(KeyedJaggedTensor(keys=keys, values=ids, lengths=lengths)).values()
        assert bool(pooled.isfinite().all()), "garbage was handed out"
        (pooled * torch.randn(pooled.shape, generator=generator)).sum().backward()
        if name == "die between" and rank == bad and step == FAULT:
            fault_is_now(folder)
            os.kill(os.getpid(), signal.SIGKILL)


def _in_exchange(folder: Path, what: str, change: Callable[[Tensor, list[int], list[int]], None]) -> None:
    """Do something to the bytes that a step is about to send."""
    real = framed_wire.all_to_all

    def all_to_all(peers, received, sent, received_counts, sent_counts, purpose, said):
        if said == what:
            fault_is_now(folder)
            sent, sent_counts = sent.clone(), list(sent_counts)
            change(sent, sent_counts, received_counts)
        return real(peers, received, sent, received_counts, sent_counts, purpose, said)

    framed_wire.all_to_all = all_to_all


def _die(folder: Path, rank: int, what: str) -> None:
    _in_exchange(folder, what, lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def _stop(folder: Path, rank: int, what: str) -> None:
    def stop(*_: object) -> None:
        (folder / f"stuck{rank}").touch()
        os.kill(os.getpid(), signal.SIGSTOP)

    _in_exchange(folder, what, stop)


def _flip(folder: Path, rank: int, what: str, byte: int) -> None:
    """Flip a bit of every frame."""

    def flip(sent: Tensor, counts: list[int], _: object) -> None:
        at = 0
        for count in counts:
            if count:
                sent[at + byte if byte >= 0 else at + count + byte] ^= 4
            at += count

    _in_exchange(folder, what, flip)


def _announce(folder: Path, rank: int, what: str, change: Callable[[int], int]) -> None:
    """Tell another size than is sent."""
    real = framed_wire.FramedWire.begin

    def begin(self, source, taken, given, said):
        call = real(self, source, taken, given, said)
        if said == what:
            fault_is_now(folder)
            call.sizes = [change(size) if size else 0 for size in call.sizes]
        return call

    framed_wire.FramedWire.begin = begin


def _truncate(folder: Path, rank: int, what: str) -> None:
    """Tell and send less of every frame than it has."""
    real = framed_wire.FramedWire.begin

    def begin(self, source, taken, given, said):
        call = real(self, source, taken, given, said)
        if said == what:
            fault_is_now(folder)
            call._lengths = [size - 16 for size in call._lengths]
            call.sizes = call._for_everybody(call._lengths)
        return call

    framed_wire.FramedWire.begin = begin


def _die_repairing(folder: Path, rank: int) -> None:
    """Die when one of two overflows has been sent."""

    def batch_isend_irecv(moves: list[dist.P2POp]) -> list[dist.Work]:
        first = next(move for move in moves if move.op is dist.isend)
        dist.isend(first.tensor, first.peer, group=first.group).wait()
        fault_is_now(folder)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("killed")

    dist.batch_isend_irecv = batch_isend_irecv


def _nothing(folder: Path, rank: int) -> None:
    fault_is_now(folder)


def _negative(size: int) -> int:
    return -size


def _more(size: int) -> int:
    return size + 16


FAULTS: dict[str, Callable[..., None]] = {
    "die": _die,
    "die between": _nothing,
    "die repairing": _die_repairing,
    "stop": _stop,
    "flip": _flip,
    "announce": _announce,
    "truncate": _truncate,
    "other tables": _nothing,
    "no checksums": _nothing,
}


def _ends(
    folder: Path,
    *fault: Any,
    world: int = 3,
    kind: str = "table_wise",
    timeout_s: float = 20,
    torchrun: bool = False,
    **settings: Any,
) -> list[End]:
    found = ends(world, folder, _train, kind, settings, fault, timeout_s=timeout_s, torchrun=torchrun)
    print(*found, sep="\n", file=sys.stderr)
    return found


def _survivors(found: list[End], bad: int) -> list[End]:
    """The others; the rank at fault has said nothing."""
    assert found[bad].words == ""
    return [end for rank, end in enumerate(found) if rank != bad]


@pytest.mark.multiprocess
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_a_rank_killed_in_an_exchange_is_named_with_the_step(tmp_path, direction):
    for end in _survivors(_ends(tmp_path / "run", "die", BAD, direction), BAD):
        assert end.words.startswith(f"{direction} failed on rank ")
        assert "rank 1 does not answer: gone, stopped or cut off (" in end.words
        assert end.after_s < 8


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("torchrun", "words"),
    [(True, "rank 0 does not answer: gone"), (False, "rank 0, which keeps the job's store, is gone")],
)
def test_a_rank_killed_between_steps_is_named_even_if_it_kept_the_store(tmp_path, torchrun, words):
    found = _ends(tmp_path / "run", "die between", 0, torchrun=torchrun)
    for end in _survivors(found, 0):
        assert end.words.startswith(f"a collective failed: {words}")
        assert end.after_s < 8


@pytest.mark.multiprocess
def test_a_rank_that_stops_answering_is_named_after_the_groups_time_out(tmp_path):
    # It keeps the store: nobody may wait for its answer.
    for end in _survivors(_ends(tmp_path / "run", "stop", 0, FORWARD, timeout_s=5), 0):
        assert end.words.startswith(f"{FORWARD} failed on rank ")
        assert "rank 0, which keeps the job's store, is gone or does not answer (Timed out" in end.words
        assert 4 < end.after_s < 13


@pytest.mark.multiprocess
def test_a_rank_that_dies_repairing_an_overflow_is_named(tmp_path):
    for end in _survivors(_ends(tmp_path / "run", "die repairing", BAD, transport="capacity"), BAD):
        assert re.match(rf"{FORWARD}(, waiting for the rest of frames from rank\(s\) .*)? failed", end.words)
        assert "rank 1 does not answer" in end.words
        assert end.after_s < 8


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("what", "fault", "settings", "words"),
    [
        (BACKWARD, ("flip", -3), {"checksums": True}, "its checksum does not match its bytes"),
        (FORWARD, ("flip", 2), {"kind": "row_wise"}, "it does not start with the magic bytes TREC"),
        (FORWARD, ("announce", _negative), {}, "rank 1 announces a frame of "),
        (FORWARD, ("announce", _more), {"torchrun": True}, "its size field does not agree"),
        (FORWARD, ("truncate",), {}, "bad frame from rank 1"),
    ],
    ids=["bit", "magic", "negative", "more", "truncated"],
)
def test_a_bad_frame_ends_all_ranks_with_its_sender_and_step(tmp_path, what, fault, settings, words):
    name, *rest = fault
    _all_say(_ends(tmp_path / "run", name, BAD, what, *rest, **settings), f"{what}: ", words)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("other tables", {}, "the block's rows have another dimension than expected"),
        ("no checksums", {"checksums": True}, "that rank runs without codec.checksums"),
    ],
)
def test_a_rank_with_other_settings_ends_all_ranks_with_its_name(tmp_path, name, settings, words):
    _all_say(_ends(tmp_path / "run", name, BAD, **settings), "the forward exchange of step 1: ", words)


def _all_say(found: list[End], begin: str, words: str) -> None:
    """Ranks that found the fault say it, and those that did not repeat it."""
    for end in found:
        assert words in end.words
    for rank in (0, 2):
        assert begin in found[rank].words
        assert "rank 1" in found[rank].words
    assert any(end.words.startswith(begin) for end in found), "nobody found it"
    assert "ended the job: " in found[BAD].words or found[BAD].words.startswith(begin)
