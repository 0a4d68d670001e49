"""What kind of model a snapshot holds, in a word or two."""

import re

from tightrec.snapshot.manifest import SnapshotManifest
from tightrec.snapshot.precision import LAYER_TYPES, TABLE_TYPES

_DHE_LAYER = re.compile(r"dhe\.(?P<feature>.+)\.\d+")

_ORDER = tuple(dict.fromkeys((*reversed(TABLE_TYPES), *reversed(LAYER_TYPES))))

_MOST_TYPES = 2


def representation_of(manifest: SnapshotManifest) -> str:
    """How the features are represented, in a word."""
    described = manifest.model.get("representation") or {}
    tables = {table.name.removeprefix("t_") for table in manifest.tables}
    hashed = hashed_features(manifest)
    kinds = {
        "hybrid" if name in tables and name in hashed else "dhe" if name in hashed else "table"
        for name in (feature.name for feature in manifest.sparse)
    }
    if described.get("kind") == "select" and not described.get("features"):
        return "select"
    return kinds.pop() if len(kinds) == 1 else "mixed"


def precision_of(manifest: SnapshotManifest) -> str:
    """The types of tables and layers, the smallest first."""
    plan = manifest.precision
    used = {*plan.tables.values(), *plan.layers.values()}
    kinds = [kind for kind in _ORDER if kind in used]
    return "+".join(kinds) if len(kinds) <= _MOST_TYPES else "mixed"


def hashed_features(manifest: SnapshotManifest) -> set[str]:
    """Names of the features with a deep hash embedding."""
    return {match["feature"] for name in manifest.layers if (match := _DHE_LAYER.fullmatch(name))}
