"""Gated linear units on the CPU: chunks of the elements in parallel, two reads and one write."""

from torch import Tensor

from tilewise.kernels.numba._activations import backward_kernels, forward_kernels
from tilewise.kernels.numba._elements import chunks
from tilewise.kernels.numba._simd import address, kind, load, offset, pointer, store


@forward_kernels
def _forward(activation):
    def chunk(
        task, y_at, gate_at, up_at, kind, rows, cols, row_step, col_step, gate_stride, up_stride
    ):
        across = (cols + col_step - 1) // col_step
        row, col = task // across * row_step, task % across * col_step
        width = min(cols - col, col_step)
        for i in range(row, min(row + row_step, rows)):
            gate = offset(pointer(gate_at, kind), i * gate_stride + col)
            up = offset(pointer(up_at, kind), i * up_stride + col)
            y = offset(pointer(y_at, kind), i * cols + col)
            for j in range(width):
                store(y, j, activation(load(gate, j)) * load(up, j))

    return chunk


@backward_kernels
def _backward(activation):
    def chunk(
        task, dgate_at, dup_at, dy_at, gate_at, up_at, kind,
        rows, cols, row_step, col_step, dy_stride, gate_stride, up_stride,
    ):  # fmt: skip
        across = (cols + col_step - 1) // col_step
        row, col = task // across * row_step, task % across * col_step
        width = min(cols - col, col_step)
        for i in range(row, min(row + row_step, rows)):
            dy = offset(pointer(dy_at, kind), i * dy_stride + col)
            gate = offset(pointer(gate_at, kind), i * gate_stride + col)
            up = offset(pointer(up_at, kind), i * up_stride + col)
            dgate = offset(pointer(dgate_at, kind), i * cols + col)
            dup = offset(pointer(dup_at, kind), i * cols + col)
            for j in range(width):
                value, slope = activation(load(gate, j))
                d = load(dy, j)
                store(dgate, j, d * load(up, j) * slope)
                store(dup, j, d * value)

    return chunk


def glu_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate, up [rows, cols] -> y [rows, cols]."""
    y = gate.new_empty(gate.shape)
    tasks, *sizes = chunks(gate, up)
    _forward[activation](
        tasks, 2 * gate.numel(), address(y), address(gate), address(up),
        kind(gate), *sizes, gate.stride(0), up.stride(0),
    )  # fmt: skip
    return y


def glu_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dy, gate, up [rows, cols] -> dgate, dup [rows, cols]."""
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    tasks, *sizes = chunks(dy, gate, up)
    _backward[activation](
        tasks, 3 * gate.numel(), address(dgate), address(dup),
        address(dy), address(gate), address(up),
        kind(gate), *sizes, dy.stride(0), gate.stride(0), up.stride(0),
    )  # fmt: skip
    return dgate, dup
