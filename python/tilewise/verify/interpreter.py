"""Triton's interpreter, repaired where it computes wrongly, and watched where it touches memory.

That of 3.6 also fails on every loop to a runtime bound beside NumPy 2.4 or newer.
"""

import warnings
from typing import Any

import triton
from triton.runtime import interpreter

from tilewise.verify import accesses, arithmetic, hints, intrinsics, launches, reductions
from tilewise.verify.patching import MISSING, STOCK, replace

OLDEST, NEWEST = (3, 6), (3, 9)


def repair() -> None:
    """Give the interpreter of this process the arithmetic and the functions of the hardware.

    Outside a block of `sanitize` nothing is watched.
    """
    if STOCK:
        return
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    arithmetic.install()
    reductions.install()
    intrinsics.install()
    accesses.install(version)
    hints.install()
    launches.install()
    replace(interpreter, "_patch_lang_tensor", patch_tensor)
    if MISSING or not OLDEST <= version <= NEWEST:
        untested = ", ".join(MISSING) or "bfloat16, reductions, memory checks, descriptors, atomics"
        warnings.warn(
            f"sanitize: triton must be 3.6 to 3.9 to be tested, got {triton.__version__}; "
            f"untested: {untested}",
            RuntimeWarning,
            stacklevel=2,
        )


def patch_tensor(tensor: Any, scope: Any) -> None:
    STOCK["_patch_lang_tensor"](tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
