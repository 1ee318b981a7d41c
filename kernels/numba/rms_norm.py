"""RMSNorm on the CPU: parts of the rows in parallel, each row read twice (once more from L1)."""

import torch
from torch import Tensor

from tilewise.kernels.numba._parallel import Kernel
from tilewise.kernels.numba._shared import partial_sums, parts_for
from tilewise.kernels.numba._simd import (
    address,
    kind,
    load,
    offset,
    pointer,
    real,
    reciprocal_root,
    store,
)


@Kernel
def _forward(
    part, y_at, rstd_at, x_at, weight_at,
    kind, wide, weight_kind, rows, cols, x_stride, parts, eps,
):  # fmt: skip
    rstd, weight = pointer(rstd_at, wide), pointer(weight_at, weight_kind)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        x = offset(pointer(x_at, kind), i * x_stride)
        y = offset(pointer(y_at, kind), i * cols)

        square_sum = real(kind, 0)
        for j in range(cols):
            v = load(x, j)
            square_sum += v * v
        r = reciprocal_root(square_sum / real(kind, cols) + real(kind, eps))
        store(rstd, i, r)

        if weight_at:
            for j in range(cols):
                store(y, j, load(x, j) * r * real(kind, load(weight, j)))
        else:
            for j in range(cols):
                store(y, j, load(x, j) * r)


@Kernel
def _backward(
    part, dx_at, dweight_at, dy_at, x_at, weight_at, rstd_at,
    kind, wide, weight_kind, rows, cols, dy_stride, x_stride, sum_stride, parts,
):  # fmt: skip
    # dx = rstd * (g - xhat * mean(g * xhat)), with g = dy * weight and xhat = x * rstd
    rstd, weight = pointer(rstd_at, wide), pointer(weight_at, weight_kind)
    dweight = offset(pointer(dweight_at, wide), part * sum_stride)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        x = offset(pointer(x_at, kind), i * x_stride)
        dy = offset(pointer(dy_at, kind), i * dy_stride)
        dx = offset(pointer(dx_at, kind), i * cols)
        r = load(rstd, i)

        dot = real(kind, 0)
        if weight_at:
            for j in range(cols):
                g, xhat = load(dy, j), load(x, j) * r
                dot += g * real(kind, load(weight, j)) * xhat
                store(dweight, j, load(dweight, j) + g * xhat)
        else:
            for j in range(cols):
                dot += load(dy, j) * load(x, j) * r

        mean = dot / real(kind, cols)
        if weight_at:
            for j in range(cols):
                g = load(dy, j) * real(kind, load(weight, j))
                store(dx, j, r * (g - load(x, j) * r * mean))
        else:
            for j in range(cols):
                store(dx, j, r * (load(dy, j) - load(x, j) * r * mean))


def rms_norm_forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x [rows, cols], weight [cols] -> y [rows, cols], rstd [rows] fp32, or fp64 for fp64 x."""
    rows, cols = x.shape
    y = x.new_empty(rows, cols)
    rstd = x.new_empty(rows, dtype=torch.promote_types(x.dtype, torch.float32))
    parts = parts_for(rows)
    _forward(
        parts, x.numel(), address(y), address(rstd), address(x), address(weight),
        kind(x), kind(rstd), kind(x if weight is None else weight),
        rows, cols, x.stride(0), parts, eps,
    )  # fmt: skip
    return y, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """dy, x [rows, cols], weight [cols], rstd [rows] -> dx [rows, cols], dweight [cols or 0]."""
    rows, cols = x.shape
    dx = x.new_empty(rows, cols)
    parts = parts_for(rows)
    sums = partial_sums(x, parts, rstd.dtype) if weight is not None else rstd.new_empty(0, 0)
    _backward(
        parts, 2 * x.numel(), address(dx), address(sums),
        address(dy), address(x), address(weight), address(rstd),
        kind(x), kind(rstd), kind(x if weight is None else weight),
        rows, cols, dy.stride(0), x.stride(0), sums.shape[1], parts,
    )  # fmt: skip
    if weight is None:
        return dx, x.new_empty(0)
    return dx, sums.sum(0)[:cols].to(weight.dtype)
