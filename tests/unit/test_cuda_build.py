"""The kernels compile for every architecture without spills, contraction or flushing, once a node.

Nothing here needs a GPU. The compiler is whatever ``find_compiler`` finds; the machine code is read where
ptxas and cuobjdump are on PATH, and what cannot be checked is skipped with a reason.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tightrec.kernels.cuda import build
from tightrec.kernels.cuda.build import FLAGS, SOURCES, BuildError, Compiler

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
COMPILED = "sm_90"
"""The one that is compiled as users do; the others only assembled, where that can be done."""
FUSED = re.compile(r"\bfma\.|\bmad\.\w*\.?f32|\bfma\b.*\bf32")
FLUSHED = re.compile(r"\b(?:add|sub|mul|div|sqrt|rcp|abs|neg|min|max|setp|set|cvt\.\w+)[\w.]*\.ftz\b")


def compiler() -> Compiler:
    try:
        return build.find_compiler()
    except BuildError as error:
        pytest.skip(str(error))


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not on PATH")
    return found


def fake(log: Path, content: bytes = b"cubin") -> Compiler:
    """A compiler that counts its calls in a file."""

    def compile_source(source: str, options: list[str]) -> bytes:
        with log.open("a") as file:
            file.write("called\n")
        return content

    return Compiler("fake 1", compile_source)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(build.CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kernels, compiled as a first user's call does."""
    path = tmp_path_factory.mktemp("cubin") / "kernels.cubin"
    path.write_bytes(compiler().compile(build.source_text(), build.options(COMPILED)))
    return path


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> str:
    """All kernels as nvcc's intermediate code, before it is assembled."""
    folder = tmp_path_factory.mktemp("ptx")
    (folder / "kernels.cu").write_text(build.source_text())
    flags = [*FLAGS, f"--include-path={SOURCES}", "--gpu-architecture=compute_80"]
    command = [tool("nvcc"), "-ptx", *flags, "-o", str(folder / "kernels.ptx"), str(folder / "kernels.cu")]
    subprocess.run(command, check=True)
    return (folder / "kernels.ptx").read_text()


def decode_kernels() -> list[str]:
    """Names of the decode kernels, as the sources give them to their macros."""
    text = "".join(path.read_text() for path in sorted(SOURCES.glob("decode*.cu")))
    return [*re.findall(r"^DECODE_\w+\((decode_\w+), ", text, re.MULTILINE), "decode_check"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_kernels_compile(architecture: str, request: pytest.FixtureRequest) -> None:
    if architecture == COMPILED:
        made = request.getfixturevalue("cubin").read_bytes()
    elif shutil.which("nvcc") and shutil.which("ptxas"):
        pytest.skip("assembled in test_no_kernel_spills")
    else:
        made = compiler().compile(build.source_text(), build.options(architecture))
    assert made[:4] == b"\x7fELF"
    assert len(decode_kernels()) == 10
    assert [name for name in decode_kernels() if name.encode() not in made] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(ptx: str, architecture: str, tmp_path: Path) -> None:
    """Compiled from the source for each: launch bounds depend on the architecture."""
    source = tmp_path / "kernels.cu"
    source.write_text(build.source_text())
    flags = [*FLAGS, f"--include-path={SOURCES}", f"--gpu-architecture={architecture}", "-Xptxas", "-v"]
    command = [tool("nvcc"), "-cubin", *flags, "-o", str(tmp_path / "cubin"), str(source)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert spilled(said) == []
    assert said.count("Compiling entry function") == ptx.count(".entry")


def spilled(said: str) -> list[str]:
    """The kernels of ptxas's report that spill, and decoders with anything else outside registers."""
    numbers = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    found = re.findall(r"entry function '(\w+)'.*?" + numbers, said, re.DOTALL)
    return [
        name
        for name, stack, *spills in found
        if any(int(count) for count in (*spills, stack if name.startswith("decode_") else "0"))
    ]


def test_a_spill_is_found() -> None:
    report = "ptxas info : Compiling entry function '{}' for 'sm_90'\n"
    report += "{} bytes stack frame, {} bytes spill stores, {} bytes spill loads\n"
    said = report.format("a", 8, 0, 0) + report.format("b", 8, 4, 0) + report.format("c", 8, 0, 4)
    said += report.format("decode_d", 0, 0, 0) + report.format("decode_e", 16, 0, 0)
    assert spilled(said) == ["b", "c", "decode_e"]


def inexact(text: str) -> list[str]:
    """Lines of intermediate code that contract products and sums or flush denormals."""
    return [line.strip() for line in text.splitlines() if FUSED.search(line) or FLUSHED.search(line)]


def test_nothing_is_contracted_or_flushed(ptx: str) -> None:
    planted = (
        "fma.rn.f32 %f1, %f2, %f3, %f4;",
        "mul.rn.ftz.f32 %f1, %f2, %f3;",
        "mul.rn.f32 %f1, %f2, %f3;",
        "mad.lo.s32 %r1, %r2, %r3, %r4;",
        "cvt.rn.ftz.f32.s32 %f1, %r1;",
        "fma.rn.f64 %fd1, %fd2, %fd3, %fd4;",
    )
    assert [line in inexact("\n".join(planted)) for line in planted] == [True, True, False, False, True, True]
    assert "mul.rn.f32" in ptx
    assert inexact(ptx) == []


def test_the_machine_code_multiplies_and_adds_apart(cubin: Path) -> None:
    """Read of the decoders alone: the encoders' rounded divisions are made of FFMA, some of it flushing."""
    listing = subprocess.run(
        [tool("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True
    )
    kernels = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", listing.stdout, re.DOTALL))
    decoders = {name: code for name, code in kernels.items() if name.startswith("decode_")}
    assert len(decoders) == len(decode_kernels())
    assert [name for name, code in decoders.items() if re.search(r"\b[FHD]FMA", code)] == []
    assert [name for name, code in decoders.items() if re.search(r"\bF(MUL|ADD|SETP)\S*\.FTZ", code)] == []


def test_the_second_build_does_not_compile(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = build.cubin("sm_90", fake(log))
    assert first.parent == cache
    assert first.read_bytes() == b"cubin"
    assert build.cubin("sm_90", fake(log)) == first
    assert log.read_text().count("called") == 1
    other = fake(log)._replace(version="fake 2")
    assert len({first, build.cubin("sm_80", fake(log)), build.cubin("sm_90", other)}) == 3
    assert log.read_text().count("called") == 3


def test_the_key_covers_the_sources(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(SOURCES, sources, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "SOURCES", sources)
    log = tmp_path / "log"
    paths = {build.cubin("sm_90", fake(log))}
    for name in ("common.cuh", "decode_tiles.cu"):
        (sources / name).write_text((sources / name).read_text() + "\n")
        paths.add(build.cubin("sm_90", fake(log)))
    assert len(paths) == 3
    assert log.read_text().count("called") == 3


@pytest.mark.parametrize("content", [b"", b"cubim", b"cubin and more"])
def test_a_broken_file_is_replaced(cache: Path, tmp_path: Path, content: bytes) -> None:
    log = tmp_path / "log"
    path = build.cubin("sm_90", fake(log))
    path.write_bytes(content)
    assert build.cubin("sm_90", fake(log)).read_bytes() == b"cubin"
    assert log.read_text().count("called") == 2
    path.with_suffix(".sha256").unlink()
    assert build.cubin("sm_90", fake(log)).read_bytes() == b"cubin"
    assert log.read_text().count("called") == 3
    assert {file.suffix for file in cache.iterdir()} == {".cubin", ".sha256", ".lock"}


def test_processes_that_start_together_compile_once(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tightrec.kernels.cuda import build\n"
        "def slow(source, options):\n"
        "    with Path(sys.argv[1]).open('a') as file:\n"
        "        file.write('called\\n')\n"
        "    time.sleep(1)\n"
        "    return b'cubin'\n"
        "assert build.cubin('sm_90', build.Compiler('slow 1', slow)).read_bytes() == b'cubin'\n"
    )
    several = [subprocess.Popen([sys.executable, "-c", code, str(log)]) for _ in range(3)]
    assert [process.wait(60) for process in several] == [0, 0, 0]
    assert log.read_text().count("called") == 1


def test_a_compiler_that_dies_leaves_nothing_behind(cache: Path, tmp_path: Path) -> None:
    def failing(source: str, options: list[str]) -> bytes:
        raise BuildError("no such thing")

    with pytest.raises(BuildError, match=r"could not be compiled for sm_90 by failing 1: no such thing"):
        build.cubin("sm_90", Compiler("failing 1", failing))
    assert [file.suffix for file in cache.iterdir()] == [".lock"]


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv(build.CACHE_VARIABLE, str(blocked / "cache"))
    with pytest.raises(BuildError, match=r"Set TIGHTREC_CACHE to a folder that can be written"):
        build.cubin("sm_90", fake(tmp_path / "log"))

    def missing() -> Compiler:
        raise ImportError("not installed")

    for name in ("_cuda_bindings", "_cupy", "_nvcc"):
        monkeypatch.setattr(build, name, missing)
    with pytest.raises(BuildError, match=r"found no compiler. Install cupy-cuda13x.* nvcc on PATH"):
        build.find_compiler()


def test_a_wrong_source_is_refused_with_the_compilers_words() -> None:
    with pytest.raises(BuildError, match="expected"):
        compiler().compile("extern int x = ;", build.options("sm_90"))


def test_importing_touches_neither_cuda_nor_a_compiler() -> None:
    code = (
        "import sys, subprocess\n"
        "def forbidden(*_, **__): raise AssertionError('a process was started')\n"
        "subprocess.Popen.__init__ = forbidden\n"
        "from tightrec.kernels.cuda import build, cupy_executor, decode\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not {'cupy', 'cuda', 'cuda.bindings'} & set(sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
