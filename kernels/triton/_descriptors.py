"""Tensor descriptors: how the copy engine of a GPU since Hopper finds its way through a tensor.

What a loop streams by one is on its way without a thread or a register for its addresses, and what
lies past the end of the tensor comes as zeros.
"""

from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_ENGINES = range(90, 120)  # architectures with it and room for its tiles: 227 kB a block
_GRAIN, _MOST_BYTES = 16, 2**40  # of strides: a multiple of this, and below this


def has_copy_engine() -> bool:
    """Whether what is compiled for has one; the interpreter plays a GPU without it."""
    if triton.knobs.runtime.interpret:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch in _ENGINES


def can_describe(t: Tensor) -> bool:
    """Whether `t` has a descriptor: 16 bytes begin where its rows do, and no row is there twice."""
    steps = [n * t.itemsize for n, size in zip(t.stride()[:-1], t.shape, strict=False) if size > 1]
    steady = all(0 < n < _MOST_BYTES and n % _GRAIN == 0 for n in steps)
    return steady and t.stride(-1) == 1 and t.data_ptr() % _GRAIN == 0


def descriptor_of(t: Tensor, rows: int, cols: int) -> Any:
    """Of t [batch, heads, seq, dim] in tiles of `rows` of a head, `cols` wide."""
    # Of what there is only one of any stride will do, but not every one is allowed.
    strides = [cols if size == 1 else n for n, size in zip(t.stride(), t.shape, strict=True)]
    return TensorDescriptor(t, [*t.shape], [*strides[:-1], 1], [1, 1, rows, cols])
