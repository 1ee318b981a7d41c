"""GELU on the GPU: one program a block of elements."""

import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._activations import activate
from tilewise.kernels.triton._elements import element_block, element_options

_NAMES = {"none": "gelu", "tanh": "gelu_tanh"}


@triton.jit
def _forward_kernel(
    y_ptr, x_ptr,
    cols, x_stride,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = element_block(cols, BLOCK)
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)

    y, _ = activate(x, ACTIVATION)

    tl.store(y_ptr + row * cols + col, y, mask=mask)


@triton.jit
def _backward_kernel(
    dx_ptr, dy_ptr, x_ptr,
    cols, dy_stride, x_stride,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = element_block(cols, BLOCK)
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)

    _, slope = activate(x, ACTIVATION)

    tl.store(dx_ptr + row * cols + col, dy * slope, mask=mask)


def gelu_forward(x: Tensor, approximate: str) -> Tensor:
    """x [rows, cols] -> y [rows, cols]."""
    y = x.new_empty(x.shape)
    grid, cols, options = element_options(x)
    _forward_kernel[grid](y, x, cols, x.stride(0), ACTIVATION=_NAMES[approximate], **options)
    return y


def gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    """dy, x [rows, cols] -> dx [rows, cols]."""
    dx = x.new_empty(x.shape)
    grid, cols, options = element_options(dy, x)
    _backward_kernel[grid](
        dx, dy, x, cols, dy.stride(0), x.stride(0), ACTIVATION=_NAMES[approximate], **options
    )
    return dx
