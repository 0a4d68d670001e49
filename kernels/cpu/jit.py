"""How the package's loops are compiled.

``loop`` marks what Python calls: it releases the GIL and is cached on disk. ``inner`` marks what loops call;
it has no wrappers, which would take longer to compile than the functions. Neither allows fastmath.
"""

from typing import Any

from numba import njit

loop: Any = njit(nogil=True, cache=True, no_cfunc_wrapper=True)
inner: Any = njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
