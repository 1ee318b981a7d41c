"""How element ops are shared out among programs."""

import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._shared import launch_options

GRAIN = 8  # elements: 16 bytes of bf16


def in_grains(*sizes: int) -> tuple[int, list[int]]:
    """GRAIN and the sizes in it if it divides them all, else 1 and the sizes.

    Of a number Triton only asks whether 16 divides it; rows 1000 apart would be read 2 bytes at a
    time. So kernels are given grains, and multiply.
    """
    grain = GRAIN if all(size % GRAIN == 0 for size in sizes) else 1
    return grain, [size // grain for size in sizes]


def element_options(
    *tensors: Tensor, keep_rows: bool = False
) -> tuple[tuple[int], list[int], dict[str, int]]:
    """One program a block of elements of [rows, cols] tensors.

    Where there are no gaps all rows are one, unless it matters to which row an element belongs.

    Returns:
        The grid; the columns, and how far apart the rows of each tensor are, all in grains; the
        options.
    """
    rows, cols = tensors[0].shape
    strides = [t.stride(0) for t in tensors]
    if not keep_rows and (rows == 1 or all(stride == cols for stride in strides)):
        rows, cols, strides = 1, rows * cols, [0] * len(strides)
    grain, sizes = in_grains(cols, *strides)
    options = {"GRAIN": grain, "BLOCK": 1024, **launch_options(4)}  # 16 bytes of bf16 a thread
    return (rows * triton.cdiv(cols, options["BLOCK"]),), sizes, options


@triton.jit
def element_start(cols, GRAIN: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row, and its first column, under `element_options`."""
    program = tl.cast(tl.program_id(0), tl.int64)
    across = tl.cdiv(tl.cast(cols, tl.int64) * GRAIN, BLOCK)
    return program // across, program % across * BLOCK


@triton.jit
def element_block(cols, GRAIN: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row (in grains) and columns, and which of these there are."""
    row, start = element_start(cols, GRAIN, BLOCK)
    col = start + tl.arange(0, BLOCK)
    return row * GRAIN, col, col < tl.cast(cols, tl.int64) * GRAIN
