"""Dropout and a residual on the CPU: chunks of the rows in parallel."""

import torch
from torch import Tensor

from tilewise.kernels.numba._dropout import SCALE, draw, mark_kept
from tilewise.kernels.numba._elements import chunks
from tilewise.kernels.numba._norm_rows import add_row
from tilewise.kernels.numba._parallel import Kernel
from tilewise.kernels.numba._simd import address, kind, offset, pointer
from tilewise.kernels.numba._stream import CHUNK, finish_writes, scratch, streamed


@Kernel
def _add(
    task, y_at, x_at, residual_at, kind, x_kind, residual_kind, rows, cols, row_step, col_step,
    x_stride, residual_stride, dropout, past_caches,
):  # fmt: skip
    factors = scratch(pointer(y_at, kind))
    across = (cols + col_step - 1) // col_step
    row, col = task // across * row_step, task % across * col_step
    end = min(col + col_step, cols)
    for i in range(row, min(row + row_step, rows)):
        for start in range(col, end, CHUNK):
            x = offset(pointer(x_at, x_kind), i * x_stride + start)
            residual = pointer(residual_at, residual_kind)
            residual = offset(residual, i * residual_stride + start)
            y = offset(pointer(y_at, kind), i * cols + start)
            count = min(CHUNK, end - start)
            if dropout is not None:
                mark_kept(factors, start, count, i, dropout, dropout[SCALE])
                add_row((y, None), (x, residual, factors), (), count, past_caches)
            else:
                add_row((y, None), (x, residual, None), (), count, past_caches)
    if past_caches:
        finish_writes()


def _launch(
    y: Tensor, x: Tensor, residual: Tensor | None,
    p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
) -> Tensor:  # fmt: skip
    tasks, *sizes = chunks(x, keep_rows=True)
    _add(
        tasks, 2 * x.numel(), address(y), address(x), address(residual),
        kind(y), kind(x), None if residual is None else kind(residual), *sizes,
        x.stride(0), 0 if residual is None else residual.stride(0),
        draw(p, seeds, offsets, seed, offset) if p else None, streamed(y),
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
