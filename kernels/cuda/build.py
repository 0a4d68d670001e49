"""Compiles the kernels to a cubin for one architecture, once a node, and keeps it on disk.

The options are exact: no contraction to fused multiply-adds, no flushing of denormals, correctly rounded
division and square roots, since the frame format promises the same bits on every device. CuPy would add
``-ftz=true`` if it compiled, which is why it only loads what is built here.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tightrec.kernels.cache import CACHE_VARIABLE, cache_folder, digest

FLAGS = ("--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true", "--std=c++17")
"""Options that NVRTC and nvcc both take."""
SOURCES = Path(__file__).parent


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says why and what to do."""


class Compiler(NamedTuple):
    """Something that makes cubins."""

    version: str
    """Name and version, part of the cache's key."""
    compile: Callable[[str, list[str]], bytes]
    """From a source text and options to a cubin; raises ``BuildError`` with the compiler's output."""


def find_compiler() -> Compiler:
    """NVRTC by cuda.bindings or by CuPy, or else nvcc.

    Raises:
        BuildError: none of them is here.
    """
    missing = []
    for find in (_cuda_bindings, _cupy, _nvcc):
        try:
            return find()
        except Exception as error:  # a binding without its library fails in ways of its own
            missing.append(f"{find.__name__.strip('_')}: {str(error).strip().splitlines()[0]}")
    raise BuildError(
        "the CUDA backend compiles its kernels when it is first used, but found no compiler. Install "
        "cupy-cuda13x[ctk] (or cuda-bindings and nvidia-cuda-nvrtc), or put nvcc on PATH. "
        f"What was tried: {'; '.join(missing)}"
    )


def _cuda_bindings() -> Compiler:
    from cuda.bindings import nvrtc

    def checked(result: tuple) -> tuple:
        if int(result[0]):
            raise BuildError(f"NVRTC failed with {result[0]}")
        return result[1:]

    def compile_source(source: str, options: list[str]) -> bytes:
        (program,) = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))
        encoded = [option.encode() for option in options]
        try:
            if int(nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0]):
                (size,) = checked(nvrtc.nvrtcGetProgramLogSize(program))
                log = b" " * size
                checked(nvrtc.nvrtcGetProgramLog(program, log))
                raise BuildError(log.rstrip(b"\0 ").decode())
            (size,) = checked(nvrtc.nvrtcGetCUBINSize(program))
            cubin = b" " * size
            checked(nvrtc.nvrtcGetCUBIN(program, cubin))
            return cubin
        finally:
            nvrtc.nvrtcDestroyProgram(program)

    major, minor = checked(nvrtc.nvrtcVersion())
    return Compiler(f"nvrtc {major}.{minor}", compile_source)


def _cupy() -> Compiler:
    from cupy.cuda import nvrtc

    def compile_source(source: str, options: list[str]) -> bytes:
        program = nvrtc.createProgram(source, "kernels.cu", (), ())
        try:
            nvrtc.compileProgram(program, tuple(options))
            return bytes(nvrtc.getCUBIN(program))
        except nvrtc.NVRTCError as error:
            raise BuildError(nvrtc.getProgramLog(program) or str(error)) from error
        finally:
            nvrtc.destroyProgram(program)

    major, minor = nvrtc.getVersion()
    return Compiler(f"nvrtc {major}.{minor}", compile_source)


def _nvcc() -> Compiler:
    program = shutil.which("nvcc")
    if program is None:
        raise BuildError("not on PATH")
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout

    def compile_source(source: str, options: list[str]) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            given, cubin = Path(folder, "kernels.cu"), Path(folder, "kernels.cubin")
            given.write_text(source)
            command = [program, "-cubin", *options, "-o", str(cubin), str(given)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise BuildError(done.stderr or done.stdout)
            return cubin.read_bytes()

    return Compiler(f"nvcc {hashlib.sha256(said.encode()).hexdigest()[:16]}", compile_source)


def source_text() -> str:
    """One source that includes all ``.cu`` files."""
    return "".join(f'#include "{path.name}"\n' for path in sorted(SOURCES.glob("*.cu")))


def options(architecture: str) -> list[str]:
    """What a compiler is told for an architecture such as ``sm_90``."""
    return [f"--gpu-architecture={architecture}", *FLAGS, f"--include-path={SOURCES}"]


def cubin(architecture: str, compiler: Compiler | None = None) -> Path:
    """The kernels as a cubin on disk; compiled if no process has done so before.

    Processes that ask at once wait for the first of them. A file that is not what was written is replaced.

    Args:
        architecture: of the device, such as ``sm_90``.
        compiler: default the one that ``find_compiler`` finds.

    Raises:
        BuildError: there is no compiler, it failed, or the cache folder cannot be written.
    """
    compiler = compiler or find_compiler()
    path = cache_folder() / f"kernels-{architecture}-{_key(architecture, compiler)}.cubin"
    if _is_whole(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise BuildError(
            f"the compiled kernels cannot be kept in {path.parent}: {error}. "
            f"Set {CACHE_VARIABLE} to a folder that can be written."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_whole(path):
            try:
                made = compiler.compile(source_text(), options(architecture))
            except BuildError as error:
                raise BuildError(
                    f"the kernels could not be compiled for {architecture} by {compiler.version}: {error}"
                ) from error
            _write(path, made)
            _write(_proof(path), hashlib.sha256(made).hexdigest().encode())
    return path


def _key(architecture: str, compiler: Compiler) -> str:
    """Digest of all that the cubin depends on."""
    sources = [*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")]
    return digest(sources, architecture, *FLAGS, compiler.version)


def _proof(path: Path) -> Path:
    """The file that holds the cubin's own digest."""
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    """Whether the file is there and as it was written."""
    with suppress(OSError):
        return hashlib.sha256(path.read_bytes()).hexdigest() == _proof(path).read_text()
    return False


def _write(path: Path, content: bytes) -> None:
    """Write beside and rename, so that a file is never seen half written."""
    unfinished = path.with_suffix(f"{path.suffix}.{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(path)
