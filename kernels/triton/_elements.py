"""How element ops are shared out among programs."""

import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._shared import launch_options


def element_options(*tensors: Tensor) -> tuple[tuple[int], int, dict[str, int]]:
    """One program a block of elements of [rows, cols] tensors: the grid, the columns, the options.

    Where there are no gaps all rows are one.
    """
    rows, cols = tensors[0].shape
    if rows == 1 or all(t.stride(0) == cols for t in tensors):
        rows, cols = 1, rows * cols
    options = {"BLOCK": 1024, **launch_options(4)}  # 16 bytes of bf16 a thread
    return (rows * triton.cdiv(cols, options["BLOCK"]),), cols, options


@triton.jit
def element_block(cols, BLOCK: tl.constexpr):
    """This program's row and columns under `element_options`, and which of these there are."""
    program = tl.cast(tl.program_id(0), tl.int64)
    across = tl.cdiv(cols, BLOCK)
    col = program % across * BLOCK + tl.arange(0, BLOCK)
    return program // across, col, col < cols
