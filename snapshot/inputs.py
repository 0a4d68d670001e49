"""Checks what ``predict`` is given and brings it into the form that the model takes.

Legend: B rows, Dn dense columns, F sparse features.

The ids of a feature are one of

- [B] integers: one id a row;
- [B, H] integers: H ids a row;
- a pair (values [N] integers, offsets [B + 1]): row b owns values[offsets[b]:offsets[b + 1]];
- a list of B lists of integers.

Arrays may be numpy's or torch's; lists of numbers are read as numpy arrays. Where every feature is an int64
vector, checks and conversion are a few calls for all features together; the reason of a refusal is looked
for afterwards, feature by feature.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tightrec.snapshot.manifest import Feature

Ids = NDArray[np.int64]
_MAPPED = (
    "map unknown ids to known ones before, or ask for out_of_range=overflow where the snapshot is loaded or "
    "served"
)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What :class:`tightrec.snapshot.model.Scorer` takes."""

    dense: Tensor
    """float32 [B, Dn]."""

    ids: Tensor
    """int64 [sum of bag sizes], feature after feature; an id out of range has become the overflow row."""

    offsets: Tensor
    """int64 [F * B + 1]; bag f * B + b is feature f of row b."""

    of_torch: bool
    """Whether any of the input was a tensor, so that a tensor is given back."""

    def __len__(self) -> int:
        return len(self.dense)


class Inputs:
    """Checks and converts the inputs of one model; holds no state, so threads may share it.

    Args:
        dense: names of the dense columns, in order.
        sparse: the sparse features, in order.
        out_of_range: what becomes of an id outside [0, cardinality): ``refuse`` raises, ``overflow`` makes it
            the table's overflow row, whose vector is zero.
        device: where the tensors are made.
    """

    def __init__(
        self,
        dense: Sequence[str],
        sparse: Sequence[Feature],
        out_of_range: Literal["refuse", "overflow"],
        device: torch.device,
    ) -> None:
        if out_of_range not in ("refuse", "overflow"):
            raise ValueError(f"out_of_range={out_of_range!r} is not known. Give 'refuse' or 'overflow'.")
        self._dense = tuple(dense)
        self._names = tuple(feature.name for feature in sparse)
        self._overflow = out_of_range == "overflow"
        self._device = device
        # [F, 1]; compared as unsigned, so that one comparison finds negative ids too.
        self._cardinality = np.array([[feature.cardinality] for feature in sparse], np.int64)
        self._limit = self._cardinality.view(np.uint64)

    def convert(self, dense: Any, sparse: Any) -> Batch:
        """Check ``dense`` [B, Dn] (None where the model has no dense columns) and ``sparse``, a mapping from
        every feature's name to its ids.

        Raises:
            ValueError: names the feature or dense column, and the row where one is to blame.
        """
        single = self._stacked(sparse)
        if single is None:
            ids, offsets, rows, of_torch = self._bags(sparse)
        else:
            stacked, of_torch = single
            rows = stacked.shape[1]
            self._hold_in_range(stacked, self._limit, self._cardinality)
            ids = torch.from_numpy(stacked.reshape(-1))
            offsets = torch.arange(ids.numel() + 1)
        values = self._dense_values(dense, rows)
        return Batch(
            dense=values.to(self._device),
            ids=ids.to(self._device),
            offsets=offsets.to(self._device),
            of_torch=of_torch or isinstance(dense, Tensor),
        )

    def _stacked(self, sparse: Any) -> tuple[Ids, bool] | None:
        """All ids as one new array [F, B] where each feature is an int64 vector [B]; None: look closer."""
        try:
            columns = [sparse[name] for name in self._names]
        except (KeyError, TypeError, IndexError):
            return None
        if len(sparse) != len(columns):
            return None
        kinds = set(map(type, columns))
        if kinds == {np.ndarray}:
            rows = columns[0].shape
            if len(rows) != 1 or any(c.dtype != np.int64 or c.shape != rows for c in columns):
                return None
            return np.concatenate(columns).reshape(len(columns), -1), False
        if kinds == {Tensor} and all(column.dtype == torch.int64 for column in columns):
            try:
                stacked = torch.stack(columns)
            except RuntimeError:  # several shapes or devices
                return None
            # A GPU's ids are checked here: the host waits for them once, not once a feature.
            return (stacked.cpu().numpy(), True) if stacked.ndim == 2 else None
        return None

    def _hold_in_range(self, ids: Ids, limit: NDArray[np.uint64], cardinality: Ids) -> None:
        """Refuse ids [F, B] out of range, or make them the overflow row, in place."""
        outside = ids.view(np.uint64) >= limit
        if not outside.any():
            return
        if self._overflow:
            np.copyto(ids, cardinality, where=outside)
            return
        feature, row = (int(place) for place in np.argwhere(outside)[0])
        self._refuse_id(feature, row, int(ids[feature, row]))

    def _refuse_id(self, feature: int, row: int, value: int) -> None:
        raise ValueError(
            f"feature {self._names[feature]!r}: row {row} has id {value}, but ids lie between 0 and "
            f"{int(self._cardinality[feature, 0]) - 1}: {_MAPPED}."
        )

    def _bags(self, sparse: Any) -> tuple[Tensor, Tensor, int, bool]:
        """Ids, offsets, B and whether there was a tensor, for any mixture of forms."""
        if not isinstance(sparse, Mapping):
            raise ValueError(f"sparse must map the names of features to ids, not be {_kind(sparse)}.")
        missing = [name for name in self._names if name not in sparse]
        unknown = [str(name) for name in sparse if name not in self._names]
        if missing or unknown:
            parts = [
                f"{what}: {', '.join(names)}"
                for what, names in (("missing", missing), ("unknown", unknown))
                if names
            ]
            raise ValueError(
                f"sparse must hold the model's features and no others ({'; '.join(parts)}). "
                f"The model has {', '.join(self._names)}."
            )
        values: list[Ids] = []
        sizes: list[Ids] = []
        of_torch = False
        for name in self._names:
            try:
                found, counts, tensor = _read_bags(sparse[name])
            except ValueError as error:
                raise ValueError(f"feature {name!r}: {error}") from None
            if sizes and len(counts) != len(sizes[0]):
                raise ValueError(
                    f"feature {name!r} has {len(counts)} rows where {self._names[0]!r} has {len(sizes[0])}: "
                    "all features and the dense columns must be of the same rows."
                )
            values.append(found)
            sizes.append(counts)
            of_torch = of_torch or tensor
        rows = len(sizes[0])
        offsets = np.zeros(len(sizes) * rows + 1, np.int64)
        np.cumsum(np.concatenate(sizes), out=offsets[1:])
        ids = np.concatenate(values)
        cardinality = np.repeat(self._cardinality[:, 0], np.diff(offsets[::rows]) if rows else 0)
        outside = ids.view(np.uint64) >= cardinality.view(np.uint64)
        if outside.any():
            if not self._overflow:
                place = int(outside.argmax())
                bag = int(np.searchsorted(offsets, place, side="right")) - 1
                self._refuse_id(bag // rows, bag % rows, int(ids[place]))
            ids = np.where(outside, cardinality, ids)
        return torch.from_numpy(ids), torch.from_numpy(offsets), rows, of_torch

    def _dense_values(self, dense: Any, rows: int) -> Tensor:
        """float32 [rows, Dn] on the host, or where ``dense`` is, all finite."""
        columns = len(self._dense)
        if dense is None:
            if columns:
                raise ValueError(f"dense is missing: the model has the columns {', '.join(self._dense)}.")
            return torch.empty(rows, 0)
        if isinstance(dense, Tensor):
            if dense.is_complex() or dense.dtype == torch.bool:
                raise ValueError("dense must be a rectangular array of real numbers.")
            found = dense.detach().to(torch.float32, copy=True)
            finite = (
                _all_finite(found.numpy()) if found.device.type == "cpu" else bool(found.isfinite().all())
            )
        else:
            array = _floats(dense)
            finite, found = _all_finite(array), torch.from_numpy(array)
        if found.shape != (rows, columns):
            raise ValueError(
                f"dense has shape {list(found.shape)} where {[rows, columns]} is due: {rows} rows as in "
                f"{self._names[0]!r}, {columns} columns."
            )
        if not finite:
            row, column = (int(place) for place in torch.argwhere(~found.isfinite())[0])
            raise ValueError(
                f"dense column {self._dense[column]!r}: row {row} is {float(found[row, column])} in float32, "
                "which no score can be made of. Fill it as the training data was filled."
            )
        return found


def _floats(dense: Any) -> NDArray[np.float32]:
    """A new contiguous float32 array; the caller may go on writing to its own while a device still reads."""
    try:
        given = np.asarray(dense)
    except (TypeError, ValueError):
        given = np.asarray(None)
    if given.dtype.kind not in "fiu":
        raise ValueError("dense must be a rectangular array of real numbers.")
    if given.dtype == np.float32:
        return given.copy(order="C")
    with np.errstate(over="ignore"):  # what becomes infinite is refused by name
        return given.astype(np.float32, order="C")


def _all_finite(values: NDArray[np.float32]) -> bool:
    return bool(np.isfinite(values).all())


def _read_bags(given: Any) -> tuple[Ids, Ids, bool]:
    """Ids [N] and bag sizes [B] of one feature, and whether it was given as a tensor."""
    if isinstance(given, tuple):
        if len(given) != 2:
            raise ValueError(f"a tuple must be (values, offsets), this one has {len(given)} parts.")
        values, of_torch = _integers(given[0], "values")
        offsets, also = _integers(given[1], "offsets")
        return values, _sizes(values, offsets), of_torch or also
    if isinstance(given, list) and any(_is_list(row) for row in given):
        return *_lists(given), any(isinstance(row, Tensor) for row in given)
    ids, of_torch = _integers(given, "ids", dims=(1, 2))
    sizes = np.full(len(ids), ids.shape[1] if ids.ndim == 2 else 1)
    return ids.reshape(-1), sizes, of_torch


def _sizes(values: Ids, offsets: Ids) -> Ids:
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(values):
        raise ValueError(
            f"offsets must begin with 0 and end with the number of values, {len(values)}: one more than rows."
        )
    sizes = np.diff(offsets)
    if (sizes < 0).any():
        raise ValueError(f"offsets fall at row {int((sizes < 0).argmax())}: they must never do.")
    return sizes


def _lists(rows: list[Any]) -> tuple[Ids, Ids]:
    for place, row in enumerate(rows):
        if not _is_list(row):
            raise ValueError(f"row {place} is {_kind(row)} where other rows are lists of ids.")
    sizes = np.array([len(row) for row in rows], np.int64)
    flat = list(itertools.chain.from_iterable(rows))
    try:
        return _integers(flat, "ids")[0], sizes
    except ValueError:
        for place, row in enumerate(rows):
            try:
                _integers(list(row), "ids")
            except ValueError as error:
                raise ValueError(f"row {place}: {error}") from None
        raise


def _is_list(row: Any) -> bool:
    return isinstance(row, list | tuple) or (isinstance(row, np.ndarray | Tensor) and row.ndim == 1)


def _integers(given: Any, what: str, dims: tuple[int, ...] = (1,)) -> tuple[Ids, bool]:
    """``given`` as a contiguous int64 array, and whether it was a tensor."""
    of_torch = isinstance(given, Tensor)
    try:
        array = given.detach().cpu().numpy() if of_torch else np.asarray(given)
    except (TypeError, ValueError):
        raise ValueError(f"{what} must be an array of integers.") from None
    if array.size == 0 and not isinstance(given, np.ndarray | Tensor):
        array = array.astype(np.int64)  # an empty list has no type of its own
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} must be integers, not {array.dtype}.")
    if array.ndim not in dims:
        raise ValueError(f"{what} must have {' or '.join(map(str, dims))} dimensions, not {array.ndim}.")
    if array.dtype == np.uint64:
        # An id past int64 is out of every table's range: the largest int64 is as well.
        array = np.minimum(array, np.uint64(np.iinfo(np.int64).max))
    return np.ascontiguousarray(array, np.int64), of_torch


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
