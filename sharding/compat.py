"""The only file that reaches below torchrec's public surface, and the versions that was checked on.

What is touched: the module attribute ``dist`` of ``torchrec.distributed.comm_ops`` (exchange of pooled
embeddings) and of ``torchrec.distributed.dist_data`` (exchange of ids), through which torchrec calls
every collective.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from torchrec.distributed import comm_ops, dist_data

CHECKED_VERSIONS = ("1.6.1", "1.7.0", "1.8.0", "1.9.0", "1.9.1", "1.9.2")
"""torchrec releases whose source has the names used here; the tests run on the pinned one."""


def require_checked_torchrec() -> None:
    """Refuse torchrec releases that this file was not checked on.

    Raises:
        ValueError: naming the release found and those checked.
    """
    found = version("torchrec")
    if found not in CHECKED_VERSIONS:
        raise ValueError(
            f"torchrec {found} is not one that sharding/compat.py was checked on "
            f"({', '.join(CHECKED_VERSIONS)}). Install the pinned one with `make setup`."
        )


@contextmanager
def replaced_collectives(embeddings: Any, inputs: Any) -> Iterator[None]:
    """Let torchrec call ``embeddings`` and ``inputs`` where it would call ``torch.distributed``.

    Both must offer torch.distributed's functions. The originals return on exit.
    """
    require_checked_torchrec()
    before = comm_ops.dist, dist_data.dist
    comm_ops.dist, dist_data.dist = embeddings, inputs
    try:
        yield
    finally:
        comm_ops.dist, dist_data.dist = before
