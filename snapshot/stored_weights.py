"""Whether the weights of a snapshot are as near to the checkpoint's as their types allow, row by row.

Every row that a snapshot stores is compared with the float32 row, and its error with that of the same row
packed anew. Replaying data cannot tell this: a damaged row that no held-out row looks up changes no score.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tightrec.snapshot.layers import StoredLayer, store_layer
from tightrec.snapshot.manifest import SnapshotManifest
from tightrec.snapshot.packed import pack, unpack
from tightrec.snapshot.parts import Layer
from tightrec.snapshot.store import read_table

_ROWS = 1 << 16
"""Rows of a table compared at once."""


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The worst row of a table, or the worst output of a layer."""

    row: int
    """Its number."""

    ratio: float
    """Its error divided by what its type needs: at most 1 as packing makes it. NaN: not finite."""

    rows: int
    """How many there are."""


def worst_rows(
    folder: Path, manifest: SnapshotManifest, whole_table: Callable[[str], Tensor]
) -> Iterator[tuple[str, Worst]]:
    """The worst row of each table, by name, reading one table after the other.

    Args:
        folder: the snapshot.
        whole_table: the checkpoint's float32 [R, D] by the table's name.

    Raises:
        ValueError: a table's file does not hold what the manifest says.
    """
    for table in manifest.tables:
        exact, stored = whole_table(table.name), read_table(folder, table)
        if exact.shape != (table.rows, table.dim):
            raise ValueError(
                f"table {table.name} has {table.rows:,} x {table.dim} values in {folder}, but "
                f"{exact.shape[0]:,} x {exact.shape[1]} in the checkpoint. Give the checkpoint that the "
                "snapshot was made from."
            )
        worst = Worst(row=0, ratio=0.0, rows=table.rows)
        for start in range(0, table.rows, _ROWS):
            rows = exact[start : start + _ROWS]
            fresh = pack(rows, table.kind, manifest.precision.row_search)
            found = _worst(
                rows,
                unpack(stored[start : start + _ROWS], table.kind, table.dim),
                unpack(fresh, table.kind, table.dim),
            )
            worst = _worse(worst, Worst(row=start + found.row, ratio=found.ratio, rows=table.rows))
        yield table.name, worst


def worst_outputs(stored: Mapping[str, StoredLayer], exact: Mapping[str, Layer]) -> dict[str, Worst]:
    """The worst output of each layer by name, its bias counted as one more weight."""
    return {name: _worst_output(layer, exact[name]) for name, layer in stored.items()}


def _worst_output(stored: StoredLayer, exact: Layer) -> Worst:
    fresh = store_layer(exact.weight, exact.bias, stored.kind, stored.activation)
    bias = exact.bias
    wanted = exact.weight if bias is None else torch.cat([exact.weight, bias[:, None]], 1)
    return _worst(wanted, _floats(stored), _floats(fresh))


def _floats(stored: StoredLayer) -> Tensor:
    """float32 [N, K], or [N, K + 1] with the bias: what the stored numbers stand for."""
    weight = stored.weight.float()
    if stored.scale is not None:
        weight = weight * stored.scale[:, None]
    return weight if stored.bias is None else torch.cat([weight, stored.bias.float()[:, None]], 1)


def _worst(exact: Tensor, stored: Tensor, fresh: Tensor) -> Worst:
    """The worst row of three matrices of one shape."""
    if not len(exact):
        return Worst(row=0, ratio=0.0, rows=0)
    error, needed = ((other.double() - exact.double()).square().mean(1).sqrt() for other in (stored, fresh))
    # A row of few distinct values may need no error at all; what others need does no harm there.
    allowed = torch.maximum(needed, needed.mean())
    ratio = torch.where(error == 0, error, error / allowed)
    # max() takes a NaN for the largest.
    value, row = ratio.max(0)
    return Worst(row=int(row), ratio=float(value), rows=len(exact))


def _worse(first: Worst, second: Worst) -> Worst:
    return second if not second.ratio <= first.ratio else first
