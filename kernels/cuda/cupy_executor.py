"""Runs the kernels on a GPU through CuPy, on torch's current stream.

CuPy loads the cubin and gives access to the driver's launch. Its own call of a kernel would look at the
type of every argument; here all of them are eight bytes wide and are packed in one go.
"""

import ctypes
import itertools
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tightrec.kernels.cuda.build import BuildError, cubin
from tightrec.kernels.cuda.executor import Argument

_MOST_ARGUMENTS = 64
_SERIAL = itertools.count(1)


class _Packed(threading.local):
    """A thread's room for one launch's arguments; the driver copies them before the launch returns."""

    def __init__(self) -> None:
        self.values = (ctypes.c_int64 * _MOST_ARGUMENTS)()
        first = ctypes.addressof(self.values)
        self._pointers = (ctypes.c_void_p * _MOST_ARGUMENTS)(*range(first, first + 8 * _MOST_ARGUMENTS, 8))
        self.address = ctypes.addressof(self._pointers)
        self.serial = 0
        """Tells what was packed last, in any thread."""


_PACKED = _Packed()


class Kernels:
    """The kernels of one device, loaded as they are asked for."""

    def __init__(self, path: Path, device: int) -> None:
        try:
            import cupy
        except ImportError as error:
            raise BuildError(
                f"the CUDA backend needs CuPy ({error}): install cupy-cuda13x or the one for your CUDA"
            ) from error
        self.device = device
        self.launch: Callable[..., None] = cupy.cuda.driver.launchKernel
        self._module = cupy.RawModule(path=str(path))
        self._functions: dict[str, Any] = {}
        self.handles: dict[str, int] = {}
        """The driver's handle of each kernel loaded so far."""

    def load(self, name: str) -> int:
        """The handle of a kernel."""
        with torch.cuda.device(self.device):
            function = self._module.get_function(name).kernel
        self._functions[name] = function
        self.handles[name] = function.ptr
        return function.ptr


_KERNELS: dict[int, Kernels] = {}
_LOADING = threading.Lock()


def kernels(device: int) -> Kernels:
    """The kernels of a device, compiled and loaded the first time.

    Raises:
        BuildError: they could not be; says what to do.
    """
    if device not in _KERNELS:
        with _LOADING:
            if device not in _KERNELS:
                major, minor = torch.cuda.get_device_capability(device)
                _KERNELS[device] = Kernels(cubin(f"sm_{major}{minor}"), device)
    return _KERNELS[device]


class CupyExecutor:
    """Queues the launches of one call of the codec on the stream that is current when it is made."""

    def __init__(self, device: torch.device) -> None:
        current = torch.cuda.current_device()
        index = current if device.index is None else device.index
        self._kernels = kernels(index)
        self._stream = torch.cuda.current_stream(index).cuda_stream
        self._away = index != current
        self._packed: Sequence[Argument] = ()
        self._serial = -1

    def launch(
        self, kernel_name: str, grid: int, block: int, args: Sequence[Argument], shared_bytes: int = 0
    ) -> None:
        """Queue one launch; see ``executor.Executor``."""
        known, room = self._kernels, _PACKED
        handle = known.handles.get(kernel_name) or known.load(kernel_name)
        # Only this object keeps ``args``, and it lives for one call: no tensor is held longer than that.
        if args is not self._packed or room.serial != self._serial:
            values = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
            struct.pack_into(f"{len(values)}q", room.values, 0, *values)
            self._packed, self._serial = args, next(_SERIAL)
            room.serial = self._serial
        shape = (grid, 1, 1, block, 1, 1, shared_bytes, self._stream, room.address, 0)
        if self._away:
            with torch.cuda.device(known.device):
                known.launch(handle, *shape)
        else:
            known.launch(handle, *shape)
