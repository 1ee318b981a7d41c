"""GELU on the CPU: chunks of the elements in parallel, parts of the rows where a sum is wanted."""

import torch
from torch import Tensor

from tilewise.kernels.numba._activations import backward_kernels, forward_kernels
from tilewise.kernels.numba._dropout import ANY, SCALE, draw, mark_kept
from tilewise.kernels.numba._elements import chunks
from tilewise.kernels.numba._shared import partial_sums, parts_for
from tilewise.kernels.numba._simd import address, kind, load, offset, pointer, real, store

_NAMES = {"none": "gelu", "tanh": "gelu_tanh"}


@forward_kernels
def _forward(activation):
    def chunk(task, y_at, x_at, kind, rows, cols, row_step, col_step, x_stride):
        across = (cols + col_step - 1) // col_step
        row, col = task // across * row_step, task % across * col_step
        width = min(cols - col, col_step)
        for i in range(row, min(row + row_step, rows)):
            x = offset(pointer(x_at, kind), i * x_stride + col)
            y = offset(pointer(y_at, kind), i * cols + col)
            for j in range(width):
                store(y, j, activation(load(x, j)))

    return chunk


@backward_kernels
def _backward(activation):
    def chunk(task, dx_at, dy_at, x_at, kind, rows, cols, row_step, col_step, dy_stride, x_stride):
        across = (cols + col_step - 1) // col_step
        row, col = task // across * row_step, task % across * col_step
        width = min(cols - col, col_step)
        for i in range(row, min(row + row_step, rows)):
            x = offset(pointer(x_at, kind), i * x_stride + col)
            dy = offset(pointer(dy_at, kind), i * dy_stride + col)
            dx = offset(pointer(dx_at, kind), i * cols + col)
            for j in range(width):
                _, slope = activation(load(x, j))
                store(dx, j, load(dy, j) * slope)

    return chunk


@forward_kernels
def _bias_forward(activation):
    def chunk(
        task, y_at, x_at, bias_at, kind, bias_kind,
        rows, cols, row_step, col_step, x_stride, dropout,
    ):  # fmt: skip
        scale, zero = real(kind, dropout[SCALE]), real(kind, 0)
        across = (cols + col_step - 1) // col_step
        row, col = task // across * row_step, task % across * col_step
        width = min(cols - col, col_step)
        bias = offset(pointer(bias_at, bias_kind), col)
        for i in range(row, min(row + row_step, rows)):
            x = offset(pointer(x_at, kind), i * x_stride + col)
            y = offset(pointer(y_at, kind), i * cols + col)
            if dropout[ANY]:
                mark_kept(y, col, width, i, dropout, 1)
                for j in range(width):
                    v = load(x, j) + real(kind, load(bias, j))
                    kept = activation(v) * scale
                    store(y, j, kept if load(y, j) > zero else zero)
            else:
                for j in range(width):
                    v = load(x, j) + real(kind, load(bias, j))
                    store(y, j, activation(v))

    return chunk


@backward_kernels
def _bias_backward(activation):
    def part(
        part, dx_at, dbias_at, dy_at, x_at, bias_at, kind, wide, bias_kind,
        rows, cols, dx_stride, sum_stride, dy_stride, x_stride, parts, dropout,
    ):  # fmt: skip
        scale, zero = real(kind, dropout[SCALE]), real(kind, 0)
        bias = pointer(bias_at, bias_kind)
        dbias = offset(pointer(dbias_at, wide), part * sum_stride)
        for i in range(part * rows // parts, (part + 1) * rows // parts):
            x = offset(pointer(x_at, kind), i * x_stride)
            dy = offset(pointer(dy_at, kind), i * dy_stride)
            # Where dx is not wanted, a part has a row of it that is written over and over.
            dx = offset(pointer(dx_at, kind), (i if dx_stride else part) * cols)
            if dropout[ANY]:
                mark_kept(dx, 0, cols, i, dropout, 1)
                for j in range(cols):
                    v = load(x, j) + real(kind, load(bias, j))
                    _, slope = activation(v)
                    kept = load(dy, j) * slope * scale
                    g = kept if load(dx, j) > zero else zero
                    store(dx, j, g)
                    if dbias_at:
                        store(dbias, j, load(dbias, j) + g)
            else:
                for j in range(cols):
                    v = load(x, j) + real(kind, load(bias, j))
                    _, slope = activation(v)
                    g = load(dy, j) * slope
                    store(dx, j, g)
                    if dbias_at:
                        store(dbias, j, load(dbias, j) + g)

    return part


def gelu_forward(x: Tensor, approximate: str) -> Tensor:
    """x [rows, cols] -> y [rows, cols]."""
    y = x.new_empty(x.shape)
    tasks, *sizes = chunks(x)
    _forward[_NAMES[approximate]](
        tasks, x.numel(), address(y), address(x), kind(x), *sizes, x.stride(0)
    )
    return y


def gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    """dy, x [rows, cols] -> dx [rows, cols]."""
    dx = x.new_empty(x.shape)
    tasks, *sizes = chunks(dy, x)
    _backward[_NAMES[approximate]](
        tasks, 2 * x.numel(), address(dx), address(dy), address(x),
        kind(x), *sizes, dy.stride(0), x.stride(0),
    )  # fmt: skip
    return dx


def bias_gelu_forward(
    x: Tensor, bias: Tensor, approximate: str,
    dropout_p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
) -> Tensor:  # fmt: skip
    """x [rows, cols], bias [cols], seeds and offsets [] or [rows] -> y [rows, cols]."""
    y = x.new_empty(x.shape)
    tasks, *sizes = chunks(x, keep_rows=True)
    _bias_forward[_NAMES[approximate]](
        tasks, x.numel(), address(y), address(x), address(bias),
        kind(x), kind(bias), *sizes, x.stride(0), draw(dropout_p, seeds, offsets, seed, offset),
    )  # fmt: skip
    return y


def bias_gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor, approximate: str,
    dropout_p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
    want_dx: bool, want_dbias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dy, x [rows, cols], bias [cols] -> dx [rows, cols], dbias [cols], or empty if not wanted."""
    rows, cols = x.shape
    parts = parts_for(rows)
    dx = x.new_empty(rows if want_dx else parts, cols)
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = partial_sums(x, parts, wide) if want_dbias else None
    _bias_backward[_NAMES[approximate]](
        parts, 2 * x.numel(), address(dx), address(sums), address(dy), address(x), address(bias),
        kind(x), kind(x.new_empty(0, dtype=wide)), kind(bias),
        rows, cols, cols if want_dx else 0, 0 if sums is None else sums.shape[1],
        dy.stride(0), x.stride(0), parts, draw(dropout_p, seeds, offsets, seed, offset),
    )  # fmt: skip
    dbias = bias.new_empty(0) if sums is None else sums.sum(0)[:cols].to(bias.dtype)
    return dx if want_dx else x.new_empty(0), dbias
