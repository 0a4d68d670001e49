"""A process that scores: ``python -m tightrec.serving.workers.process FILE_NUMBER``, started by the pool.

It takes batches from the socket FILE_NUMBER until that is closed, which the death of its parent does too.
"""

import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tightrec.serving.workers.paths import Paths

LOWEST_PRIORITY = 19


def main(words: list[str] | None = None) -> int:
    """Serve one socket; returns the exit status."""
    # The parent answers what is in flight before it ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    number = int((sys.argv[1:] if words is None else words)[0])
    with socket.socket(fileno=number) as connection:
        try:
            _serve(connection)
        except (EOFError, ConnectionError):
            return 0
    return 0


def _serve(connection: socket.socket) -> None:
    import json

    start = json.loads(bytes(_receive(connection)))
    found: list[Paths | dict[str, Any]] = []
    loading = threading.Thread(target=_load, args=(start, found.append))
    loading.start()
    loading.join()
    from tightrec.serving.workers.wire import json_message

    (paths,) = found
    if isinstance(paths, dict):
        connection.sendall(json_message(paths))
        return
    paths.use_threads(start["threads"])
    try:
        paths.try_out()
    except (RuntimeError, ValueError, MemoryError) as error:
        connection.sendall(json_message(_told(error)))
        return
    # What was loaded stays: the collector need not look through it at every later run.
    gc.collect()
    gc.freeze()
    connection.sendall(json_message({"steps": paths.steps()}))
    _score_until_closed(connection, paths)


def _load(start: dict[str, Any], done: Callable[[Any], None]) -> None:
    if start["background"]:
        # On Linux a thread has a priority of its own. This one ends; scoring has the normal one.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
    try:
        from tightrec.serving.workers.paths import Paths

        done(Paths(start["paths"], start["device"], start["keep_caches"]))
    except Exception as error:
        done(_told(error))


def _score_until_closed(connection: socket.socket, paths: "Paths") -> None:
    import numpy as np

    from tightrec.serving.workers.wire import read_batch, scores_message

    nothing = np.empty(0, np.float32)
    while True:
        message = _receive(connection)
        began = time.perf_counter_ns()
        try:
            place, batch, _ = read_batch(message, paths.dense, paths.sparse)
            scores, counts = paths.score(place, batch)
        except Exception as error:
            scores, counts = nothing, _told(error)
        # Compute time includes merging the queries.
        connection.sendall(b"".join(scores_message(scores, time.perf_counter_ns() - began, counts)))


def _receive(connection: socket.socket) -> bytearray:
    size = int.from_bytes(_exactly(connection, 8), "little")
    return _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    left = memoryview(buffer)
    while left:
        count = connection.recv_into(left)
        if not count:
            raise EOFError
        left = left[count:]
    return buffer


def _told(error: Exception) -> dict[str, Any]:
    """``fault``: of this process or its machine, not of what it was given."""
    return {"error": _sentence(error), "fault": not isinstance(error, ValueError)}


def _sentence(error: BaseException) -> str:
    if isinstance(error, ValueError | OSError):
        return str(error)
    first = str(error).splitlines()[0] if str(error) else "no more is known"
    return f"{type(error).__name__}: {first}"


if __name__ == "__main__":
    sys.exit(main())
