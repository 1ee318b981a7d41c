"""GELU on the CPU: chunks of the elements in parallel."""

from torch import Tensor

from tilewise.kernels.numba._activations import backward_kernels, forward_kernels
from tilewise.kernels.numba._elements import chunks
from tilewise.kernels.numba._simd import address, kind, load, offset, pointer, store

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
