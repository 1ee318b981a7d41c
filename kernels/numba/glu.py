"""Gated linear units on the CPU: chunks of the elements in parallel, two reads and one write."""

import math

from torch import Tensor

from tilewise.kernels.numba._activations import backward_kernels, forward_kernels, inline
from tilewise.kernels.numba._elements import chunks
from tilewise.kernels.numba._simd import address, kind, load, offset, pointer, real, store

# The limit costs a quarter of the time of an element, so there are kernels without it.


def _gated(activation):
    return inline(lambda g, u, limit, alpha, inverse, up_offset: activation(g) * u)


def _gated_within_limit(activation):
    def gated(g, u, limit, alpha, inverse, up_offset):
        h = limit if g > limit else g
        v = limit if u > limit else (-limit if u < -limit else u)
        t = alpha * h
        return activation(t) * inverse * (v + up_offset)

    return inline(gated)


def _slopes(activation):
    def slopes(d, g, u, limit, alpha, inverse, up_offset):
        value, slope = activation(g)
        return d * u * slope, d * value

    return inline(slopes)


def _slopes_within_limit(activation):
    def slopes(d, g, u, limit, alpha, inverse, up_offset):
        h = limit if g > limit else g
        v = limit if u > limit else (-limit if u < -limit else u)
        t = alpha * h
        value, slope = activation(t)
        dgate, dup = d * (v + up_offset) * slope, d * value * inverse
        return real(d, 0) if g > limit else dgate, real(d, 0) if abs(u) > limit else dup

    return inline(slopes)


def _forward_chunk(gated):
    def chunk(
        task, y_at, gate_at, up_at, kind, rows, cols, row_step, col_step, gate_stride, up_stride,
        limit, alpha, up_offset,
    ):  # fmt: skip
        limit, up_offset = real(kind, limit), real(kind, up_offset)
        inverse, alpha = real(kind, 1 / alpha), real(kind, alpha)
        across = (cols + col_step - 1) // col_step
        row, col = task // across * row_step, task % across * col_step
        width = min(cols - col, col_step)
        for i in range(row, min(row + row_step, rows)):
            gate = offset(pointer(gate_at, kind), i * gate_stride + col)
            up = offset(pointer(up_at, kind), i * up_stride + col)
            y = offset(pointer(y_at, kind), i * cols + col)
            for j in range(width):
                g, u = load(gate, j), load(up, j)
                store(y, j, gated(g, u, limit, alpha, inverse, up_offset))

    return chunk


def _backward_chunk(slopes):
    def chunk(
        task, dgate_at, dup_at, dy_at, gate_at, up_at, kind,
        rows, cols, row_step, col_step, dgate_stride, dup_stride, dy_stride, gate_stride, up_stride,
        limit, alpha, up_offset,
    ):  # fmt: skip
        limit, up_offset = real(kind, limit), real(kind, up_offset)
        inverse, alpha = real(kind, 1 / alpha), real(kind, alpha)
        across = (cols + col_step - 1) // col_step
        row, col = task // across * row_step, task % across * col_step
        width = min(cols - col, col_step)
        for i in range(row, min(row + row_step, rows)):
            dy = offset(pointer(dy_at, kind), i * dy_stride + col)
            gate = offset(pointer(gate_at, kind), i * gate_stride + col)
            up = offset(pointer(up_at, kind), i * up_stride + col)
            dgate = offset(pointer(dgate_at, kind), i * dgate_stride + col)
            dup = offset(pointer(dup_at, kind), i * dup_stride + col)
            for j in range(width):
                d, g, u = load(dy, j), load(gate, j), load(up, j)
                dg, du = slopes(d, g, u, limit, alpha, inverse, up_offset)
                if dgate_at:  # LLVM asks once, outside of the loop
                    store(dgate, j, dg)
                if dup_at:
                    store(dup, j, du)

    return chunk


@forward_kernels
def _forward(activation):
    return _forward_chunk(_gated(activation))


@forward_kernels
def _forward_within_limit(activation):
    return _forward_chunk(_gated_within_limit(activation))


@backward_kernels
def _backward(activation):
    return _backward_chunk(_slopes(activation))


@backward_kernels
def _backward_within_limit(activation):
    return _backward_chunk(_slopes_within_limit(activation))


def _is_plain(limit: float, alpha: float, up_offset: float) -> bool:
    return (limit, alpha, up_offset) == (math.inf, 1, 0)


def _launch_backward(dgate: Tensor, dup: Tensor, dy: Tensor, gate: Tensor, up: Tensor,
                     activation: str, *numbers: float) -> None:  # fmt: skip
    """Either of the first two may be empty: it is not wanted."""
    given = [t for t in (dy, gate, up, dgate, dup) if t.numel()]
    tasks, *sizes = chunks(*given)
    kernels = _backward if _is_plain(*numbers) else _backward_within_limit
    kernels[activation](
        tasks, 3 * gate.numel(), *(address(t) if t.numel() else 0 for t in (dgate, dup)),
        address(dy), address(gate), address(up), kind(gate), *sizes,
        *(t.stride(0) for t in (dgate, dup, dy, gate, up)), *numbers,
    )  # fmt: skip


def glu_forward(
    gate: Tensor, up: Tensor, activation: str, limit: float, alpha: float, up_offset: float
) -> Tensor:
    """gate, up [rows, cols] -> y [rows, cols]."""
    y = gate.new_empty(gate.shape)
    tasks, *sizes = chunks(gate, up)
    kernels = _forward if _is_plain(limit, alpha, up_offset) else _forward_within_limit
    kernels[activation](
        tasks, 2 * gate.numel(), address(y), address(gate), address(up),
        kind(gate), *sizes, gate.stride(0), up.stride(0), limit, alpha, up_offset,
    )  # fmt: skip
    return y


def glu_backward(
    dy: Tensor, gate: Tensor, up: Tensor,
    activation: str, limit: float, alpha: float, up_offset: float, want_dgate: bool, want_dup: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dy, gate, up [rows, cols] -> dgate, dup [rows, cols], or empty where not wanted."""
    dgate, dup = (gate.new_empty(gate.shape if want else 0) for want in (want_dgate, want_dup))
    _launch_backward(dgate, dup, dy, gate, up, activation, limit, alpha, up_offset)
    return dgate, dup


def glu_packed_forward(
    x: Tensor, activation: str, limit: float, alpha: float, up_offset: float
) -> Tensor:
    """x [rows, 2 cols], the gate first -> y [rows, cols]."""
    return glu_forward(*x.chunk(2, 1), activation, limit, alpha, up_offset)


def glu_packed_backward(
    dy: Tensor, x: Tensor, activation: str, limit: float, alpha: float, up_offset: float
) -> Tensor:
    """dy [rows, cols], x [rows, 2 cols] -> dx [rows, 2 cols]."""
    dx = x.new_empty(x.shape)
    _launch_backward(*dx.chunk(2, 1), dy, *x.chunk(2, 1), activation, limit, alpha, up_offset)
    return dx
