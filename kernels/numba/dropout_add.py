"""Dropout and a residual on the CPU: chunks of the rows in parallel."""

import torch
from torch import Tensor

from tilewise.kernels.numba._dropout import ANY, SCALE, draw, mark_kept
from tilewise.kernels.numba._elements import chunks
from tilewise.kernels.numba._parallel import Kernel
from tilewise.kernels.numba._simd import address, kind, load, offset, pointer, real, store


@Kernel
def _add(
    task, y_at, x_at, residual_at, kind, x_kind, rows, cols, row_step, col_step,
    x_stride, residual_stride, dropout,
):  # fmt: skip
    scale, zero = real(kind, dropout[SCALE]), real(kind, 0)
    across = (cols + col_step - 1) // col_step
    row, col = task // across * row_step, task % across * col_step
    width = min(cols - col, col_step)
    for i in range(row, min(row + row_step, rows)):
        x = offset(pointer(x_at, x_kind), i * x_stride + col)
        residual = offset(pointer(residual_at, kind), i * residual_stride + col)
        y = offset(pointer(y_at, kind), i * cols + col)
        if dropout[ANY]:
            mark_kept(y, col, width, i, dropout, 1)
            for j in range(width):
                v = load(x, j) * scale if load(y, j) > zero else zero
                if residual_at:  # LLVM asks once, outside of the loop
                    v += load(residual, j)
                store(y, j, v)
        else:
            for j in range(width):
                store(y, j, load(x, j) + load(residual, j))


def _launch(
    y: Tensor, x: Tensor, residual: Tensor | None,
    p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
) -> Tensor:  # fmt: skip
    tasks, *sizes = chunks(x, keep_rows=True)
    _add(
        tasks, 2 * x.numel(), address(y), address(x), address(residual), kind(y), kind(x), *sizes,
        x.stride(0), 0 if residual is None else residual.stride(0),
        draw(p, seeds, offsets, seed, offset),
    )  # fmt: skip
    return y


def dropout_add_forward(
    x: Tensor, residual: Tensor,
    p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
) -> Tensor:  # fmt: skip
    """x, residual [rows, cols], seeds and offsets [] or [rows] -> y [rows, cols]."""
    y = residual.new_empty(x.shape)
    return _launch(y, x, residual, p, seeds, offsets, seed, offset)


def dropout_add_backward(
    dy: Tensor, p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """dy [rows, cols], seeds and offsets [] or [rows] -> dx [rows, cols]."""
    dx = dy.new_empty(dy.shape, dtype=dtype)
    return _launch(dx, dy, None, p, seeds, offsets, seed, offset)
