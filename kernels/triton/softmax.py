"""Softmax and its logarithm on the GPU: one program per row, in blocks where the row is wide."""

import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._shared import SEARCH_SPACE as SEARCH_SPACE
from tilewise.kernels.triton._shared import WIDE_ROW, WIDEST_BLOCK, row_options


@triton.jit
def _forward_kernel(
    y_ptr, x_ptr,
    cols, x_stride, scale,
    LOG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < cols
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    x = tl.where(mask, scale * x, float("-inf"))

    x -= tl.max(x)
    e = tl.exp(x)
    total = tl.sum(e)
    y = x - tl.log(total) if LOG else e / total

    tl.store(y_ptr + row * cols + col, y, mask=mask)


@triton.jit
def _forward_wide_kernel(
    y_ptr, x_ptr,
    cols, x_stride, scale,
    LOG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    peak = float("-inf")
    total = 0.0
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < cols
        x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, scale * x, float("-inf"))

        before, peak = peak, tl.maximum(peak, tl.max(x))
        shift = tl.where(peak == float("-inf"), 0.0, peak)  # -inf - -inf would be NaN
        total = total * tl.exp(before - shift) + tl.sum(tl.exp(x - shift))

    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < cols
        x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
        x = scale * x - peak
        y = x - tl.log(total) if LOG else tl.exp(x) / total
        tl.store(y_ptr + row * cols + col, y, mask=mask)


@triton.jit
def _backward_kernel(
    dx_ptr, dy_ptr, y_ptr,
    cols, dy_stride, y_stride, scale,
    LOG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # dx = scale * y * (dy - sum(dy * y)), or scale * (dy - exp(y) * sum(dy)) for the logarithm
    row = tl.cast(tl.program_id(0), tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < cols
    dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row * y_stride + col, mask=mask, other=0.0).to(tl.float32)

    dx = scale * (dy - tl.exp(y) * tl.sum(dy)) if LOG else scale * y * (dy - tl.sum(dy * y))

    tl.store(dx_ptr + row * cols + col, dx, mask=mask)


@triton.jit
def _backward_wide_kernel(
    dx_ptr, dy_ptr, y_ptr,
    cols, dy_stride, y_stride, scale,
    LOG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < cols
        dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
        if LOG:
            sums += dy
        else:
            y = tl.load(y_ptr + row * y_stride + col, mask=mask, other=0.0).to(tl.float32)
            sums += dy * y
    total = tl.sum(sums)

    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < cols
        dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * y_stride + col, mask=mask, other=0.0).to(tl.float32)
        dx = scale * (dy - tl.exp(y) * total) if LOG else scale * y * (dy - total)
        tl.store(dx_ptr + row * cols + col, dx, mask=mask)


def softmax_forward(x: Tensor, scale: float, log: bool) -> Tensor:
    """x [rows, cols] -> y [rows, cols], probabilities or their logarithms."""
    rows, cols = x.shape
    y = x.new_empty(rows, cols)
    kernel, options = (
        (_forward_wide_kernel, WIDE_ROW)
        if cols > WIDEST_BLOCK
        else (_forward_kernel, row_options(cols))
    )
    kernel[(rows,)](y, x, cols, x.stride(0), scale, LOG=log, **options)
    return y


def softmax_backward(dy: Tensor, y: Tensor, scale: float, log: bool) -> Tensor:
    """dy, y [rows, cols] -> dx [rows, cols]."""
    rows, cols = y.shape
    dx = y.new_empty(rows, cols)
    kernel, options = (
        (_backward_wide_kernel, WIDE_ROW)
        if cols > WIDEST_BLOCK
        else (_backward_kernel, row_options(cols))
    )
    kernel[(rows,)](dx, dy, y, cols, dy.stride(0), y.stride(0), scale, LOG=log, **options)
    return dx
