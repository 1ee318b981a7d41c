"""LayerNorm on the GPU: one program per row, held in registers, or in blocks where it is wide."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._shared import MAX_PARTS, WIDE_ROW, WIDEST_BLOCK, row_options
from tilewise.kernels.triton._shared import SEARCH_SPACE as SEARCH_SPACE


@triton.jit
def _forward_kernel(
    y_ptr, mean_ptr, rstd_ptr, x_ptr, weight_ptr, bias_ptr,
    cols, x_stride, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < cols
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)

    mean = tl.sum(x) / cols
    mean += tl.sum(tl.where(mask, x - mean, 0.0)) / cols  # what rounding took from a large mean
    centred = tl.where(mask, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred) / cols + eps)
    y = centred * rstd
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + col, mask=mask, other=0.0).to(tl.float32)

    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    tl.store(y_ptr + row * cols + col, y, mask=mask)


@triton.jit
def _backward_kernel(
    dx_ptr, dweight_parts_ptr, dbias_parts_ptr, dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr,
    rows, cols, dy_stride, x_stride,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), with g = dy * weight
    part = tl.cast(tl.program_id(0), tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < cols
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)

    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)

        xhat = (x - mean) * rstd  # beside the row dy, and so g, is 0
        dweight += dy * xhat
        dbias += dy
        g = dy
        if HAS_WEIGHT:
            g = dy * weight
        dx = rstd * (g - tl.sum(g) / cols - xhat * (tl.sum(g * xhat) / cols))
        tl.store(dx_ptr + row * cols + col, dx, mask=mask)

    if HAS_WEIGHT:
        tl.store(dweight_parts_ptr + part * cols + col, dweight, mask=mask)
        tl.store(dbias_parts_ptr + part * cols + col, dbias, mask=mask)


@triton.jit
def _forward_wide_kernel(
    y_ptr, mean_ptr, rstd_ptr, x_ptr, weight_ptr, bias_ptr,
    cols, x_stride, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + row * x_stride + col, mask=col < cols, other=0.0).to(tl.float32)
    mean = tl.sum(total) / cols

    left = tl.zeros([BLOCK], tl.float32)
    square_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < cols
        x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - mean, 0.0)
        left += centred
        square_sum += centred * centred
    correction = tl.sum(left) / cols  # what rounding took from a large mean
    mean += correction
    rstd = tl.rsqrt(tl.sum(square_sum) / cols - correction * correction + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)

    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < cols
        x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
        y = (x - mean) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * cols + col, y, mask=mask)


@triton.jit
def _backward_wide_kernel(
    dx_ptr, dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr,
    cols, dy_stride, x_stride,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    g_sum = tl.zeros([BLOCK], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < cols
        g = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
        g_sum += g
        dot += g * ((x - mean) * rstd)
    g_mean = tl.sum(g_sum) / cols
    dot_mean = tl.sum(dot) / cols

    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < cols
        g = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
        dx = rstd * (g - g_mean - (x - mean) * rstd * dot_mean)
        tl.store(dx_ptr + row * cols + col, dx, mask=mask)


@triton.jit
def _dweight_wide_kernel(
    dweight_parts_ptr, dbias_parts_ptr, dy_ptr, x_ptr, mean_ptr, rstd_ptr,
    rows, cols, dy_stride, x_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.cast(tl.program_id(0), tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < cols
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
        dweight += dy * ((x - tl.load(mean_ptr + row)) * tl.load(rstd_ptr + row))
        dbias += dy
    tl.store(dweight_parts_ptr + part * cols + col, dweight, mask=mask)
    tl.store(dbias_parts_ptr + part * cols + col, dbias, mask=mask)


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, cols], weight, bias [cols] -> y [rows, cols], mean, rstd [rows] fp32."""
    rows, cols = x.shape
    y = x.new_empty(rows, cols)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    kernel, options = (
        (_forward_wide_kernel, WIDE_ROW)
        if cols > WIDEST_BLOCK
        else (_forward_kernel, row_options(cols))
    )
    kernel[(rows,)](
        y, mean, rstd, x, x if weight is None else weight, x if bias is None else bias,
        cols, x.stride(0), eps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **options,
    )  # fmt: skip
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, x [rows, cols], weight [cols], mean, rstd [rows] -> dx, dweight, dbias [cols or 0]."""
    rows, cols = x.shape
    dx = x.new_empty(rows, cols)
    programs, has_weight = min(rows, MAX_PARTS), weight is not None
    parts = [x.new_empty(programs * has_weight, cols, dtype=torch.float32) for _ in range(2)]
    given = x if weight is None else weight
    strides = dy.stride(0), x.stride(0)
    if cols <= WIDEST_BLOCK:
        _backward_kernel[(programs,)](
            dx, *parts, dy, x, given, mean, rstd, rows, cols, *strides,
            HAS_WEIGHT=has_weight, **row_options(cols),
        )  # fmt: skip
    else:
        _backward_wide_kernel[(rows,)](
            dx, dy, x, given, mean, rstd, cols, *strides, HAS_WEIGHT=has_weight, **WIDE_ROW
        )
        if has_weight:
            blocks = triton.cdiv(cols, WIDE_ROW["BLOCK"])
            _dweight_wide_kernel[(programs, blocks)](
                *parts, dy, x, mean, rstd, rows, cols, *strides, **WIDE_ROW
            )
    if weight is None:
        return dx, x.new_empty(0), x.new_empty(0)
    dweight, dbias = (sums.sum(0).to(weight.dtype) for sums in parts)
    return dx, dweight, dbias
