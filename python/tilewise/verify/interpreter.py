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
    arithmetic.install()
    reductions.install()
    intrinsics.install()
    accesses.install()
    hints.install()
    launches.install()
    replace(interpreter, "_patch_lang_tensor", patch_tensor)
    if (warning := untested(triton.__version__, MISSING)) is not None:
        warnings.warn(warning, RuntimeWarning, stacklevel=2)


def untested(version: str, missing: list[str]) -> str | None:
    """What to warn of: the version is not one of those tested, or pieces of it are not there."""
    if not missing and OLDEST <= _numbers(version) <= NEWEST:
        return None
    what = ", ".join(missing) or "arithmetic, reductions, memory checks, descriptors, atomics"
    return (
        f"sanitize: triton must be {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}, "
        f"got {version}; untested: {what}"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def patch_tensor(tensor: Any, scope: Any) -> None:
    STOCK["_patch_lang_tensor"](tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
