"""Error bounds as callers give them: per table, absolute or relative to each block.

Relative bounds are resolved where the values are, in the same call, and written to the frame as the absolute
float32 that was used (docs/FORMAT.md, section 5).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from tightrec.kernels.format import MAX_BOUND, MIN_BOUND, BoundKind

Kind = Literal["absolute", "range", "rms"]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The largest absolute error of any value of a table."""

    value: float
    """The error itself, in the values' unit, or a share of the block's range or root mean square."""
    of: Kind = "absolute"
    """``absolute``; or relative to the ``range`` (max - min) or ``rms`` of the block's finite values."""


BoundLike = Bound | float
"""A float is an absolute bound."""


@dataclass(frozen=True, eq=False)
class Bounds:
    """One checked bound for each table; made once, used in many calls.

    Args:
        bounds: [T] one for each table.
        tables: their names, for messages.

    Raises:
        ValueError: a bound is zero, negative, NaN, infinite, subnormal or above 2^125; the table is named.
    """

    bounds: tuple[Bound, ...]
    tables: tuple[str, ...]
    _on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if len(self.bounds) != len(self.tables):
            raise ValueError(f"{len(self.bounds)} bounds for {len(self.tables)} tables; give one for each")
        for table, bound in zip(self.tables, self.bounds, strict=True):
            _check(table, bound)

    @classmethod
    def of(
        cls, bounds: "BoundLike | Sequence[BoundLike] | Mapping[str, BoundLike]", tables: Sequence[str]
    ) -> "Bounds":
        """Bounds from one for all tables, one for each in order, or one for each by name."""
        if isinstance(bounds, Mapping):
            unknown = sorted(set(bounds) - set(tables))
            missing = sorted(set(tables) - set(bounds))
            if unknown or missing:
                raise ValueError(
                    f"bounds by name must name every table once: unknown {unknown}, missing {missing}"
                )
            bounds = [bounds[table] for table in tables]
        elif isinstance(bounds, Bound | Real):
            bounds = [bounds] * len(tables)
        elif isinstance(bounds, str) or not isinstance(bounds, Sequence):
            raise ValueError(f"bounds are a number, a Bound, or one of them for each table, not {bounds!r}")
        return cls(tuple(b if isinstance(b, Bound) else Bound(value=float(b)) for b in bounds), tuple(tables))

    @property
    def relative(self) -> bool:
        """Whether some bound depends on its block's values."""
        return any(bound.of != "absolute" for bound in self.bounds)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(bound float32 [T], kind uint8 [T]) on a device; copied there once."""
        if device not in self._on_device:
            values = torch.tensor([bound.value for bound in self.bounds], dtype=torch.float32)
            kinds = [BoundKind[bound.of.upper()] for bound in self.bounds]
            self._on_device[device] = (values.to(device), torch.tensor(kinds, dtype=torch.uint8).to(device))
        return self._on_device[device]


def _check(table: str, bound: Bound) -> None:
    if bound.of not in ("absolute", "range", "rms"):
        raise ValueError(
            f"table {table!r}: a bound is absolute, or relative to range or rms, not {bound.of!r}"
        )
    value = bound.value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"table {table!r}: the error bound is {value!r}; give a number")
    # The float32 that the frame will hold decides: 1e-38 is a positive double and a subnormal float.
    single = float(torch.tensor(value, dtype=torch.float32)) if math.isfinite(value) else value
    if not MIN_BOUND <= single <= MAX_BOUND:
        raise ValueError(
            f"table {table!r}: the error bound is {value!r}; it must be a normal float32 from 2^-126 to "
            f"2^125 (about 1.2e-38 to 4.3e37). Ask for mode raw where a table must be lossless"
        )
