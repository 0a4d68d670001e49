"""What an exploration found, as lines of text of at most 110 columns."""

from collections.abc import Iterable, Sequence
from textwrap import shorten

from tightrec.serving.paths import PathSet, Quality, ServingPath

WIDTH = 110
MEAN_ROWS = 128
_NAME = 33


def table_lines(paths: PathSet, by: Quality) -> list[str]:
    """One line a path: those that are kept, device by device, then those that are not, with the reason."""
    sizes = _sizes(paths.paths[0])
    lines = [
        f"{'path':<{_NAME}} {'accuracy':>9} {'AUC':>8} {'NE':>8} {'MB':>8} "
        + " ".join(f"{f'{size}, ms':>9}" for size in sizes)
        + f" {'rows/s':>9}"
    ]
    for device in paths.devices:
        limit = "" if device.memory_bytes is None else f", memory {device.memory_bytes / 1e6:,.0f} MB"
        origin = "recorded on another machine" if device.recorded else "measured here"
        lines.append(f"{device.name}: {device.slots} slots{limit}, {origin}; kept, by {by}:")
        lines += [_line(path, sizes) for path in paths.paths if path.device == device.name]
    if paths.dropped:
        lines.append("not kept:")
    for path, why in paths.dropped:
        lines += [_line(path, sizes), f"    {shorten(why, WIDTH - 4)}"]
    changes = list(_cache_lines([*paths.paths, *(path for path, _ in paths.dropped)]))
    if changes:
        lines += [
            "caches: what each level answered of the ids that reached it, and the change against the same "
            "snapshot without:",
            *changes,
        ]
    return lines


def _sizes(path: ServingPath) -> list[int]:
    """The smallest and largest measured sizes, and the one nearest to the mean of a query."""
    rows = path.profile.rows
    return sorted({rows[0], min(rows, key=lambda size: abs(size - MEAN_ROWS)), rows[-1]})


def _line(path: ServingPath, sizes: Sequence[int]) -> str:
    times = (path.profile.expected_ms(size) for size in sizes)
    name = path.name if len(path.name) <= _NAME else path.name[: _NAME - 1] + "…"
    return (
        f"{name:<{_NAME}} {path.accuracy:>9.4%} {path.auc:>8.5f} {path.ne:>8.5f} "
        f"{path.memory_bytes / 1e6:>8.1f} "
        + " ".join(f"{time:>9.2f}" for time in times)
        + f" {path.profile.rows_per_s:>9,.0f}"
    )


def _cache_lines(paths: Iterable[ServingPath]) -> Iterable[str]:
    told = set()
    for path in paths:
        note = path.notes.get("cache")
        key = (path.fingerprint, path.device, path.cache)
        if not note or key in told:
            continue
        told.add(key)
        asked = ("of the ids", "of the rest")
        shares = zip(note["hits"].items(), asked, strict=False)
        hits = ", ".join(f"{level} {share:.1%} {of}" for (level, share), of in shares) or "nothing"
        change = note["change"]
        yield f"  {path.name}:"
        yield (
            f"    {hits}; accuracy {100 * change['accuracy']:+.3f} points, "
            f"AUC {change['auc']:+.5f}, NE {change['ne']:+.5f}"
        )
