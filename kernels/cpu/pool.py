"""A few threads that run the compiled loops side by side; the loops release the GIL.

Numba's own parallel loops are not used: their thread layers do not survive a fork (data loaders) and share
the processor with torch's. The number of threads is torch's.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

PIECES_PER_THREAD = 8
"""A range of units is cut this fine, so that threads that got light units take more of them."""

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_helpers = 0


def _forget() -> None:
    """Drop what a fork copied: the threads exist in the parent only, and its lock may be held."""
    global _lock, _pool, _helpers
    _lock, _pool, _helpers = threading.Lock(), None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _executor(helpers: int) -> ThreadPoolExecutor:
    """The pool, with at least ``helpers`` threads."""
    global _pool, _helpers
    with _lock:
        if _pool is None or _helpers < helpers:
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool, _helpers = ThreadPoolExecutor(helpers, thread_name_prefix="tightrec-codec"), helpers
        return _pool


def run(loop: Callable[..., Any], units: int, *arguments: Any) -> None:
    """Call ``loop(start, stop, *arguments)`` on ranges that cover 0..units, on torch's number of threads.

    The calling thread takes ranges too, so a call ends even while all helpers serve other calls.
    """
    threads = min(torch.get_num_threads(), units)
    if threads <= 1:
        if units > 0:
            loop(0, units, *arguments)
        return
    step = max(1, units // (threads * PIECES_PER_THREAD))
    starts = iter(range(0, units, step))
    take = threading.Lock()

    def work() -> None:
        while True:
            with take:
                start = next(starts, None)
            if start is None:
                return
            loop(start, min(start + step, units), *arguments)

    helpers = []
    for _ in range(threads - 1):
        try:
            helpers.append(_executor(threads - 1).submit(work))
        except RuntimeError:  # the pool was replaced by a larger one, or the interpreter is ending
            break
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()
