"""Warnings that the libraries below raise about their own inner workings, kept off a user's console.

Only messages that no setting of ours can change are here; every other warning stays.
"""

import logging
import warnings

_WARNINGS = (
    r"`broadcast_buffers` is deprecated",
    r".*is_fx_tracing will return true.*",
    r".*torch\.distributed\._?shard.*",
    r".*DTensor.*",
    r".*fbgemm::.*autograd kernel was not registered.*",
    r"Converting a tensor with requires_grad=True to a scalar.*",
    r"No device id is provided via `init_process_group`.*",
)
_LOGGERS = ("torchrec", "torch.fx", "fbgemm_gpu", "torch.distributed.checkpoint")


def hush() -> None:
    """Silence them for the rest of this process."""
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
