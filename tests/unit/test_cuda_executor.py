"""The GPU executor hands the driver what a kernel is to see; checked with a driver that only looks."""

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tightrec.kernels.cuda import cupy_executor
from tightrec.kernels.cuda.build import BuildError
from tightrec.kernels.cuda.cupy_executor import CupyExecutor

STREAM = 4711


class Driver:
    """Stands for the loaded kernels of a device; reads the arguments of each launch as a driver would."""

    def __init__(self) -> None:
        self.device = 0
        self.handles: dict[str, int] = {}
        self.loaded: list[str] = []
        self.launches: list[tuple[tuple[int, ...], list[int]]] = []
        self.count = 0

    def load(self, name: str) -> int:
        self.loaded.append(name)
        self.handles[name] = 100 + len(self.loaded)
        return self.handles[name]

    def launch(self, *words: int) -> None:
        pointers = (ctypes.c_void_p * self.count).from_address(words[9])
        self.launches.append(
            (words, [ctypes.c_int64.from_address(pointers[i] or 0).value for i in range(self.count)])
        )


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(cupy_executor, "kernels", lambda device: driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))
    return driver


def test_a_launch_passes_pointers_and_numbers(driver: Driver) -> None:
    values = torch.arange(8.0)
    args = [values, values[3:], 0, -5, 2**62]
    driver.count = len(args)
    executor = CupyExecutor(torch.device("cuda", 0))
    executor.launch("one", 7, 256, args, 48)
    executor.launch("two", 1, 32, args)
    executor.launch("one", 2, 64, args)
    seen = [values.data_ptr(), values.data_ptr() + 12, 0, -5, 2**62]
    assert [numbers for _, numbers in driver.launches] == [seen] * 3
    shapes = [words[:9] for words, _ in driver.launches]
    assert shapes[0] == (101, 7, 1, 1, 256, 1, 1, 48, STREAM)
    assert shapes[1] == (102, 1, 1, 1, 32, 1, 1, 0, STREAM)
    assert shapes[2] == (101, 2, 1, 1, 64, 1, 1, 0, STREAM)
    assert driver.loaded == ["one", "two"]


def test_kept_arguments_are_not_those_of_another_executor(driver: Driver) -> None:
    driver.count = 2
    first, second = (CupyExecutor(torch.device("cuda")) for _ in range(2))
    ours, theirs = [1, 2], [3, 4]
    for executor, args in ((first, ours), (second, theirs), (first, ours), (first, ours), (first, theirs)):
        executor.launch("one", 1, 32, args)
    assert [numbers for _, numbers in driver.launches] == [[1, 2], [3, 4], [1, 2], [1, 2], [3, 4]]


def test_another_device_is_made_current_for_a_launch(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []

    class Guard:
        def __init__(self, device: int) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            entered.append("left")

    driver.device = 1
    monkeypatch.setattr(torch.cuda, "device", Guard)
    CupyExecutor(torch.device("cuda", 1)).launch("one", 1, 32, [])
    assert entered == [1, "left"]
    CupyExecutor(torch.device("cuda", 0)).launch("one", 1, 32, [])
    assert entered == [1, "left"]


def test_a_missing_cupy_is_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BuildError, match=r"needs CuPy .*install cupy-cuda13x"):
        cupy_executor.Kernels(tmp_path / "kernels.cubin", 0)
