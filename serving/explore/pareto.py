"""Which of the measured paths are kept: those that none beats, as far as the device's memory goes.

The paths of a device with the same number of threads run in the same worker processes, of which there are
``slots // threads``; each of them holds every snapshot of its paths once, and every cache. Keeping, for each
device, the most accurate representations that fit its memory is MP-Rec's idea (arXiv 2302.10872); the rule
is ours.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tightrec.serving.paths import Device, Quality, ServingPath

TOLERANCE = 0.02
"""Latencies that differ by less, relative, count as equal: medians of the same path differ by as much."""

Dropped = tuple[ServingPath, str]
"""A path that is not kept, and the reason."""


class Kept(NamedTuple):
    """What becomes of the paths of one device."""

    paths: tuple[ServingPath, ...]
    """The most accurate first."""

    dropped: tuple[Dropped, ...]
    """The others."""


def keep(device: Device, paths: Sequence[ServingPath], by: Quality) -> Kept:
    """The paths of ``device`` to keep: none is dominated by one that fits, and together they fit its memory.

    Raises:
        ValueError: not even the smallest path fits; says what it needs.
    """
    require_room(device, paths)
    limit = device.memory_bytes
    fitting, too_large = [], []
    for path in paths:
        needed = needed_bytes(device, [path])
        if limit is None or needed <= limit:
            fitting.append(path)
        else:
            too_large.append((path, f"no room: it needs {needed:,} of the {limit:,} on {device.name}"))
    front, dominated = pareto_front(fitting, by)
    kept, without_room = fit_memory(device, front, by)
    return Kept(kept, (*dominated, *too_large, *without_room))


def require_room(device: Device, paths: Sequence[ServingPath]) -> None:
    """Refuse a limit of ``device`` that none of its ``paths`` fits; their profiles are not looked at.

    Raises:
        ValueError: says what the smallest needs.
    """
    limit, least = device.memory_bytes, min((needed_bytes(device, [path]) for path in paths), default=0)
    if limit is not None and least > limit:
        raise ValueError(
            f"device {device.name}: the smallest path needs {least:,} bytes, but memory allows {limit:,}. "
            "Give it more memory, fewer cores, a snapshot of lower precision or a smaller cache."
        )


def pareto_front(paths: Iterable[ServingPath], by: Quality) -> tuple[list[ServingPath], list[Dropped]]:
    """The paths that none dominates, the best first, and the others.

    A path dominates another if its quality is at least as good, it takes no more slots, and it is not slower
    at any batch size by more than the tolerance. Only paths measured at the same sizes are compared.
    """
    front: list[ServingPath] = []
    dominated: list[Dropped] = []
    # Only a path that stands before it here can dominate another, so the tolerance makes no circles; and
    # whatever a dropped path dominates, the kept path that dominates that one dominates too.
    for path in sorted(paths, key=lambda path: (-path.quality(by), path.threads, _total_ms(path))):
        better = next((other for other in front if _dominates(other, path)), None)
        if better is None:
            front.append(path)
        else:
            dominated.append(
                (path, f"{better.name} is as good, as fast at every size, and takes no more slots")
            )
    return front, dominated


def fit_memory(
    device: Device, paths: Sequence[ServingPath], by: Quality
) -> tuple[tuple[ServingPath, ...], tuple[Dropped, ...]]:
    """The paths that fit the device's memory, the best first, and the others.

    The cheapest path by slots and time a row is kept, for it carries the highest load; if it does not fit,
    the cheapest one that does. Then the others are added from the best quality down, each if it still fits.

    Raises:
        ValueError: none fits; says what the smallest needs.
    """
    ordered = sorted(paths, key=lambda path: (-path.quality(by), cost_a_row(path)))
    limit = device.memory_bytes
    if limit is None:
        return tuple(ordered), ()
    require_room(device, paths)
    alone = {path.name: needed_bytes(device, [path]) for path in paths}
    kept = [min((path for path in paths if alone[path.name] <= limit), key=cost_a_row)]
    dropped: list[Dropped] = []
    for path in ordered:
        if path in kept:
            continue
        needed = needed_bytes(device, [*kept, path])
        if needed <= limit:
            kept.append(path)
        else:
            more = needed - needed_bytes(device, kept)
            reason = f"no room: {more:,} bytes more make {needed:,} of the {limit:,} on {device.name}"
            dropped.append((path, reason))
    return tuple(path for path in ordered if path in kept), tuple(dropped)


def needed_bytes(device: Device, paths: Iterable[ServingPath]) -> int:
    """What ``paths`` occupy together on ``device``: in each of the ``slots // threads`` worker processes of a
    thread count, every snapshot once and every cache."""
    weights: dict[tuple[int, str], int] = {}
    caches = 0
    for path in paths:
        key = (path.threads, path.fingerprint)
        weights[key] = max(weights.get(key, 0), path.memory_bytes - path.cache_bytes)
        caches += path.cache_bytes * (device.slots // path.threads)
    return caches + sum(size * (device.slots // threads) for (threads, _), size in weights.items())


def cost_a_row(path: ServingPath) -> float:
    """Slot-milliseconds a row at the batch size of the largest throughput."""
    return 1e3 * path.threads / path.profile.rows_per_s


def _dominates(one: ServingPath, other: ServingPath) -> bool:
    return (
        one.threads <= other.threads
        and one.profile.rows == other.profile.rows
        and all(
            ours <= theirs * (1 + TOLERANCE)
            for ours, theirs in zip(one.profile.latency_ms, other.profile.latency_ms, strict=True)
        )
    )


def _total_ms(path: ServingPath) -> float:
    return sum(path.profile.latency_ms)
