"""The settings of a dataclass as text, from its fields and the docstrings under them."""

import dataclasses
import textwrap
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from tightrec.formats.settings import field_docstrings

WIDTH = 100


def describe(name: str, cls: type) -> str:
    """One paragraph for each field of the settings ``cls``, under the heading ``name``."""
    told = [f"{name}:"]
    hints, meanings = get_type_hints(cls), field_docstrings(cls)
    for field in dataclasses.fields(cls):
        default = "required" if field.default is dataclasses.MISSING else _word(field.default)
        kind = hints[field.name]
        choices = [str(value) for value in _arguments(kind) if isinstance(value, str)]
        told.append(f"  {field.name}={'|'.join(choices) or _type_name(kind)}  ({default})")
        told += textwrap.wrap(meanings[field.name], WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(told)


def _arguments(kind: object) -> tuple[object, ...]:
    """The members of a union or of a literal; () of any other type."""
    return () if get_origin(kind) in (list, tuple) else get_args(kind)


def _type_name(kind: object) -> str:
    kinds = [each for each in _arguments(kind) or (kind,) if each is not type(None)]
    return "|".join(map(_plain_name, kinds))


def _plain_name(kind: object) -> str:
    if get_origin(kind) in (list, tuple):
        member = next(each for each in get_args(kind) if each is not Ellipsis)
        choices = "|".join(str(value) for value in _arguments(member) if isinstance(value, str))
        return f"[{choices or _type_name(member)},...]"
    return "PATH" if kind is Path else getattr(kind, "__name__", str(kind)).upper()


def _word(default: object) -> str:
    if isinstance(default, tuple):
        return f"[{','.join(map(str, default))}]"
    return "none" if default in (None, "") else str(default)
