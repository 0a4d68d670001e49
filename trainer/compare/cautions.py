"""What a comparison cannot be trusted in, in sentences that name the runs."""

from collections.abc import Callable, Hashable, Sequence

from tightrec.trainer.compare.groups import Group
from tightrec.trainer.compare.runs import Run, differing
from tightrec.trainer.report.figures import DASH

_SAME_TASK = ("data.", "model.")
_COMPARED = "model.representation."
"""Of a model, but what a comparison of representations is about; the page lists it."""
_MOST_TOLD = 3


def cautions(groups: Sequence[Group]) -> list[str]:
    """Sentences for the reader of the comparison, the weightiest first."""
    runs = [run for group in groups for run in group.runs]
    return [
        *_other_tasks(groups),
        *_without_scores(runs),
        *_seeds(groups),
        *_resumed(runs),
        *_where(runs),
    ]


def _other_tasks(groups: Sequence[Group]) -> list[str]:
    """Groups that were trained on other data, another model or other batches than the first."""
    base, *others = groups
    told = []
    for group in others:
        keys = [
            key
            for key in differing(base.settings, group.settings)
            if key == "ranks" or (key.startswith(_SAME_TASK) and not key.startswith(_COMPARED))
        ]
        parts = [f"{key} {_value(group, key)}, there {_value(base, key)}" for key in keys[:_MOST_TOLD]]
        if len(keys) > _MOST_TOLD:
            parts.append(f"and {len(keys) - _MOST_TOLD} more")
        if _rows(group.runs[0]) != _rows(base.runs[0]):
            parts.append("their data have different numbers of rows")
        if parts:
            told.append(
                f"{group.label} differs from {base.label} in data, model or ranks, so their scores do not "
                f"compare codecs: {'; '.join(parts)}."
            )
    return told


def _without_scores(runs: Sequence[Run]) -> list[str]:
    bare = [run for run in runs if run.score("test", "ne") is None]
    if not bare:
        return []
    return [f"Without test scores (train.test=false, or data without a test split): {_named(bare)}."]


def _seeds(groups: Sequence[Group]) -> list[str]:
    told = []
    base = {run.seed for run in groups[0].runs}
    for group in groups:
        seeds = [run.seed for run in group.runs]
        if len(set(seeds)) < len(seeds):
            told.append(
                f"{group.label} holds runs of the same seed ({_named(group.runs)}): their spread is not that "
                "of seeds, and no seeds are paired."
            )
        elif set(seeds) != base:
            told.append(
                f"{group.label} has run other seeds than {groups[0].label}: its difference is over the seeds "
                "that both have, or else of the means."
            )
    return told


def _resumed(runs: Sequence[Run]) -> list[str]:
    resumed = [run for run in runs if run.facts.get("earlier")]
    if not resumed:
        return []
    return [f"Resumed, so that speed and bytes are of the last part only: {_named(resumed)}."]


def _where(runs: Sequence[Run]) -> list[str]:
    """Differences of machine and versions, which speeds and last digits depend on."""
    checks: dict[str, Callable[[Run], Hashable]] = {
        "machines, so compare no speeds": _machine,
        "versions of libraries": lambda run: tuple(sorted((run.facts.get("versions") or {}).items())),
        "commits": lambda run: run.facts.get("git"),
    }
    told = []
    for what, of in checks.items():
        odd = [run for run in runs if of(run) != of(runs[0])]
        if odd:
            told.append(f"Made with other {what} than {runs[0].name}: {_named(odd)}.")
    return told


def _machine(run: Run) -> Hashable:
    host = run.facts.get("host") or {}
    return (*(host.get(name) for name in ("processor", "cores", "threads_per_rank")), run.facts.get("gpu"))


def _rows(run: Run) -> dict[str, int]:
    return dict(run.facts.get("rows") or {})


def _value(group: Group, key: str) -> str:
    return group.settings.get(key, DASH)


def _named(runs: Sequence[Run]) -> str:
    names, more = [run.name for run in runs], len(runs) - _MOST_TOLD
    return ", ".join(names[:_MOST_TOLD]) + (f" and {more} more" if more > 0 else "")
