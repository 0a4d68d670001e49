"""What the source of one module imports and touches, read from its syntax tree for the layout's guards.

Each guard takes a path relative to the project's root and the source, and returns the violations in words,
so that the tests can feed it planted sources as well as the real ones.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]

MAY_IMPORT: dict[str, set[str]] = {
    "formats": set(),
    "kernels": set(),
    "compression": {"kernels"},
    "sharding": {"kernels", "compression"},
    "models": set(),
    "trainer": {"kernels", "compression", "sharding", "formats", "models", "conf"},
    "snapshot": {"formats", "models"},
    "serving": {"formats", "models", "snapshot"},
    "conf": set(),
    "examples": {"kernels", "compression", "sharding", "models"},
}
"""The packages that a folder may import besides itself; a folder that is not listed may import all."""

PACKAGES = tuple(folder for folder in MAY_IMPORT if folder != "examples")

FOREIGN_BANNED: dict[str, tuple[str, ...]] = {
    "kernels": ("torchrec", "fbgemm_gpu", "torch.distributed"),
    "compression": ("torchrec", "fbgemm_gpu", "torch.distributed"),
    "formats": ("torch", "torchrec", "fbgemm_gpu"),
    "models": ("torch.distributed", "torchrec.distributed"),
}
"""Libraries, or parts of them, that a folder must not know: ranks, tables."""

CONFIG_LIBRARIES = ("hydra", "omegaconf")
KNOW_CONFIG = ("trainer/config.py", "trainer/__main__.py")
KNOWS_PRIVATE_TORCHREC = "sharding/compat.py"

_DEFINITION = re.compile(
    r"(?:def|class)\s+(_\w+)|(?:self|cls)\.(_\w+)\s*(?::[^=\n]+)?=(?!=)|^\s*(_\w+)\s*(?::|=(?!=))",
    re.MULTILINE,
)


def sources(*folders: str) -> Iterator[tuple[str, str]]:
    """Path relative to the root, and source, of every module under ``folders``."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported: relative, inside functions, and by string too."""
    package = ("tightrec", *PurePosixPath(path).parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def wrong_way(path: str, source: str) -> list[str]:
    """Imports of a tightrec folder that stands above, or beside, the module's own."""
    folder = PurePosixPath(path).parts[0]
    if folder not in MAY_IMPORT:
        return []
    allowed = MAY_IMPORT[folder] | {folder}
    return [
        f"{path}:{line}: {folder}/ must not import {name}"
        for line, name in imports(path, source)
        if name.startswith("tightrec.") and name.split(".")[1] not in allowed
    ]


def foreign(path: str, source: str) -> list[str]:
    """Imports of libraries that the module's folder must not know; of Hydra outside the one module."""
    folder = PurePosixPath(path).parts[0]
    banned = FOREIGN_BANNED.get(folder, ())
    if folder in PACKAGES and path not in KNOW_CONFIG:
        banned += CONFIG_LIBRARIES
    return [
        f"{path}:{line}: {folder}/ must not import {name}"
        for line, name in imports(path, source)
        if any(name == library or name.startswith(library + ".") for library in banned)
    ]


def bare(path: str, source: str) -> list[str]:
    """Imports of a folder by its bare name, which depend on the working folder and clash with others."""
    return [
        f"{path}:{line}: import tightrec.{name}, not {name}"
        for line, name in imports(path, source)
        if name.split(".")[0] in PACKAGES
    ]


def private_torchrec(path: str, source: str, private: set[str], own: set[str]) -> list[str]:
    """Uses of names that are private to torchrec: imported, as attributes, or by ``getattr`` and the like.

    ``private`` holds the underscored names that torchrec defines, ``own`` those that tightrec defines
    itself: an attribute of the latter is taken for ours.
    """
    if path == KNOWS_PRIVATE_TORCHREC:
        return []
    found = [
        (line, name)
        for line, name in imports(path, source)
        if name.startswith("torchrec.") and any(_is_private(part) for part in name.split("."))
    ]
    for node in ast.walk(ast.parse(source)):
        name = None
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.Call) and _called(node) in ("getattr", "setattr", "hasattr", "delattr"):
            constant = node.args[1] if len(node.args) > 1 else None
            name = constant.value if isinstance(constant, ast.Constant) else None
        if isinstance(name, str) and _is_private(name) and name in private - own:
            found.append((node.lineno, name))
    return [
        f"{path}:{line}: {name} is torchrec's own; reach it through {KNOWS_PRIVATE_TORCHREC}"
        for line, name in found
    ]


def names_defined(source: str) -> set[str]:
    """Underscored names that a source defines: functions, classes, names, attributes of self or cls."""
    return {name for groups in _DEFINITION.findall(source) for name in groups if _is_private(name)}


def _called(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in _NAMED_TUPLE


# Public in spite of their names: a named tuple keeps plain names free for its fields.
_NAMED_TUPLE = ("_replace", "_asdict", "_fields", "_make")
