"""Follows the links of snapshots: new ones are loaded beside those in service, then take over at once."""

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

from tightrec.serving.paths import PathSet
from tightrec.serving.server.app import Service
from tightrec.serving.workers.pool import WorkerPool
from tightrec.snapshot.manifest import MANIFEST, Feature, read_manifest

Identity = tuple[str, int, int]
"""Of a snapshot: its folder, its manifest's inode and time of change."""

Features = tuple[tuple[str, ...], tuple[Feature, ...]]
"""Dense columns and sparse features."""


def identities(paths: PathSet) -> dict[str, Identity] | None:
    """Which snapshot each path has now; None: one of them is being replaced."""
    found = {}
    for path in paths.paths:
        try:
            folder = Path(path.snapshot).resolve(strict=True)
            manifest = (folder / MANIFEST).stat()
        except OSError:
            return None
        found[path.name] = (str(folder), manifest.st_ino, manifest.st_mtime_ns)
    return found


def settled(paths: PathSet) -> PathSet:
    """The same paths with folders in place of links, which may move on while workers load."""
    return dataclasses.replace(
        paths,
        paths=tuple(
            dataclasses.replace(path, snapshot=str(Path(path.snapshot).resolve())) for path in paths.paths
        ),
    )


def features_of(paths: PathSet) -> Features:
    """What all snapshots take.

    Raises:
        ValueError: a snapshot is damaged or absent, or two of them take different features.
    """
    found: Features | None = None
    for folder in dict.fromkeys(path.snapshot for path in paths.paths):
        manifest = read_manifest(Path(folder).resolve())
        own = manifest.dense, manifest.sparse
        if found is not None and own != found:
            raise ValueError(
                f"{folder} takes other features than {paths.paths[0].snapshot}: paths of one model must take "
                "the same ones."
            )
        found = own
    assert found is not None
    return found


class Follower:
    """Puts new snapshots in service.

    Args:
        paths: with links.
        identities: of what is in service.
        features: that requests have.
        service: to be changed.
        new_pool: makes a pool that loads in the background.
        every_s: how often links are looked at.
        say: prints a line.
    """

    def __init__(
        self,
        paths: PathSet,
        identities: dict[str, Identity] | None,
        features: Features,
        service: Service,
        new_pool: Callable[[], WorkerPool],
        every_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._paths, self._serving, self._features = paths, identities, features
        self._service, self._new_pool = service, new_pool
        self._every_s, self._say = every_s, say
        self._refused: dict[str, Identity] | None = None

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            seen = await asyncio.to_thread(identities, self._paths)
            if seen is not None and seen not in (self._serving, self._refused):
                await self._replace(seen)

    async def _replace(self, seen: dict[str, Identity]) -> None:
        service = self._service
        pool = self._new_pool()
        try:
            paths = settled(self._paths)
            if await asyncio.to_thread(features_of, paths) != self._features:
                raise ValueError("it takes other features than the one in service; start the server anew.")
            await pool.start(paths)
        except (ValueError, OSError) as error:
            self._refused = seen
            service.metrics.refused_swaps.inc()
            service.swap_note = f"a new snapshot was refused: {error}"
            self._say(service.swap_note)
            return
        self._serving, self._refused = seen, None
        before = service.dispatcher.swap(pool)
        service.restarts_before += before.pool.restarts
        service.protocol.version = service.dispatcher.current.version
        service.swap_note = None
        service.metrics.swaps.inc()
        self._say(f"a new snapshot is in service: version {service.protocol.version}")
        try:
            await before.idle()
        finally:
            await before.pool.close()
