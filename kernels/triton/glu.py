"""Gated linear units on the GPU: one program a block of elements."""

import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._activations import activate
from tilewise.kernels.triton._elements import element_block, element_options


@triton.jit
def _forward_kernel(
    y_ptr, gate_ptr, up_ptr,
    cols, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = element_block(cols, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)

    value, _ = activate(gate, ACTIVATION)

    tl.store(y_ptr + row * cols + col, value * up, mask=mask)


@triton.jit
def _backward_kernel(
    dgate_ptr, dup_ptr, dy_ptr, gate_ptr, up_ptr,
    cols, dy_stride, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = element_block(cols, BLOCK)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)

    value, slope = activate(gate, ACTIVATION)

    tl.store(dgate_ptr + row * cols + col, dy * up * slope, mask=mask)
    tl.store(dup_ptr + row * cols + col, dy * value, mask=mask)


def glu_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate, up [rows, cols] -> y [rows, cols]."""
    y = gate.new_empty(gate.shape)
    grid, cols, options = element_options(gate, up)
    _forward_kernel[grid](
        y, gate, up, cols, gate.stride(0), up.stride(0), ACTIVATION=activation, **options
    )
    return y


def glu_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dy, gate, up [rows, cols] -> dgate, dup [rows, cols]."""
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    grid, cols, options = element_options(dy, gate, up)
    _backward_kernel[grid](
        dgate, dup, dy, gate, up,
        cols, dy.stride(0), gate.stride(0), up.stride(0), ACTIVATION=activation, **options,
    )  # fmt: skip
    return dgate, dup
