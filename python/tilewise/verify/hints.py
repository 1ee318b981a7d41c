"""What a kernel says of its values for the compiler's sake, checked: a false hint is a wild access.

Along an axis, by Triton's definition: `max_contiguous(x, n)` means runs of n that rise by one,
`max_constancy(x, n)` runs of n equal values, `multiple_of(x, n)` that the first value of every
rising run is a multiple of n. For pointers all of it is in elements.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl

from tilewise.verify import session
from tilewise.verify.memory import ADDRESS

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
