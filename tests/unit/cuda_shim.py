"""Runs the CUDA sources on the CPU: builds them with g++ and tests/cuda/shim, and executes launches.

``ShimExecutor`` runs them in this process. ``Recorder`` keeps the launches and runs them in a program of
their own, built with the address and undefined-behaviour sanitizers, where every tensor is allocated apart.
"""

import ctypes
import hashlib
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import guards
import pytest
import torch
from torch import Tensor

from tightrec.kernels.cuda.executor import Argument

KERNELS = guards.ROOT / "kernels" / "cuda"
SHIM = guards.ROOT / "tests" / "cuda" / "shim"
BUILD = guards.ROOT / "build" / "cuda_shim"
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-missing-field-initializers",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
)
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")

requires_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the shim")


class ShimError(RuntimeError):
    """A launch broke a rule that the shim checks, or a sanitizer's."""


def build(sources: Sequence[Path], sanitized: bool = False) -> Path:
    """Compile CUDA sources with the shim, once for each content.

    Args:
        sources: the ``.cu`` files.
        sanitized: build the stand-alone program under sanitizers, else a shared library.

    Returns:
        The library or program.
    """
    runtime = [SHIM / "runner.cpp", SHIM / "fiber.cpp", *([SHIM / "main.cpp"] if sanitized else [])]
    flags = (*FLAGS, *(SANITIZE if sanitized else ("-fPIC", "-shared")), "-rdynamic")
    digest = hashlib.sha256(repr((flags, [str(source) for source in sources])).encode())
    for path in [*sorted(KERNELS.glob("*.cuh")), *sorted(SHIM.glob("*.h")), *runtime, *sources]:
        digest.update(path.read_bytes())
    product = BUILD / f"{'program' if sanitized else 'library'}-{digest.hexdigest()[:16]}"
    if product.exists():
        return product
    BUILD.mkdir(parents=True, exist_ok=True)
    unfinished = product.with_suffix(f".{os.getpid()}")
    command = ["g++", *flags, "-I", str(KERNELS), "-I", str(SHIM), *map(str, runtime)]
    command += ["-x", "c++", "-include", str(SHIM / "shim.h"), *map(str, sources)]
    done = subprocess.run([*command, "-o", str(unfinished), "-ldl"], capture_output=True, text=True)
    if done.returncode:
        raise ShimError(done.stderr)
    unfinished.rename(product)
    return product


def kernel_sources(prefix: str) -> list[Path]:
    """The ``.cu`` files of kernels/cuda whose names start with ``prefix``."""
    return sorted(KERNELS.glob(prefix + "*.cu"))


class ShimExecutor:
    """Executes launches in this process, with blocks and threads interleaved by a seed."""

    def __init__(self, sources: Sequence[Path], seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.names: list[str] = []
        """The kernels launched so far."""
        self._run = ctypes.CDLL(str(build(sources))).shim_launch
        self._run.restype = ctypes.c_char_p

    def launch(
        self, kernel_name: str, grid: int, block: int, args: Sequence[Argument], shared_bytes: int = 0
    ) -> None:
        """Run one launch to its end.

        Raises:
            ShimError: it broke a rule that the shim checks.
        """
        self.names.append(kernel_name)
        values = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
        packed = (ctypes.c_int64 * len(values))(*values)
        shape = [ctypes.c_longlong(number) for number in (grid, block, shared_bytes)]
        seed = ctypes.c_uint(self.random.getrandbits(24))
        failure = self._run(kernel_name.encode(), *shape, packed, len(values), seed)
        if failure is not None:
            raise ShimError(f"{kernel_name}: {failure.decode()}")


class Recorder:
    """Keeps launches, to run them later in a program under sanitizers."""

    def __init__(self, sources: Sequence[Path], seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.sources = sources
        self._storages: dict[int, Tensor] = {}
        self._launches: list[bytes] = []

    def launch(
        self, kernel_name: str, grid: int, block: int, args: Sequence[Argument], shared_bytes: int = 0
    ) -> None:
        """Keep one launch; nothing runs yet."""
        name = kernel_name.encode()
        parts = [struct.pack("<q", len(name)), name]
        numbers = (grid, block, shared_bytes, self.random.getrandbits(24), len(args))
        parts.append(struct.pack("<5q", *numbers))
        for arg in args:
            parts.append(struct.pack("<2q", *(self._place(arg) if isinstance(arg, Tensor) else (-1, arg))))
        self._launches.append(b"".join(parts))

    def run(self, folder: Path) -> None:
        """Run what was kept and bring back the tensors' contents; ``folder`` takes two files.

        Raises:
            ShimError: with the program's output, where it failed.
        """
        program, given, result = build(self.sources, sanitized=True), folder / "input", folder / "output"
        storages = list(self._storages.values())
        with given.open("wb") as file:
            file.write(struct.pack("<q", len(storages)))
            for storage in storages:
                file.write(struct.pack("<q", storage.numel()) + storage.numpy().tobytes())
            file.write(struct.pack("<q", len(self._launches)) + b"".join(self._launches))
        options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
        done = subprocess.run(
            [str(program), str(given), str(result)],
            capture_output=True,
            text=True,
            env={**os.environ, **options},
        )
        if done.returncode:
            raise ShimError(done.stderr)
        data = result.read_bytes()
        for storage in storages:
            part, data = data[: storage.numel()], data[storage.numel() :]
            if part:
                storage.copy_(torch.frombuffer(bytearray(part), dtype=torch.uint8))

    def _place(self, tensor: Tensor) -> tuple[int, int]:
        """Number of the tensor's storage, and the tensor's byte offset in it."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._storages:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._storages[key] = whole
        return list(self._storages).index(key), tensor.data_ptr() - key
