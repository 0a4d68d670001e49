"""Paths that were measured on another machine, for simulations on devices that are not at hand."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from tightrec.serving.paths import Device, PathSet, ServingPath, read_paths


def read_recorded(files: Sequence[Path], taken: Iterable[str]) -> list[PathSet]:
    """The sets of paths in ``files``, their devices marked as recorded.

    A device whose name is taken gets the file's name behind it (``cpu@gpu_server``), and a path's name
    follows its device's, so that all names differ.

    Args:
        files: written by ``explore``.
        taken: names of the devices that are measured here.

    Raises:
        ValueError: a file is missing or holds no paths.
    """
    devices = set(taken)
    found = []
    for file in files:
        paths = read_paths(file)
        names = {device.name: _free(device.name, file.stem, devices) for device in paths.devices}
        found.append(
            PathSet(
                devices=tuple(_marked(device, names) for device in paths.devices),
                paths=tuple(_moved(path, names, file) for path in paths.paths),
                dropped=tuple((_moved(path, names, file), why) for path, why in paths.dropped),
                notes=paths.notes,
            )
        )
    return found


def _free(name: str, stem: str, taken: set[str]) -> str:
    """``name`` or a longer one that is not in ``taken``, to which it is added."""
    wanted = name if name not in taken else f"{name}@{stem}"
    number = 2
    while wanted in taken:
        wanted, number = f"{name}@{stem}-{number}", number + 1
    taken.add(wanted)
    return wanted


def _marked(device: Device, names: dict[str, str]) -> Device:
    return dataclasses.replace(device, name=names[device.name], recorded=True)


def _moved(path: ServingPath, names: dict[str, str], file: Path) -> ServingPath:
    device = names.get(path.device, path.device)
    parts = path.name.split(f"-{path.device}-", 1)
    name = f"-{device}-".join(parts) if len(parts) == 2 else path.name + device.removeprefix(path.device)
    # Caches stay where they were made.
    notes = {**path.notes, "recorded_in": str(file)}
    return dataclasses.replace(path, name=name, device=device, cache_file=None, notes=notes)
