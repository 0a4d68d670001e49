"""How good a path's scores are on held-out rows, and what it occupies: found in a process of its own.

The process loads the snapshot as a worker does, puts the path's caches in front of it, scores the rows and
ends. Everything that needs torch is imported there.
"""

import multiprocessing
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tightrec.formats.columns import Columns, Ids
from tightrec.serving.paths import CacheConfig

Frequencies = dict[str, tuple[Ids, Ids]]
"""Distinct ids [n], and how often each came [n]."""

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be scored with what."""

    snapshot: Path
    """Its folder."""

    fingerprint: str
    """SHA-256 of its manifest."""

    device: str
    """``cpu`` or ``cuda:N``."""

    threads: int
    """Intra-op threads."""

    cache: CacheConfig
    """What stands in front of its deep-hash embeddings."""

    cache_file: Path | None
    """Where what the caches start with is kept; made if it is not there. None: nowhere."""

    frequencies: Frequencies
    """By the name of each feature with a deep-hash embedding, for the caches: ids of the past."""

    batch_rows: int
    """Rows that are scored at once."""


@dataclass(frozen=True, kw_only=True)
class Assessed:
    """What came of it."""

    rows: int
    """Rows that were scored."""

    accuracy: float
    """Share of the rows whose click is predicted right at a threshold of one half."""

    auc: float
    """Exact AUC."""

    ne: float
    """Normalised entropy."""

    memory_bytes: int
    """What the path added to the process. CPU: private memory at rest, and what the largest batch took at its
    peak. GPU: the most that torch held."""

    cache_bytes: int
    """The caches' share of it."""

    base_bytes: int
    """Private memory of the process without the path."""

    hits: dict[str, float]
    """Share of the looked-up ids that each cache level answered, over the second half of the rows."""


def assess(task: Task, rows: Columns, timeout_s: float) -> Assessed:
    """Score ``rows`` with the path of ``task`` in a new process.

    Raises:
        ValueError: the snapshot is damaged, or a score is not a number.
        ChildProcessError: the process failed or ended, for want of memory for instance.
        TimeoutError: it took longer than ``timeout_s``.
    """
    with _child(task, rows) as (process, connection):
        if not connection.poll(timeout_s):
            raise TimeoutError(f"scoring {len(rows):,} rows with {task.snapshot} took over {timeout_s:g} s.")
        try:
            kind, found = connection.recv()
        except EOFError:
            process.join()
            raise ChildProcessError(
                f"the process that scored {task.snapshot} ended with status {process.exitcode}"
                f"{' (out of memory?)' if process.exitcode == -signal.SIGKILL else ''}."
            ) from None
    if kind == "refused":
        raise ValueError(found)
    if kind == "failed":
        raise ChildProcessError(f"scoring with {task.snapshot} failed: {found}")
    return found


def count_ids(rows: Columns, features: Sequence[str], wanted: Collection[str]) -> Frequencies:
    """How often each id of the ``wanted`` features comes in ``rows``; ``features`` names their columns."""
    return {
        name: np.unique(bags.ids, return_counts=True)
        for name, bags in zip(features, rows.sparse, strict=True)
        if name in wanted
    }


@contextmanager
def _child(task: Task, rows: Columns) -> Iterator[tuple[Any, Connection]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_carry_out, args=(task, rows, theirs), daemon=True)
    # The tracker unblocks the signal when it starts, so it starts before. A child inherits the mask: Ctrl-C
    # reaches this process alone, which ends the child.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        yield process, ours
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ours.close()
        if process.pid is not None:
            process.kill()
            process.join()


def _carry_out(task: Task, rows: Columns, connection: Connection) -> None:
    try:
        answer: tuple[str, Any] = ("done", _assess(task, rows))
    except ValueError as error:
        answer = ("refused", str(error))
    except Exception as error:
        answer = ("failed", f"{type(error).__name__}: {error}")
    connection.send(answer)
    connection.close()


def _assess(task: Task, rows: Columns) -> Assessed:
    import torch

    from tightrec.models.scores import score
    from tightrec.snapshot.loader import load
    from tightrec.snapshot.rows import replay

    torch.set_num_threads(task.threads)
    # So that the buffers of torch's threads and its matrix products count as the process's, not the path's.
    torch.ones(512, 512) @ torch.ones(512, 512)
    before = _private_bytes()
    snapshot = load(task.snapshot, task.device, check=False)
    caches = None
    if task.cache.levels != "none":
        from tightrec.serving.caching.cache import attach

        hashed = snapshot.scorer.hashed
        assert hashed is not None
        warm = [tuple(map(torch.from_numpy, task.frequencies[name])) for name in hashed.names]
        caches = attach(hashed, task.cache, task.cache_file, task.fingerprint, warm)
    at_rest = _private_bytes()
    _forget_peak()
    resident = _status_bytes("VmRSS:")
    parts, halfway = [], None
    for batch in replay(rows, task.batch_rows):
        inputs = (tensor.to(snapshot.device) for tensor in (batch.dense, batch.ids, batch.offsets))
        parts.append(snapshot.logits(*inputs).cpu())
        if caches and halfway is None and 2 * sum(map(len, parts)) >= len(rows):
            halfway = dict(caches.counts)
    if task.device == "cpu":
        memory = at_rest - before + max(_status_bytes("VmHWM:") - resident, 0)
    else:
        memory = torch.cuda.max_memory_reserved(task.device)
    logits, labels = torch.cat(parts), torch.from_numpy(np.array(rows.labels))
    found = score(logits, labels)
    if found.note:
        raise ValueError(f"the snapshot {task.snapshot} cannot be judged on these rows: {found.note}.")
    return Assessed(
        rows=len(labels),
        accuracy=float(((logits >= 0) == (labels > 0)).double().mean()),
        auc=found.auc,
        ne=found.ne,
        memory_bytes=max(memory, 0),
        cache_bytes=min(caches.memory_bytes, max(memory, 0)) if caches else 0,
        base_bytes=before,
        hits=_shares(halfway, caches.counts) if caches and halfway is not None else {},
    )


def _private_bytes() -> int:
    # Anonymous pages: what is mapped from files, such as code and tables that were read, can be dropped.
    return _status_bytes("RssAnon:", "RssShmem:")


def _status_bytes(*kinds: str) -> int:
    lines = [line.split() for line in _STATUS.read_text().splitlines()]
    return sum(int(line[1]) * 1024 for line in lines if line and line[0] in kinds)


def _forget_peak() -> None:
    """Let VmHWM, the peak of resident memory, start from now (man 5 proc, clear_refs)."""
    # Where that is not allowed, the peak is that of the whole life of the process: too much rather than less.
    with suppress(OSError):
        _CLEAR_REFS.write_text("5")


def _shares(before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    found = {}
    for level, (hits, misses) in after.items():
        earlier_hits, earlier_misses = before.get(level, (0, 0))
        hits, misses = hits - earlier_hits, misses - earlier_misses
        found[level] = hits / (hits + misses) if hits + misses else 0.0
    return found
