"""A plan for people (under 100 columns) and for programs (JSON-able)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tightrec.sharding.plan import PlanRow

_WIDTH = 98


def plan_text(rows: Sequence[PlanRow], most: int = 40) -> str:
    """The plan as a table of at most 98 columns and ``most`` tables, largest traffic first, with totals.

    Columns: table, sharding type, ranks, rows x dim, memory, predicted bytes a step forward and back.
    """
    shown = sorted(rows, key=lambda r: (-(r.forward_bytes + r.backward_bytes), -r.memory_bytes, r.table))
    cells = [
        (
            r.table,
            r.type,
            _ranks(r.ranks),
            f"{r.rows:,} x {r.dim}",
            size(r.memory_bytes),
            size(r.forward_bytes),
            size(r.backward_bytes),
        )
        for r in shown[:most]
    ]
    total = (
        f"{len(rows)} tables",
        "",
        "",
        "",
        size(sum(r.memory_bytes for r in rows)),
        size(sum(r.forward_bytes for r in rows)),
        size(sum(r.backward_bytes for r in rows)),
    )
    head = ("table", "type", "ranks", "rows x dim", "memory", "fwd/step", "bwd/step")
    widths = [max(len(row[i]) for row in (head, total, *cells)) for i in range(len(head))]
    # Names are the only column without a natural limit.
    widths[0] -= max(0, sum(widths) + 2 * (len(widths) - 1) - _WIDTH)
    lines = [_line(head, widths), *(_line(row, widths) for row in cells)]
    if len(rows) > most:
        lines.append(f"... and {len(rows) - most} more, all of them in plan.json")
    return "\n".join([*lines, _line(total, widths)])


def plan_json(rows: Sequence[PlanRow]) -> list[dict[str, Any]]:
    """One mapping a table, with ``predicted_bytes_per_step`` beside its two directions."""
    return [
        dataclasses.asdict(r) | {"predicted_bytes_per_step": r.forward_bytes + r.backward_bytes} for r in rows
    ]


def size(count: float) -> str:
    """``count`` bytes in a short form: 512 B, 3.2 kB, 17.0 MB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _ranks(ranks: Sequence[int]) -> str:
    """``0-7`` for a run, ``0,2,5`` else, cut after a few."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    text = ",".join(map(str, ranks[:4]))
    return text + (",..." if len(ranks) > 4 else "")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    left, right = cells[:3], cells[3:]
    parts = [_cut(c, w).ljust(w) for c, w in zip(left, widths[:3], strict=True)]
    parts += [c.rjust(w) for c, w in zip(right, widths[3:], strict=True)]
    return "  ".join(parts).rstrip()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
