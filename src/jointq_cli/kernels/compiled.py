"""How functions are compiled for the CPU. Knows numba and nothing of what is compiled."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile at the first call, and keep the machine code on disk where a place for it can be found.

    Exact arithmetic: nothing is fused or reordered.
    """
    try:
        return cast(F, numba.njit(function, nogil=True, error_model="numpy", cache=True))
    except RuntimeError:  # neither the package's directory nor the user's cache directory can be written to
        return cast(F, numba.njit(function, nogil=True, error_model="numpy"))
