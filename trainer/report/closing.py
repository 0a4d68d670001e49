"""The small table at the end of a run."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from tightrec.trainer.report.figures import count, figure, size, times


def final_table(run: Mapping[str, Any]) -> Table:
    """Scores by split against the best possible AUC where it is known, then speed and bytes a step.

    Args:
        run: the contents of ``run.json``.
    """
    best = run.get("bayes_auc") or {}
    headings = ["split", "rows", "AUC", *(["Bayes AUC"] if best else []), "NE", "log loss", "calibration"]
    scores_table = Table()
    for heading in headings:
        scores_table.add_column(heading, justify="left" if heading == "split" else "right", no_wrap=True)
    for split, scores in (run.get("scores") or {}).items():
        scores_table.add_row(
            split,
            count(scores.get("rows")),
            figure(scores.get("auc")),
            *([figure(best.get(split))] if best else []),
            *(figure(scores.get(name)) for name in ("ne", "log_loss")),
            figure(scores.get("calibration"), digits=3),
        )
    table = Table.grid()
    if scores_table.row_count:
        table.add_row(scores_table)
    for line in closing_lines(run):
        table.add_row(Text(line))
    return table


def closing_lines(run: Mapping[str, Any]) -> list[str]:
    """How the run ended, its speed and its bytes a step, in a sentence each."""
    reason = f" ({run['reason']})" if run.get("reason") else ""
    steps = f"{count(run.get('steps'))} steps, {count(run.get('rows_per_s'))} rows/s"
    lines = [f"{run.get('status', 'unknown')}{reason}: {steps}"]
    sent = run.get("bytes_per_step")
    if sent:
        amounts = (f"{name} {size(amount)}" for name, amount in sent.items())
        lines.append(f"sent a step, all ranks: {', '.join(amounts)}")
    compressed = run.get("compression")
    if compressed:
        ratios = (f"{direction} {times(total.get('ratio'))}" for direction, total in compressed.items())
        lines.append(f"fewer bytes than plain float32: {', '.join(ratios)}")
    return lines
