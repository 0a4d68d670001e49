"""The processes that this one has started, to see that none is left."""

from contextlib import suppress

import psutil


def children() -> set[int]:
    """Process ids of all descendants, those that ended and that nobody waited for among them.

    What other tests keep running, such as the fork server of the ranks, is among them too: compare with what
    was there before. The resource tracker of multiprocessing is left out; it stays as long as this process.
    """
    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            ended = child.status() == psutil.STATUS_ZOMBIE
            if ended or "resource_tracker" not in " ".join(child.cmdline()):
                found.add(child.pid)
    return found
