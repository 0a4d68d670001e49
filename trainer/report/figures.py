"""Figures as people read them; None and NaN are a dash."""

import math
from collections.abc import Iterable

from rich.filesize import decimal

DASH = "–"


def figure(value: float | None, digits: int = 4) -> str:
    """A score with ``digits`` decimals."""
    return DASH if value is None or math.isnan(value) else f"{value:.{digits}f}"


def mean(values: Iterable[float | None]) -> float:
    """Mean of the known values; NaN where there are none."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def count(value: float | None) -> str:
    """A whole number with thousands separated."""
    return DASH if value is None or math.isnan(value) else f"{value:,.0f}"


def size(value: float | None) -> str:
    """A number of bytes: 512 bytes, 3.2 kB, 17.0 MB (powers of 1000)."""
    return DASH if value is None or math.isnan(value) else decimal(round(value))


def times(value: float | None) -> str:
    """How many times less: 21.3x."""
    return DASH if value is None or math.isnan(value) else f"{value:.1f}x"


def duration(seconds: float) -> str:
    """12 s, 3:05 min or 2:03:05 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h"
