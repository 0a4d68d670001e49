"""How the package's loops are compiled and where they are kept.

``loop`` marks what Python calls: it releases the GIL and is cached on disk. ``inner`` marks what loops call;
it has no wrappers, which would take longer to compile than the functions. Neither allows fastmath.

Numba notices a change in the file of a cached function, but not in the files of what it calls: so the cache's
folder is named after the content of all of them.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config, njit

from tightrec.kernels import format as format_module
from tightrec.kernels.cache import CACHE_VARIABLE, cache_folder, digest

inner: Any = njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def _kept_in() -> Path | None:
    """The folder for these sources, or None where none can be written; ``$NUMBA_CACHE_DIR`` goes first."""
    sources = [*Path(__file__).parent.glob("*.py"), Path(str(format_module.__file__))]
    folder = None
    try:
        folder = Path(config.CACHE_DIR or cache_folder()) / f"numba-{digest(sources)}"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        warnings.warn(
            f"the codec's compiled loops cannot be kept in {folder or 'the home folder'} ({error}): every "
            f"process will compile them again, which takes half a minute. Set {CACHE_VARIABLE} to a folder "
            f"that can be written",
            stacklevel=2,
        )
        return None


_FOLDER = _kept_in()


def loop(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls."""
    before = config.CACHE_DIR
    if _FOLDER is not None:
        config.CACHE_DIR = str(_FOLDER)  # numba reads it when a function is decorated
    try:
        return njit(nogil=True, cache=_FOLDER is not None, no_cfunc_wrapper=True)(function)
    finally:
        config.CACHE_DIR = before
