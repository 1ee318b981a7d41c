"""What a kernel says of its values, checked: hints to the compiler, assumptions, assertions.

Along an axis, by Triton's definition: `max_contiguous(x, n)` means runs of n that rise by one,
`max_constancy(x, n)` runs of n equal values, `multiple_of(x, n)` that the first value of every
rising run is a multiple of n. For pointers all of it is in elements.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from tilewise.verify import session
from tilewise.verify.memory import ADDRESS
from tilewise.verify.patching import STOCK, replace

HINTS = ("multiple_of", "max_contiguous", "max_constancy")


def checked(name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
    """The function of Triton's language, which checks what it is told."""

    def hint(value: Any, numbers: Any, **_: Any) -> Any:
        given = list(numbers) if isinstance(numbers, list | tuple) else [numbers]
        given = [n.value if isinstance(n, tl.constexpr) else n for n in given]
        now = session.active
        if now and now.launch:
            _check(name, value, given)
        return stock(value, given)

    return hint


def _check(name: str, value: Any, numbers: list[int]) -> None:
    if isinstance(value, tl.tensor):
        data, pointer = value.handle.data, value.dtype.is_ptr()
        step = max(1, value.dtype.element_ty.primitive_bitwidth // 8) if pointer else 1
        data = (data & ADDRESS).astype(np.int64) if pointer else data.astype(np.int64)
    elif isinstance(value, int):  # of a loop that the interpreter runs in Python
        data, step = np.array([value]), 1
    else:
        return
    if data.ndim != len(numbers) or data.size == 0:
        return
    for axis, number in enumerate(numbers):
        lane = _wrong(name, np.moveaxis(data, axis, 0), number, step)
        if lane is not None:
            place = (*lane[1 : axis + 1], lane[0], *lane[axis + 1 :])
            along = f" along axis {axis}" if len(numbers) > 1 else ""
            what = f"tl.{name}({number}) does not hold{along}, the value is {int(data[place])}"
            session.found("hint", what, lane=place)
            return


def _wrong(name: str, data: Any, number: int, step: int) -> tuple[int, ...] | None:
    """The first lane that is not as said; the axis in question comes first."""
    if name == "multiple_of":
        starts = np.ones(data.shape, bool)
        starts[1:] = np.diff(data, axis=0) != step
        wrong = starts & (data % (number * step) != 0)
    else:
        rise = step if name == "max_contiguous" else 0
        wrong = np.zeros(data.shape, bool)
        wrong[1:] = np.diff(data, axis=0) != rise
        wrong[::number] = False
        if name == "max_contiguous" and number > len(data):
            wrong[-1] = True
    if not wrong.any():
        return None
    return tuple(int(i) for i in np.argwhere(wrong)[0])


def _first_false(condition: Any) -> tuple[int, ...] | None:
    data = np.asarray(
        condition.data if isinstance(condition, interpreter.TensorHandle) else condition
    )
    if data.all():
        return None
    return tuple(int(i) for i in np.argwhere(~np.atleast_1d(data.astype(bool)))[0])


def create_assert(self: Any, condition: Any, message: Any, *rest: Any) -> Any:
    if session.active is None:
        return STOCK["create_assert"](self, condition, message, *rest)
    lane = _first_false(condition)
    if lane is not None:
        session.found("assertion", f"tl.device_assert: {message}", lane=lane)
    return None


def create_assume(self: Any, condition: Any) -> Any:
    if session.active is None:
        return STOCK["create_assume"](self, condition)
    lane = _first_false(condition)
    if lane is not None:
        session.found("assertion", "tl.assume is given what does not hold", lane=lane)
    return None


def patch_core(language: Any, scope: Any) -> None:
    STOCK["_patch_lang_core"](language, scope)
    for name in HINTS:
        scope.set_attr(language, name, checked(name, getattr(language, name)))


def install() -> None:
    """Check hints and assertions, for all of this process."""
    replace(interpreter.InterpreterBuilder, "create_assert", create_assert)
    replace(interpreter.InterpreterBuilder, "create_assume", create_assume)
    replace(interpreter, "_patch_lang_core", patch_core)
