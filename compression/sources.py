"""Tensors from ``.npy`` and ``.safetensors`` files, for the command line."""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tightrec.compression.index import PathLike, open_regular

__all__ = ["read_tensors"]

_NPY_MAGIC = b"\x93NUMPY"
_STORABLE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_tensors(path: PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The float32, float16 and bfloat16 tensors of a file by name, and the types of its other tensors.

    A ``.npy`` file holds one, named after the file; it is known by its first bytes, ``.safetensors`` by name.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is neither, is damaged, or the safetensors library is missing; says what to do.
    """
    name = os.fspath(path)
    with open_regular(path) as file:
        head = file.read(len(_NPY_MAGIC))
    if head == _NPY_MAGIC:
        return _npy(name)
    if name.endswith(".safetensors"):
        return _safetensors(name)
    raise ValueError(f"{name}: neither a .npy nor a .safetensors file")


def _npy(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    stem = os.path.basename(name).removesuffix(".npy")
    try:
        array = np.load(name, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    # What numpy raises for a header that it cannot read depends on how the header is broken.
    except Exception as error:
        raise ValueError(f"{name}: not a readable .npy file ({_first_line(error)})") from None
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4):
        return {}, {stem: str(array.dtype)}
    native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    return {stem: torch.from_numpy(native)}, {}


def _safetensors(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError(
            f"{name}: reading .safetensors files needs the safetensors library: pip install safetensors"
        ) from None
    tensors: dict[str, Tensor] = {}
    others: dict[str, str] = {}
    try:
        with safe_open(name, framework="pt", device="cpu") as file:
            content: Any = file
            for key in content.keys():  # noqa: SIM118 (it is no mapping)
                dtype = content.get_slice(key).get_dtype()
                if dtype in _STORABLE:
                    tensors[key] = content.get_tensor(key)
                else:
                    others[key] = dtype
    except SafetensorError as error:
        raise ValueError(f"{name}: not a readable .safetensors file ({_first_line(error)})") from None
    return tensors, others


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
