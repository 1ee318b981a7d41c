"""RMSNorm on the GPU: one program per row, held in registers, or in blocks where it is wide."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._shared import MAX_PARTS, WIDE_ROW, WIDEST_BLOCK, row_options
from tilewise.kernels.triton._shared import SEARCH_SPACE as SEARCH_SPACE


@triton.jit
def _forward_kernel(
    y_ptr, rstd_ptr, x_ptr, weight_ptr,
    cols, x_stride, eps,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < cols
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)

    rstd = tl.rsqrt(tl.sum(x * x) / cols + eps)
    y = x * rstd
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)

    tl.store(rstd_ptr + row, rstd)
    tl.store(y_ptr + row * cols + col, y, mask=mask)


@triton.jit
def _backward_kernel(
    dx_ptr, dweight_parts_ptr, dy_ptr, x_ptr, weight_ptr, rstd_ptr,
    rows, cols, dy_stride, x_stride,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # dx = rstd * (g - xhat * mean(g * xhat)), with g = dy * weight and xhat = x * rstd
    part = tl.cast(tl.program_id(0), tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < cols
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)

    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)

        xhat = x * rstd
        dweight += dy * xhat
        g = dy
        if HAS_WEIGHT:
            g = dy * weight
        dx = rstd * (g - xhat * (tl.sum(g * xhat) / cols))
        tl.store(dx_ptr + row * cols + col, dx, mask=mask)

    if HAS_WEIGHT:
        tl.store(dweight_parts_ptr + part * cols + col, dweight, mask=mask)


@triton.jit
def _forward_wide_kernel(
    y_ptr, rstd_ptr, x_ptr, weight_ptr,
    cols, x_stride, eps,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    square_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_stride + col, mask=col < cols, other=0.0).to(tl.float32)
        square_sum += x * x
    rstd = tl.rsqrt(tl.sum(square_sum) / cols + eps)
    tl.store(rstd_ptr + row, rstd)

    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < cols
        y = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * cols + col, y, mask=mask)


@triton.jit
def _backward_wide_kernel(
    dx_ptr, dy_ptr, x_ptr, weight_ptr, rstd_ptr,
    cols, dy_stride, x_stride,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    rstd = tl.load(rstd_ptr + row)
    dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < cols
        g = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
        dot += g * x * rstd
    mean = tl.sum(dot) / cols

    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < cols
        g = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * cols + col, rstd * (g - x * rstd * mean), mask=mask)


@triton.jit
def _dweight_wide_kernel(
    dweight_parts_ptr, dy_ptr, x_ptr, rstd_ptr,
    rows, cols, dy_stride, x_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.cast(tl.program_id(0), tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < cols
    dweight = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
        dweight += dy * (x * tl.load(rstd_ptr + row))
    tl.store(dweight_parts_ptr + part * cols + col, dweight, mask=mask)


def rms_norm_forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x [rows, cols], weight [cols] -> y [rows, cols], rstd [rows] fp32."""
    rows, cols = x.shape
    y = x.new_empty(rows, cols)
    rstd = x.new_empty(rows, dtype=torch.float32)
    wide = cols > WIDEST_BLOCK
    kernel, options = (
        (_forward_wide_kernel, WIDE_ROW) if wide else (_forward_kernel, row_options(cols))
    )
    kernel[(rows,)](
        y, rstd, x, x if weight is None else weight, cols, x.stride(0), eps,
        HAS_WEIGHT=weight is not None, **options,
    )  # fmt: skip
    return y, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """dy, x [rows, cols], weight [cols], rstd [rows] -> dx [rows, cols], dweight [cols or 0]."""
    rows, cols = x.shape
    dx = x.new_empty(rows, cols)
    programs = min(rows, MAX_PARTS)
    parts = x.new_empty(0 if weight is None else programs, cols, dtype=torch.float32)
    has_weight = weight is not None
    given = x if weight is None else weight
    strides = dy.stride(0), x.stride(0)
    if cols <= WIDEST_BLOCK:
        _backward_kernel[(programs,)](
            dx, parts, dy, x, given, rstd, rows, cols, *strides,
            HAS_WEIGHT=has_weight, **row_options(cols),
        )  # fmt: skip
    else:
        _backward_wide_kernel[(rows,)](
            dx, dy, x, given, rstd, cols, *strides, HAS_WEIGHT=has_weight, **WIDE_ROW
        )
        if has_weight:
            blocks = triton.cdiv(cols, WIDE_ROW["BLOCK"])
            _dweight_wide_kernel[(programs, blocks)](
                parts, dy, x, rstd, rows, cols, *strides, **WIDE_ROW
            )
    return dx, x.new_empty(0) if weight is None else parts.sum(0).to(weight.dtype)
