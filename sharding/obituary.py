"""Why a job ends: ranks tell each other through the job's key-value store, and find out who is gone.

The rank that has a reason writes it down before it leaves. The others see no more than a broken or silent
connection: they look for the reason, answer a roll-call, and name whoever does not.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from torch import distributed as dist

_PATIENCE_S = 2.0
"""How long ranks that end wait for each other."""

_ANSWER_S = 1.0
"""How long the store may take to answer."""

_POLL_S = 0.05

_BROKEN = re.compile(r"gloo|nccl|connection|broken pipe|socket|timed out", re.IGNORECASE)
"""In the words of an error that a rank meets because another one is gone."""

_Answer = TypeVar("_Answer")


class ExchangeError(RuntimeError):
    """An exchange of embeddings or gradients cannot be completed; the message names peers and step."""


class _Unreachable(Exception):
    """The store does not answer."""


def tell(reason: str) -> None:
    """Leave for the other ranks why this one is about to end; the first reason of a job counts.

    Takes at most a few seconds and never raises: what comes next is the error itself.
    """
    board = _board()
    if board is not None:
        with suppress(_Unreachable):
            board.give_reason(reason)
            board.leave(board.everyone)


def survey() -> str:
    """Why another rank has ended, or which ranks do not answer; for a rank whose connections broke.

    Takes at most a few seconds and never raises.
    """
    board = _board()
    if board is None:
        return "there is no job's store to ask why"
    try:
        board.call_roll()
        until = time.monotonic() + _PATIENCE_S
        while True:
            # In this order: whoever answers has given its reason before.
            silent = board.silent()
            reason = board.reason()
            if reason is not None or not silent or time.monotonic() > until:
                break
            time.sleep(_POLL_S)
        board.leave([rank for rank in board.everyone if rank not in silent])
    except _Unreachable:
        return f"{board.keeper}, which keeps the job's store, is gone or does not answer"
    if reason is not None:
        return reason
    if silent:
        return f"{_named(silent)} not answer: gone, stopped or cut off"
    return "all ranks still answer, so a connection between them broke or was too slow"


def glance() -> str | None:
    """Why another rank has ended, if one has; and answer a roll-call. For a rank that has waited for long."""
    board = _board()
    if board is None:
        return None
    try:
        if not board.has_news():
            return None
        board.answer()
        reason = board.reason()
        if reason is not None:
            board.leave([])
    except _Unreachable:
        return None
    return reason


def last_words(error: BaseException) -> str | None:
    """What to say of an error that ends a rank's training; call it before the process group is destroyed.

    An error of this rank's own is left for the others to read. One that came over a connection is explained.

    Returns:
        the explanation, where the error does not hold it itself.
    """
    if isinstance(error, ExchangeError):
        return None
    if isinstance(error, dist.DistError) or (type(error) is RuntimeError and _BROKEN.search(str(error))):
        return f"a collective failed: {survey()} ({shortened(error)})"
    tell(f"{type(error).__name__}: {shortened(error)}")
    return None


def shortened(error: BaseException) -> str:
    """The first sentence of an error, without the place in a library's source at its beginning."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[\S+:\d+\] ", "", lines[0]).split(". ")[0].rstrip(".")


def _named(ranks: Sequence[int]) -> str:
    listed = ", ".join(str(rank) for rank in ranks)
    return f"rank {listed} does" if len(ranks) == 1 else f"ranks {listed} do"


class _Board:
    """The job's store, as ranks use it when they end; every question may raise ``_Unreachable``."""

    _waiting: threading.Thread | None = None
    """A question that was never answered: there is no use in asking more."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self._store, self._rank = store, rank
        self.everyone = list(range(world))
        in_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.keeper = "torchrun's first agent" if in_launcher else "rank 0"
        self._kept_here = rank == 0 and not in_launcher
        # A launcher's store may live on when it starts the job again.
        self._prefix = f"tightrec/end/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def _key(self, *words: object) -> str:
        return "/".join([self._prefix, *map(str, words)])

    def _ask(self, question: Callable[[], _Answer]) -> _Answer:
        """The answer, from a thread: a stopped process that keeps the store blocks whoever asks it."""
        if _Board._waiting is not None and _Board._waiting.is_alive():
            raise _Unreachable
        answers: list[_Answer] = []

        def run() -> None:
            # No answer says it all; what torch raises differs from store to store.
            with suppress(Exception):
                answers.append(question())

        _Board._waiting = thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(_ANSWER_S)
        if not answers:
            raise _Unreachable
        return answers[0]

    def give_reason(self, reason: str) -> None:
        words = f"rank {self._rank} ended the job: {reason}"
        self._ask(lambda: self._store.compare_set(self._key("reason"), "", words))
        self.call_roll()

    def reason(self) -> str | None:
        def read() -> str | None:
            key = self._key("reason")
            return self._store.get(key).decode() if self._store.check([key]) else None

        return self._ask(read)

    def call_roll(self) -> None:
        self._ask(lambda: self._store.set(self._key("roll"), "called"))
        self.answer()

    def answer(self) -> None:
        self._ask(lambda: self._store.set(self._key("here", self._rank), "here"))

    def has_news(self) -> bool:
        return self._ask(lambda: bool(self._store.check([self._key("roll")])))

    def silent(self) -> list[int]:
        """Ranks that have not answered."""
        return self._without("here", self.everyone)

    def _without(self, what: str, ranks: Sequence[int]) -> list[int]:
        def find() -> list[int]:
            if not ranks or self._store.check([self._key(what, rank) for rank in ranks]):
                return []
            return [rank for rank in ranks if not self._store.check([self._key(what, rank)])]

        return self._ask(find)

    def leave(self, readers: Sequence[int]) -> None:
        """Say that this rank has read all it needs; the keeper of the store waits for ``readers`` first."""
        self._ask(lambda: self._store.set(self._key("left", self._rank), "left"))
        until = time.monotonic() + _PATIENCE_S
        while self._kept_here and self._without("left", readers) and time.monotonic() < until:
            time.sleep(_POLL_S)


def _board() -> _Board | None:
    if not dist.is_initialized():
        return None
    store = dist.distributed_c10d._get_default_store()
    return _Board(store, dist.get_rank(), dist.get_world_size())
