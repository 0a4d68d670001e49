"""Low-precision snapshots of trained models: export, verify, load, monitor."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tightrec.snapshot.loader import Snapshot, load

__all__ = ["Snapshot", "load"]


def __getattr__(name: str) -> Any:
    """Import on first use: reading a manifest needs neither torch nor fbgemm."""
    if name in __all__:
        from tightrec.snapshot import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
