"""What ``--help`` and ``--cfg`` print, read from the dataclasses and from ``conf/`` themselves."""

import dataclasses
import textwrap
from collections.abc import Iterator
from importlib import resources
from typing import Any, get_type_hints

from tightrec.formats.settings import field_docstrings
from tightrec.trainer.config import CONF_MODULE, JobConfig

_HEAD = """\
torchrun --standalone --nproc-per-node 2 -m tightrec.trainer [group=choice ...] [key=value ...]

  --cfg     print the composed configuration and exit
  --help    print this text and exit
"""


def text() -> str:
    """Usage, the groups with their choices, and every setting with type, default and meaning."""
    lines = [_HEAD, "Groups:"]
    for group, choices in groups().items():
        lines.append(f"  {group}={'|'.join(choices)}")
    lines.append("\nSettings (default):")
    for key, default, meaning in settings(JobConfig):
        lines.append(f"  {key} ({default})")
        lines += textwrap.wrap(meaning, 98, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def groups() -> dict[str, list[str]]:
    """The folders of ``conf/`` and the choices in each."""
    root = resources.files(CONF_MODULE)
    return {
        folder.name: sorted(
            file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")
        )
        for folder in sorted(root.iterdir(), key=lambda entry: entry.name)
        if folder.is_dir() and not folder.name.startswith("_")
    }


def settings(cls: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, docstring) of every field of ``cls``, nested dataclasses unfolded."""
    meanings = field_docstrings(cls)
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from settings(hints[field.name], key + ".")
        else:
            yield key, _default(field), meanings.get(field.name, "")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return "null" if field.default is None else str(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    return "required"
