"""What the pages about runs share: templates, style, tables, and a file that appears whole or not at all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import BaseLoader, ChoiceLoader, Environment, PackageLoader, StrictUndefined

_HOME = "tightrec.trainer.report"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of texts."""

    title: str = ""
    """Stands above; empty: none."""

    headings: Sequence[str]
    """One a column."""

    rows: Sequence[Sequence[str]]
    """As many cells each as there are headings. The cells ``yes`` and ``no`` are coloured."""

    words: Sequence[int] = ()
    """Columns, counted from 0, of sentences that may wrap, at the left; the others hold figures."""

    note: str = ""
    """Stands below; empty: none."""


def rendered(template: str, values: Mapping[str, Any], package: str = _HOME) -> str:
    """Fill a template.

    Args:
        template: file name in ``package``; it can include ``style.html`` and import ``parts.html``.
        values: every name that the template reads.
        package: where the template is.
    """
    places: list[BaseLoader] = [PackageLoader(name, "") for name in dict.fromkeys((package, _HOME))]
    environment = Environment(
        loader=ChoiceLoader(places),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def write_page(path: Path, page: str) -> None:
    """Write ``page`` to ``path``, atomically: whatever interrupts it leaves what was there before."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
