"""RMSNorm on the GPU: one program per row, the row held in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._shared import MAX_PARTS, row_options


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


def rms_norm_forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x [rows, cols], weight [cols] -> y [rows, cols], rstd [rows] fp32."""
    rows, cols = x.shape
    y = x.new_empty(rows, cols)
    rstd = x.new_empty(rows, dtype=torch.float32)
    _forward_kernel[(rows,)](
        y, rstd, x, x if weight is None else weight, cols, x.stride(0), eps,
        HAS_WEIGHT=weight is not None, **row_options(cols),
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
    _backward_kernel[(programs,)](
        dx, parts, dy, x, x if weight is None else weight, rstd,
        rows, cols, dy.stride(0), x.stride(0),
        HAS_WEIGHT=weight is not None, **row_options(cols),
    )  # fmt: skip
    return dx, x.new_empty(0) if weight is None else parts.sum(0).to(weight.dtype)
