"""Gated linear units on the GPU: one program a block of elements."""

import math

import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._activations import activate
from tilewise.kernels.triton._elements import element_block, element_options


@triton.jit
def _clamped(gate, up, limit):
    """NaN stays: it is not beyond the limit."""
    return tl.where(gate > limit, limit, gate), tl.where(
        up > limit, limit, tl.where(up < -limit, -limit, up)
    )


@triton.jit
def _forward_kernel(
    y_ptr, gate_ptr, up_ptr,
    cols, gate_stride, up_stride, limit, alpha, inverse_alpha, up_offset,
    ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr, GRAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = element_block(cols, GRAIN, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)

    if CLAMPED:
        gate, up = _clamped(gate, up, limit)
        value, _ = activate(alpha * gate, ACTIVATION)
        y = value * inverse_alpha * (up + up_offset)
    else:
        value, _ = activate(gate, ACTIVATION)
        y = value * up

    tl.store(y_ptr + row * cols + col, y, mask=mask)


@triton.jit
def _backward_kernel(
    dgate_ptr, dup_ptr, dy_ptr, gate_ptr, up_ptr,
    cols, dgate_stride, dup_stride, dy_stride, gate_stride, up_stride,
    limit, alpha, inverse_alpha, up_offset,
    ACTIVATION: tl.constexpr, WANT_DGATE: tl.constexpr, WANT_DUP: tl.constexpr,
    CLAMPED: tl.constexpr, GRAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = element_block(cols, GRAIN, BLOCK)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)

    if CLAMPED:
        gate_in, up_in = _clamped(gate, up, limit)
        value, slope = activate(alpha * gate_in, ACTIVATION)
        dgate = tl.where(gate > limit, 0.0, dy * (up_in + up_offset) * slope)
        dup = tl.where(tl.abs(up) > limit, 0.0, dy * (value * inverse_alpha))
    else:
        value, slope = activate(gate, ACTIVATION)
        dgate = dy * up * slope
        dup = dy * value

    if WANT_DGATE:
        tl.store(dgate_ptr + row * dgate_stride + col, dgate, mask=mask)
    if WANT_DUP:
        tl.store(dup_ptr + row * dup_stride + col, dup, mask=mask)


def _is_clamped(limit: float, alpha: float, up_offset: float) -> bool:
    return (limit, alpha, up_offset) != (math.inf, 1, 0)


def _launch_backward(
    dgate: Tensor | None, dup: Tensor | None, dy: Tensor, gate: Tensor, up: Tensor,
    activation: str, limit: float, alpha: float, up_offset: float,
) -> None:  # fmt: skip
    """Of the first two, None is not wanted."""
    outs = [gate if t is None else t for t in (dgate, dup)]
    grid, sizes, options = element_options(*outs, dy, gate, up)
    _backward_kernel[grid](
        *outs, dy, gate, up, *sizes, limit, alpha, 1 / alpha, up_offset,
        ACTIVATION=activation, WANT_DGATE=dgate is not None, WANT_DUP=dup is not None,
        CLAMPED=_is_clamped(limit, alpha, up_offset), **options,
    )  # fmt: skip


def glu_forward(
    gate: Tensor, up: Tensor, activation: str, limit: float, alpha: float, up_offset: float
) -> Tensor:
    """gate, up [rows, cols] -> y [rows, cols]."""
    y = gate.new_empty(gate.shape)
    grid, sizes, options = element_options(gate, up)
    _forward_kernel[grid](
        y, gate, up, *sizes, limit, alpha, 1 / alpha, up_offset,
        ACTIVATION=activation, CLAMPED=_is_clamped(limit, alpha, up_offset), **options,
    )  # fmt: skip
    return y


def glu_backward(
    dy: Tensor, gate: Tensor, up: Tensor,
    activation: str, limit: float, alpha: float, up_offset: float, want_dgate: bool, want_dup: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dy, gate, up [rows, cols] -> dgate, dup [rows, cols], or empty where not wanted."""
    dgate, dup = (gate.new_empty(gate.shape) if want else None for want in (want_dgate, want_dup))
    _launch_backward(dgate, dup, dy, gate, up, activation, limit, alpha, up_offset)
    none = gate.new_empty(0)
    return none if dgate is None else dgate, none if dup is None else dup


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
