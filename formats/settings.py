"""Plain mappings into the frozen dataclasses that configure each layer.

Every layer declares a frozen, keyword-only dataclass. Whatever reads user input (Hydra in
``trainer/config.py``, ``key=value`` words in the small command lines) turns it into nested plain
mappings and calls :func:`from_mapping`, so that a misspelt key or a wrong type is told the same way
everywhere: what, where, and what was probably meant.
"""

import ast
import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the dataclass ``cls`` from nested plain ``values``; ``where`` names the input in errors.

    Types are checked and converted by pydantic (``"3"`` becomes 3 for an ``int`` field).

    Raises:
        ValueError: an unknown key (with the nearest known one), a missing key, a wrong type, or
            whatever the dataclass's own ``__post_init__`` refuses.
    """
    # Here, so that what only reads a schema or a manifest does not need pydantic.
    from pydantic import TypeAdapter, ValidationError

    _refuse_unknown_keys(cls, values, where)
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        lines = [_sentence(detail, where) for detail in error.errors(include_url=False)]
        raise ValueError("\n".join(lines)) from None


def from_words(cls: type[T], words: Iterable[str], where: str) -> T:
    """Build the dataclass ``cls`` from command-line words of the form ``key=value`` (dots nest).

    A field that is a list or tuple takes ``key=[a,b]``, ``key=[]`` or one value without brackets; nothing
    is quoted, spaces around a value do not count, and commas inside brackets or parentheses do not part.

    Raises:
        ValueError: a word without ``=``, a key given twice, a list without its end, or anything
            :func:`from_mapping` refuses.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ValueError(
                f"{where}: {word!r} is not of the form key=value. Keys: {', '.join(keys_of(cls))}."
            )
        *parents, leaf = key.split(".")
        level = values
        for parent in parents:
            level = level.setdefault(parent, {})
            if not isinstance(level, dict):
                raise ValueError(f"{where}: {key} goes below {parent}, which was given a plain value.")
        if leaf in level:
            raise ValueError(f"{where}: {key} is given twice. Give it once.")
        level[leaf] = None if value in ("null", "None") else _listed(cls, key, value, where)
    return from_mapping(cls, values, where)


def _listed(cls: type, key: str, value: str, where: str) -> str | list[str]:
    """``value`` as a list where the field ``key`` of ``cls`` is one."""
    kind: Any = cls
    for name in key.split("."):
        nested = next((t for t in _members(kind) if dataclasses.is_dataclass(t)), None)
        kind = get_type_hints(nested).get(name) if nested is not None else None
    members = _members(kind)
    if not any((get_origin(member) or member) in (list, tuple) for member in members):
        return value
    if value.startswith("["):
        parts = _parts(value[1:-1]) if value.endswith("]") and len(value) > 1 else None
        if parts is None:
            raise ValueError(
                f"{where}: {key}={value} is not a list. Write {key}=[A,B] without spaces, or put the whole "
                "word in quotes; every bracket is closed, and nothing is empty."
            )
        return parts
    plain = [m for m in members if m is not type(None) and (get_origin(m) or m) not in (list, tuple)]
    return value if plain else [value]


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or ``kind`` alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _parts(text: str) -> list[str] | None:
    """What stands between the commas outside of brackets; None: the brackets do not match."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in "])")
        if depth < 0:
            return None
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    parts = [part.strip() for part in parts]
    if parts == [""]:
        return []
    return parts if all(parts) and not depth else None


def keys_of(cls: type) -> list[str]:
    """Names of the fields of the dataclass ``cls``, in order of declaration."""
    return [field.name for field in dataclasses.fields(cls)]


def field_docstrings(cls: type) -> dict[str, str]:
    """The string literal under each annotated field of ``cls`` and the dataclasses it derives from."""
    found: dict[str, str] = {}
    for part in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        assert isinstance(definition, ast.ClassDef)
        for field, after in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                assert isinstance(field.target, ast.Name)
                assert isinstance(after.value, ast.Constant)
                found[field.target.id] = " ".join(str(after.value.value).split())
    return found


def _refuse_unknown_keys(cls: type, values: Mapping[str, Any], where: str) -> None:
    known = keys_of(cls)
    hints = get_type_hints(cls)
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            meant = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."
            raise ValueError(f"{where}: there is no setting {key!r}.{meant}")
        # The field itself or a member of its union; a dict of dataclasses has keys of the user's own.
        choices = (hints[key],) if get_origin(hints[key]) is dict else (hints[key], *get_args(hints[key]))
        nested = next((t for t in choices if dataclasses.is_dataclass(t)), None)
        if isinstance(value, Mapping) and isinstance(nested, type):
            _refuse_unknown_keys(nested, value, f"{where}.{key}" if where else str(key))


def _sentence(detail: Any, where: str) -> str:
    place = ".".join(str(part) for part in (where, *detail["loc"]) if part != "")
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "missing":
        return f"{place}: this setting has no default, give it."
    if detail["type"] == "value_error":
        return f"{place}: {message}"
    return f"{place}: {message}, not {detail['input']!r}."
