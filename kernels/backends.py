"""The codec's backends behind one signature, loaded when first asked for."""

from importlib import import_module
from typing import Protocol, cast

import torch

from tightrec.kernels.job import DecodeJob, EncodeJob, Stages, Totals

_MODULES = {
    "reference": "tightrec.kernels.reference",
    "cpu": "tightrec.kernels.cpu",
    "cuda": "tightrec.kernels.cuda.backend",
}
NAMES = tuple(_MODULES)


class Backend(Protocol):
    """What a backend module has; all of them write the same bytes."""

    def encode(self, job: EncodeJob) -> None:
        """Write the frames of a job."""

    def decode(self, job: DecodeJob) -> None:
        """Write the values of a job's frames, and its status."""

    def encode_scratch_bytes(self, totals: Totals, stages: Stages, value_bytes: int) -> int:
        """Bytes of scratch that ``encode`` needs."""

    def decode_scratch_bytes(self, totals: Totals, value_bytes: int) -> int:
        """Bytes of scratch that ``decode`` needs."""


def backend(name: str, device: torch.device) -> Backend:
    """A backend by name, or the device's own for "".

    Raises:
        ValueError: the name is unknown, or that backend does not work on tensors of this device.
    """
    if name not in ("", *NAMES):
        raise ValueError(f"unknown codec backend {name!r}; choose one of {', '.join(NAMES)}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"the codec works on cpu and cuda tensors, not on {device.type}")
    if (name or device.type) == "cuda" and device.type == "cpu":
        raise ValueError("codec backend 'cuda' needs CUDA tensors; these are on the CPU")
    if name in ("reference", "cpu") and device.type == "cuda":
        raise ValueError(f"codec backend {name!r} needs CPU tensors; these are on {device}")
    chosen = name or device.type
    try:
        return cast(Backend, import_module(_MODULES[chosen]))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tightrec"):
            raise
        raise ModuleNotFoundError(
            f"codec backend {chosen!r} needs {error.name}, which is not installed: pip install {error.name}. "
            f"backend='reference' needs torch alone, and is slow",
            name=error.name,
        ) from error
