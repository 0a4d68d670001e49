"""Follows the links of snapshots: new ones are loaded beside those in service, then take over at once."""

import asyncio
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from tightrec.serving.paths import PathSet
from tightrec.serving.server.app import Service
from tightrec.serving.snapshot_words import precision_of, representation_of
from tightrec.serving.workers.pool import WorkerPool
from tightrec.serving.workers.worker import WorkerNotStarted
from tightrec.snapshot.manifest import MANIFEST, Feature, read_manifest

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 300.0
"""Between attempts to load a snapshot that is not to blame itself: doubled from the first to the longest."""

MOST_ABSENT = 3
"""Looks in a row that find a snapshot missing, until that is said: one may be just being replaced."""

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
        self._failed: dict[str, Identity] | None = None
        self._pause_s, self._again = FIRST_PAUSE_S, math.inf
        self._absent = 0

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self._look()
            except Exception as error:  # whatever it is: later snapshots must not be missed
                self._note("snapshots could not be followed", error)

    async def _look(self) -> None:
        seen = await asyncio.to_thread(identities, self._paths)
        if seen is None:
            self._absent += 1
            if self._absent == MOST_ABSENT:
                gone = [path.snapshot for path in self._paths.paths if not _is_there(path.snapshot)]
                named = ", ".join(dict.fromkeys(gone)) or "a snapshot"
                self._note(
                    "what was loaded goes on", ValueError(f"{named} is not there, or its link leads nowhere.")
                )
            return
        self._absent = 0
        if seen == self._serving:
            self._service.swap_note = None
            return
        if seen != self._failed:
            self._failed, self._pause_s, self._again = None, FIRST_PAUSE_S, -math.inf
        if time.monotonic() >= self._again:
            await self._replace(seen)

    def _compare(self, name: str, folder: str) -> None:
        """Say if the path ``name`` has become another kind of model than the one that was measured."""
        path = self._paths.path(name)
        try:
            manifest = read_manifest(Path(folder))
        except ValueError:
            return
        found = (representation_of(manifest), precision_of(manifest))
        if found != (path.representation, path.precision):
            self._say(
                f"path {name} was measured as {path.representation} {path.precision} and is {found[0]} "
                f"{found[1]} now: its latencies and accuracy are of another model. Explore again."
            )

    def _note(self, what: str, error: Exception) -> None:
        """Say what stands on the page from now on, once."""
        expected = isinstance(error, ValueError | OSError)
        text = f"{what}: {error if expected else repr(error)}"
        if self._service.swap_note != text:
            self._service.swap_note = text
            self._say(text)
            if not expected:
                logger.error("follower", exc_info=error)

    async def _replace(self, seen: dict[str, Identity]) -> None:
        service = self._service
        pool = self._new_pool()
        try:
            paths = settled(self._paths)
            if await asyncio.to_thread(features_of, paths) != self._features:
                raise ValueError("it takes other features than the one in service; start the server anew.")
            await pool.start(paths)
        except Exception as error:
            self._failed = seen
            if _lasting(error):
                self._again = math.inf
                service.metrics.refused_swaps.inc()
                self._note("a new snapshot was refused", error)
            else:
                self._again = time.monotonic() + self._pause_s
                told = f"a new snapshot could not be loaded, the next attempt is in {self._pause_s:g} s"
                self._note(told, error)
                self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            return
        changed = [name for name in seen if self._serving is None or seen[name] != self._serving.get(name)]
        self._serving, self._failed = seen, None
        before = service.dispatcher.swap(pool)
        service.restarts_before += before.pool.restarts
        service.protocol.version = service.dispatcher.current.version
        service.swap_note = None
        service.metrics.swaps.inc()
        folders = ", ".join(dict.fromkeys(seen[name][0] for name in changed))
        self._say(f"a new snapshot is in service: version {service.protocol.version}, {folders}")
        for name in changed:
            await asyncio.to_thread(self._compare, name, seen[name][0])
        try:
            await before.idle()
        finally:
            await before.pool.close()


def _is_there(snapshot: str) -> bool:
    return (Path(snapshot) / MANIFEST).is_file()


def _lasting(error: Exception) -> bool:
    """Whether a snapshot is to blame, so that another attempt would fail too."""
    return error.lasting if isinstance(error, WorkerNotStarted) else isinstance(error, ValueError)
