"""How functions are compiled for the CPU, by numba."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compiles a function at its first call, and caches the machine code on disk if a directory for it is writable.

    Strict IEEE arithmetic: no operation is fused or reordered.
    """
    try:
        return cast(F, numba.njit(function, nogil=True, error_model="numpy", cache=True))
    except RuntimeError:  # neither the package's directory nor the user's cache directory is writable
        return cast(F, numba.njit(function, nogil=True, error_model="numpy"))
