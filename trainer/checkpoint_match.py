"""Does a checkpoint fit a job? Shapes compared, and Adagrad's accumulators converted where sharding changed.

torch.distributed.checkpoint reshards a leaf whose global shape stays the same. The accumulated squared
gradients of Adagrad come in shapes that depend on the sharding type; for a table of R rows, D values each:

- row-wise, [R * C] with C column shards: column shard c has [c * R, (c + 1) * R);
- per value, [R, D]: ``momentum1`` of fused Adagrad, ``sum`` of a data-parallel table's dense Adagrad.

A row-wise accumulator sums a row's mean squared gradient over the columns of its shard. So merging column
shards (mean weighted by width) and going from values to rows (mean) are exact, up to rounding; splitting
hands the parent's mean to each part, which is what it would be if all columns had moved alike.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

Shapes = Mapping[str, tuple[int, ...] | None]
"""Global shape of each leaf by dotted name; None: not a tensor."""
Columns = list[tuple[int, int]]
"""[start, stop) of each column shard of a table, in order."""

_TABLE = re.compile(r"embedding_bags\.(?P<table>[^.]+)\.weight$")
_TABLE_STATE = re.compile(
    r"(?P<base>\w+\.state\.(?P<parameter>\S*embedding_bags\.(?P<table>[^.]+)\.weight)\.)(?P<key>\S+)$"
)
_TOLD = 8


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """An accumulator stored under another name, or in another shape, than the job needs."""

    source: str | None
    """Name in the checkpoint; None for a step counter, which becomes the checkpoint's step."""

    weight: str
    """Name of the table's weight, the same in both."""

    rows: int
    """Rows of the table."""

    columns: Columns
    """The column shards that the checkpoint was written with."""


def stored_shapes(metadata: Metadata) -> dict[str, tuple[int, ...] | None]:
    """Global shapes of everything in a checkpoint."""
    return {
        name: tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        for name, entry in metadata.state_dict_metadata.items()
    }


def plan_conversions(metadata: Metadata, wanted: Shapes) -> dict[str, Conversion]:
    """The leaves of ``wanted`` that must be converted, and can be."""
    stored = stored_shapes(metadata)
    differing = (name for name in wanted if name not in stored or stored[name] != wanted[name])
    planned = ((name, _conversion(name, metadata, stored, wanted)) for name in differing)
    return {name: conversion for name, conversion in planned if conversion}


def _conversion(name: str, metadata: Metadata, stored: Shapes, wanted: Shapes) -> Conversion | None:
    match = _TABLE_STATE.match(name)
    if match is None:
        return None
    base = match["base"]
    fused, dense, step = f"{base}{match['table']}.momentum1", f"{base}sum", f"{base}step"
    kept = {leaf for leaf in stored if leaf.startswith(base)}
    weight = _weight_of(match["parameter"], stored)
    if weight is None or stored[weight] != wanted.get(weight) or not kept <= {fused, dense, step}:
        return None
    rows = (stored[weight] or (0,))[0]
    entry = metadata.state_dict_metadata[weight]
    assert isinstance(entry, TensorStorageMetadata)
    columns = sorted({(c.offsets[1], c.offsets[1] + c.sizes[1]) for c in entry.chunks})
    source = fused if fused in stored else dense
    if source not in stored or name not in (fused, dense, step):
        return None
    if name == step:
        return Conversion(source=None, weight=weight, rows=rows, columns=columns)
    held, needed = stored[source] or (), wanted[name] or ()
    if len(held) == 1 and held[0] != rows * len(columns):
        return None
    # One fused optimizer in place of another is the user's change and not the sharding's.
    if name == source and not len(held) == len(needed) == 1:
        return None
    return Conversion(source=source, weight=weight, rows=rows, columns=columns)


def mismatches(stored: Shapes, wanted: Shapes, converted: Mapping[str, Conversion]) -> list[str]:
    """Sentences on what the checkpoint lacks, has too much, or has in another shape."""
    bases = tuple(m["base"] for m in map(_TABLE_STATE.match, converted) if m)
    names = sorted(
        {*stored, *wanted}, key=lambda name: (".state." in name, "embedding_bags." not in name, name)
    )
    told: dict[str, str] = {}
    for name in names:
        match = _TABLE_STATE.match(name)
        weight = match and _weight_of(match["parameter"], {**stored, **wanted})
        if name in converted or name.startswith(bases) or weight in told:
            continue
        held, needed = stored.get(name), wanted.get(name)
        if name not in stored:
            told[name] = f"{_what(name)} ({_by(needed)}) is not in the checkpoint"
        elif name not in wanted:
            told[name] = f"{_what(name)} ({_by(held)}) is in the checkpoint but not in this job"
        elif held != needed:
            told[name] = f"{_what(name)} is {_by(held)} in the checkpoint and {_by(needed)} in this job"
    sentences = list(told.values())
    more = len(sentences) - _TOLD
    return sentences if more <= 0 else [*sentences[:_TOLD], f"and {more} more"]


def convert(source: Tensor, target: Tensor | ShardedTensor, weight: object, conversion: Conversion) -> None:
    """Fill ``target``, in place, from the whole stored accumulator ``source`` ([R * C] or [R, D]).

    Args:
        target: this rank's accumulator, [R * C'] or [R, D] in all.
        weight: the job's leaf of the table itself, which tells the column shards C'.
    """
    if not isinstance(target, ShardedTensor):
        target.copy_(_values(source, conversion, 0, target.shape[0], 0, target.shape[1]))
        return
    columns = _columns(weight)
    for shard in target.local_shards():
        offsets, sizes = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        if len(sizes) == 2:
            values = _values(source, conversion, offsets[0], sizes[0], offsets[1], sizes[1])
        else:
            block, first_row = divmod(offsets[0], conversion.rows)
            values = _row_means(source, conversion, first_row, sizes[0], *columns[block])
        shard.tensor.copy_(values)


def _values(source: Tensor, conversion: Conversion, row: int, rows: int, column: int, width: int) -> Tensor:
    if source.dim() == 2:
        return source[row : row + rows, column : column + width]
    blocks = source.view(-1, conversion.rows)[:, row : row + rows]
    wide = torch.cat(
        [blocks[i, :, None].expand(-1, stop - start) for i, (start, stop) in enumerate(conversion.columns)], 1
    )
    return wide[:, column : column + width]


def _row_means(source: Tensor, conversion: Conversion, row: int, rows: int, start: int, stop: int) -> Tensor:
    if source.dim() == 2:
        return source[row : row + rows, start:stop].mean(1)
    blocks = source.view(-1, conversion.rows)[:, row : row + rows]
    overlaps = [max(0, min(stop, b) - max(start, a)) for a, b in conversion.columns]
    return torch.tensor(overlaps, dtype=source.dtype) / (stop - start) @ blocks


def _columns(weight: object) -> Columns:
    assert isinstance(weight, ShardedTensor)
    shards = weight.metadata().shards_metadata
    return sorted({(s.shard_offsets[1], s.shard_offsets[1] + s.shard_sizes[1]) for s in shards})


def _weight_of(parameter: str, names: Shapes) -> str | None:
    return next((n for n in names if n.endswith(f".{parameter}") and ".state." not in n), None)


def _what(name: str) -> str:
    state = _TABLE_STATE.match(name)
    if state:
        key = state["key"].removeprefix(f"{state['table']}.")
        return f"optimizer state {key!r} of table {state['table']!r}"
    table = _TABLE.search(name)
    return f"table {table['table']!r}" if table else f"{name!r}"


def _by(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "not a tensor"
    return " x ".join(str(size) for size in shape) if shape else "one number"
