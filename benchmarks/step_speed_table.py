"""What benchmarks/step_speed.py prints of one rate: a line a variant, and the goals."""

from typing import Any

FIXED = ("fp16", "int8", "fp8", "mx4")
GOAL, AUTO_GOAL, DEDUP_GOAL = 2.3, 1 / 1.03, 1 / 1.05


def table(word: str, rate: str, rows: list[dict[str, Any]]) -> str:
    """A table of the variants measured, or refused, at ``rate``, given as ``word``; with the goals met."""
    lines = [
        f"\nrate {rate}" + (f" ({word})" if word != rate else ""),
        f"{'variant':<9}{'step ms':>9}{'speed-up (min - max)':>24}{'forward MB':>12}{'backward MB':>13}"
        f"{'exchange':>10}{'loss':>8}",
    ]
    for row in rows:
        if "refused" in row:
            lines.append(f"{row['variant']:<9} refused: {row['refused']}")
            continue
        spread = f"{row['speedup']:.3f} ({row['speedup_min']:.3f} - {row['speedup_max']:.3f})"
        sent = row["sent_bytes"]
        lines.append(
            f"{row['variant']:<9}{row['step_ms']:>9.1f}{spread:>24}{sent['forward'] / 1e6:>12.3f}"
            f"{sent['backward'] / 1e6:>13.3f}{percent(row['exchange_share']):>10}{row['loss']:>8.4f}"
        )
    return "\n".join([*lines, *_goals(word, {r["variant"]: r["speedup"] for r in rows if "speedup" in r})])


def _goals(word: str, speedups: dict[str, float]) -> list[str]:
    """Sentences about the goals that the variants of one rate bear on."""
    lossy, fixed = speedups.get("lossy"), [speedups[name] for name in FIXED if name in speedups]
    lines = []
    if word == "share" and lossy:
        lines.append(f"goal: lossy at least {GOAL}x over plain: {_met(lossy >= GOAL)} ({lossy:.2f}x)")
    if word.startswith("share") and lossy and fixed:
        lines.append(f"goal: lossy ahead of every fixed codec: {_met(lossy > max(fixed))}")
    for name, goal, sentence in (
        ("auto", AUTO_GOAL, "auto within 3 % of plain"),
        ("dedup", DEDUP_GOAL, "deduplication alone at most 5 % slower than plain"),
    ):
        if word == "none" and name in speedups:
            lines.append(f"goal: {sentence}: {_met(speedups[name] >= goal)} ({speedups[name]:.3f}x)")
    return lines


def _met(met: bool) -> str:
    return "met" if met else "missed"


def percent(value: float) -> str:
    """A share in words."""
    return f"{100 * value:.1f} %"
