"""Gated linear units on the CPU: chunks of the elements in parallel, two reads and one write."""

import math

from torch import Tensor

from tilewise.kernels.numba._activations import backward_kernels, forward_kernels
from tilewise.kernels.numba._elements import chunks
from tilewise.kernels.numba._lanes import where
from tilewise.kernels.numba._simd import address, kind, offset, pointer, real
from tilewise.kernels.numba._stream import finish_writes, loop_of, streamed

# The limit costs a quarter of the time of an element, so there are kernels without it.


def _gated(activation):
    return lambda gate, up, *numbers: (activation(gate) * up,)


def _limited(x, limit):
    return where(x > limit, limit, x)


def _gated_within_limit(activation):
    def gated(gate, up, limit, alpha, inverse, up_offset):
        v = where(up < -limit, -limit, _limited(up, limit))
        return (activation(alpha * _limited(gate, limit)) * inverse * (v + up_offset),)

    return gated


def _slopes(activation):
    def slopes(dy, gate, up, *numbers):
        value, slope = activation(gate)
        return dy * up * slope, dy * value

    return slopes


def _slopes_within_limit(activation):
    def slopes(dy, gate, up, limit, alpha, inverse, up_offset):
        v = where(up < -limit, -limit, _limited(up, limit))
        value, slope = activation(alpha * _limited(gate, limit))
        dgate, dup = dy * (v + up_offset) * slope, dy * value * inverse
        return where(gate > limit, 0.0, dgate), where(abs(up) > limit, 0.0, dup)

    return slopes


def _forward_chunk(gated):
    loop = loop_of(gated)

    def chunk(
        task, y_at, gate_at, up_at, kind, rows, cols, row_step, col_step, gate_stride, up_stride,
        limit, alpha, up_offset, past_caches,
    ):  # fmt: skip
        numbers = real(kind, limit), real(kind, alpha), real(kind, 1 / alpha), real(kind, up_offset)
        across = (cols + col_step - 1) // col_step
        row, col = task // across * row_step, task % across * col_step
        width = min(cols - col, col_step)
        for i in range(row, min(row + row_step, rows)):
            gate = offset(pointer(gate_at, kind), i * gate_stride + col)
            up = offset(pointer(up_at, kind), i * up_stride + col)
            y = offset(pointer(y_at, kind), i * cols + col)
            loop((y,), (gate, up), numbers, width, past_caches)
        if past_caches:
            finish_writes()

    return chunk


def _backward_chunk(slopes):
    loop = loop_of(slopes)

    def chunk(
        task, dgate_at, dup_at, dy_at, gate_at, up_at, kind, dgate_kind, dup_kind,
        rows, cols, row_step, col_step, dgate_stride, dup_stride, dy_stride, gate_stride, up_stride,
        limit, alpha, up_offset, past_caches,
    ):  # fmt: skip
        numbers = real(kind, limit), real(kind, alpha), real(kind, 1 / alpha), real(kind, up_offset)
        across = (cols + col_step - 1) // col_step
        row, col = task // across * row_step, task % across * col_step
        width = min(cols - col, col_step)
        for i in range(row, min(row + row_step, rows)):
            dy = offset(pointer(dy_at, kind), i * dy_stride + col)
            gate = offset(pointer(gate_at, kind), i * gate_stride + col)
            up = offset(pointer(up_at, kind), i * up_stride + col)
            dgate = offset(pointer(dgate_at, dgate_kind), i * dgate_stride + col)
            dup = offset(pointer(dup_at, dup_kind), i * dup_stride + col)
            loop((dgate, dup), (dy, gate, up), numbers, width, past_caches)
        if past_caches:
            finish_writes()

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
    outs = [t for t in (dgate, dup) if t.numel()]
    tasks, *sizes = chunks(dy, gate, up, *outs)
    kernels = _backward if _is_plain(*numbers) else _backward_within_limit
    kernels[activation](
        tasks, 3 * gate.numel(), *map(address, (dgate, dup, dy, gate, up)), kind(gate),
        *(kind(t) if t.numel() else None for t in (dgate, dup)), *sizes,
        *(t.stride(0) for t in (dgate, dup, dy, gate, up)), *numbers, streamed(*outs),
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
        kind(gate), *sizes, gate.stride(0), up.stride(0), limit, alpha, up_offset, streamed(y),
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
