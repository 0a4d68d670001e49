"""The settings of a dataclass as text, from its fields and the docstrings under them."""

import dataclasses
import textwrap
from pathlib import Path
from typing import get_args, get_type_hints

from tightrec.formats.settings import field_docstrings

WIDTH = 100


def describe(name: str, cls: type) -> str:
    """One paragraph for each field of the settings ``cls``, under the heading ``name``."""
    told = [f"{name}:"]
    hints, meanings = get_type_hints(cls), field_docstrings(cls)
    for field in dataclasses.fields(cls):
        default = "required" if field.default is dataclasses.MISSING else _word(field.default)
        kind = hints[field.name]
        choices = [str(value) for value in get_args(kind) if isinstance(value, str)]
        told.append(f"  {field.name}={'|'.join(choices) or _type_name(kind)}  ({default})")
        told += textwrap.wrap(meanings[field.name], WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(told)


def _type_name(kind: object) -> str:
    kinds = [each for each in get_args(kind) or (kind,) if each is not type(None)]
    return "|".join(
        "PATH" if each is Path else getattr(each, "__name__", str(each)).upper() for each in kinds
    )


def _word(default: object) -> str:
    return "none" if default in (None, "") else str(default)
