"""The folders and the packaging: what is listed, what a wheel holds, how long files may be."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import guards
import pytest

ROOT = guards.ROOT
NO_PACKAGES = {
    "tests",
    "docs",
    "launch",
    "examples",
    "benchmarks",
    "requirements",
    "build",
    "dist",
    "runs",
    "data",
}
CODE = (".py", ".cu", ".cuh", ".h", ".cpp", ".sh", ".sbatch", ".yaml", ".toml")
LINES, CONF_LINES, README_LINES = 400, 60, 200


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def unlisted(root: Path, package_dir: dict[str, str], packages: list[str]) -> list[str]:
    """What differs between the packages on disk and the two lists of pyproject.toml."""
    tops = {path.name for path in root.iterdir() if path.is_dir() and path.name[0].isalpha()} - NO_PACKAGES
    tops = {top for top in tops if not top.endswith(".egg-info")}
    modules = [path for top in tops for path in (root / top).rglob("*.py")]
    folders = {path.parent.relative_to(root).as_posix() for path in modules}
    folders |= {top for top in guards.PACKAGES if (root / top).is_dir()}
    expected = {"tightrec." + folder.replace("/", "."): folder for folder in folders}
    lines = [f"packages and disk differ in {name}" for name in sorted(set(packages) ^ set(expected))]
    lines += [
        f"package-dir and disk differ in {k}" for k, _ in sorted(package_dir.items() ^ expected.items())
    ]
    return lines


def too_long(files: dict[str, int], limit: int) -> list[str]:
    return [
        f"{path}: {lines} lines, at most {limit} allowed" for path, lines in files.items() if lines > limit
    ]


def without_command(text: str) -> bool:
    """Whether a config does not start with a comment that holds a command that uses it.

    Hydra's own header (``# @package _global_``) must stand above all else and is passed over.
    """
    first = next((line for line in text.splitlines() if not line.startswith("# @")), "")
    return not (first.startswith("#") and ("-m tightrec." in first or "make " in first))


def code_files() -> list[Path]:
    tops = [*guards.PACKAGES, "launch", "examples", "benchmarks", "tests", ".ci"]
    files = [path for top in tops for path in sorted((ROOT / top).rglob("*")) if path.suffix in CODE]
    return [*files, *ROOT.glob("*.toml"), ROOT / "Makefile", ROOT / ".ci" / "run"]


def test_an_unlisted_package_is_caught(tmp_path: Path) -> None:
    (tmp_path / "kernels" / "inner").mkdir(parents=True)
    (tmp_path / "kernels" / "inner" / "a.py").touch()
    listed = {"tightrec.kernels": "kernels"}
    assert len(unlisted(tmp_path, listed, list(listed))) == 2
    listed["tightrec.kernels.inner"] = "kernels/inner"
    assert unlisted(tmp_path, listed, list(listed)) == []
    listed["tightrec.gone"] = "gone"
    assert len(unlisted(tmp_path, listed, list(listed))) == 2


def test_every_package_folder_is_listed() -> None:
    setuptools = pyproject()["tool"]["setuptools"]
    assert unlisted(ROOT, setuptools["package-dir"], setuptools["packages"]) == []


def test_only_compression_and_the_root_lack_an_init() -> None:
    assert not (ROOT / "__init__.py").exists()
    assert list((ROOT / "compression").rglob("__init__.py")) == []
    folders = pyproject()["tool"]["setuptools"]["package-dir"].values()
    lacking = [folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()]
    assert [folder for folder in lacking if folder.split("/")[0] != "compression"] == []


def python(code: str, cwd: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_the_standard_library_works_with_the_root_as_working_folder() -> None:
    ran = python("import sys, gzip, bz2, lzma; assert sys.path[0] == '', sys.path", ROOT)
    assert ran.returncode == 0, ran.stderr


def test_compression_never_shadows_a_standard_package_of_that_name(tmp_path: Path) -> None:
    """Python 3.14's `compression` stands behind the working folder on sys.path, as the fake one does here."""
    (tmp_path / "stdlib" / "compression").mkdir(parents=True)
    (tmp_path / "stdlib" / "compression" / "__init__.py").write_text("GENUINE = True\n")
    code = "import compression; assert compression.GENUINE; import tightrec.compression"
    ran = python(code, ROOT, tmp_path / "stdlib")
    assert ran.returncode == 0, ran.stderr

    (tmp_path / "broken" / "compression").mkdir(parents=True)
    (tmp_path / "broken" / "compression" / "__init__.py").touch()
    ran = python(code, tmp_path / "broken", tmp_path / "stdlib")
    assert "has no attribute 'GENUINE'" in ran.stderr


def test_a_wheel_holds_exactly_the_packages(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for folder in (*guards.PACKAGES, "tests", "benchmarks", "examples", "launch"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=junk)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "-w", tmp_path, tree], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    data = {"py.typed", ".yaml", ".html", ".cu", ".cuh", ".h"}
    expected = {
        f"tightrec/{path.relative_to(tree).as_posix()}"
        for folder in guards.PACKAGES
        for path in (tree / folder).rglob("*")
        if path.suffix == ".py" or path.suffix in data or path.name in data
    }
    assert names == expected
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_files_are_short() -> None:
    assert too_long({"a.py": 401, "b.py": 400}, 400) == ["a.py: 401 lines, at most 400 allowed"]
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in code_files()}
    assert "Makefile" in lines
    assert "trainer/versions.py" in lines
    assert too_long(lines, LINES) == []
    assert too_long({path: n for path, n in lines.items() if path.startswith("conf/")}, CONF_LINES) == []
    assert too_long({"README.md": len((ROOT / "README.md").read_text().splitlines())}, README_LINES) == []


def test_every_config_starts_with_the_command_that_uses_it() -> None:
    assert without_command("defaults:")
    assert without_command("# The model.")
    assert without_command("# @package _global_\n\n# python -m tightrec.trainer")
    assert not without_command("# torchrun --standalone -m tightrec.trainer model=dlrm")
    assert not without_command("# @package _global_\n# make train ARGS=experiment=x")
    files = sorted((ROOT / "conf").rglob("*.yaml"))
    if not files:
        pytest.skip("conf/ holds no config")
    assert [path.name for path in files if without_command(path.read_text())] == []


@pytest.mark.parametrize("name", ["LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "README.md", "docs/LOG.md"])
def test_the_papers_are_there(name: str) -> None:
    assert (ROOT / name).is_file()
    assert len((ROOT / name).read_text()) > 200


def test_the_licence_is_the_one_that_is_declared() -> None:
    words = " ".join((ROOT / "LICENSE").read_text().split())
    assert words.startswith("Apache License Version 2.0, January 2004")
    assert "9. Accepting Warranty or Additional Liability." in words
    assert "END OF TERMS AND CONDITIONS" in words
    assert pyproject()["project"]["license"] == "Apache-2.0"
