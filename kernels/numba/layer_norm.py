"""LayerNorm on the CPU: parts of the rows in parallel, each row read three times (two from L1)."""

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
    part, y_at, mean_at, rstd_at, x_at, weight_at, bias_at,
    kind, wide, weight_kind, rows, cols, x_stride, parts, eps,
):  # fmt: skip
    means, rstds = pointer(mean_at, wide), pointer(rstd_at, wide)
    weight, bias = pointer(weight_at, weight_kind), pointer(bias_at, weight_kind)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        x = offset(pointer(x_at, kind), i * x_stride)
        y = offset(pointer(y_at, kind), i * cols)

        total = real(kind, 0)
        for j in range(cols):
            total += load(x, j)
        mean = total / real(kind, cols)
        left, square_sum = real(kind, 0), real(kind, 0)
        for j in range(cols):
            centred = load(x, j) - mean
            left += centred
            square_sum += centred * centred
        left /= real(kind, cols)  # by what rounding has moved a large mean
        mean += left
        variance = square_sum / real(kind, cols) - left * left
        rstd = reciprocal_root(variance + real(kind, eps))
        store(means, i, mean)
        store(rstds, i, rstd)

        if bias_at:
            for j in range(cols):
                xhat = (load(x, j) - mean) * rstd
                store(y, j, xhat * real(kind, load(weight, j)) + real(kind, load(bias, j)))
        elif weight_at:
            for j in range(cols):
                store(y, j, (load(x, j) - mean) * rstd * real(kind, load(weight, j)))
        else:
            for j in range(cols):
                store(y, j, (load(x, j) - mean) * rstd)


@Kernel
def _backward(
    part, dx_at, dweight_at, dbias_at, dy_at, x_at, weight_at, mean_at, rstd_at,
    kind, wide, weight_kind, rows, cols, dy_stride, x_stride, sum_stride, parts,
):  # fmt: skip
    # dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), with g = dy * weight
    means, rstds = pointer(mean_at, wide), pointer(rstd_at, wide)
    weight = pointer(weight_at, weight_kind)
    dweight = offset(pointer(dweight_at, wide), part * sum_stride)
    dbias = offset(pointer(dbias_at, wide), part * sum_stride)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        x = offset(pointer(x_at, kind), i * x_stride)
        dy = offset(pointer(dy_at, kind), i * dy_stride)
        dx = offset(pointer(dx_at, kind), i * cols)
        mean, rstd = load(means, i), load(rstds, i)

        g_sum, dot = real(kind, 0), real(kind, 0)
        if weight_at:
            for j in range(cols):
                d, xhat = load(dy, j), (load(x, j) - mean) * rstd
                g = d * real(kind, load(weight, j))
                g_sum += g
                dot += g * xhat
                store(dweight, j, load(dweight, j) + d * xhat)
                store(dbias, j, load(dbias, j) + d)
        else:
            for j in range(cols):
                g_sum += load(dy, j)
                dot += load(dy, j) * ((load(x, j) - mean) * rstd)

        g_mean, dot_mean = g_sum / real(kind, cols), dot / real(kind, cols)
        if weight_at:
            for j in range(cols):
                g, xhat = load(dy, j) * real(kind, load(weight, j)), (load(x, j) - mean) * rstd
                store(dx, j, rstd * (g - g_mean - xhat * dot_mean))
        else:
            for j in range(cols):
                xhat = (load(x, j) - mean) * rstd
                store(dx, j, rstd * (load(dy, j) - g_mean - xhat * dot_mean))


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, cols], weight, bias [cols] -> y [rows, cols], mean, rstd [rows] fp32 or fp64."""
    rows, cols = x.shape
    y = x.new_empty(rows, cols)
    mean = x.new_empty(rows, dtype=torch.promote_types(x.dtype, torch.float32))
    rstd = torch.empty_like(mean)
    parts = parts_for(rows)
    _forward(
        parts, x.numel(), address(y), address(mean), address(rstd),
        address(x), address(weight), address(bias),
        kind(x), kind(rstd), kind(x if weight is None else weight),
        rows, cols, x.stride(0), parts, eps,
    )  # fmt: skip
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, x [rows, cols], weight [cols], mean, rstd [rows] -> dx, dweight, dbias [cols or 0]."""
    rows, cols = x.shape
    dx = x.new_empty(rows, cols)
    parts = parts_for(rows)
    with_sums = parts if weight is not None else 0
    dweight, dbias = (partial_sums(x, with_sums, rstd.dtype) for _ in range(2))
    _backward(
        parts, 2 * x.numel(), address(dx), address(dweight), address(dbias),
        address(dy), address(x), address(weight), address(mean), address(rstd),
        kind(x), kind(rstd), kind(x if weight is None else weight),
        rows, cols, dy.stride(0), x.stride(0), dweight.shape[1], parts,
    )  # fmt: skip
    if weight is None:
        return dx, x.new_empty(0), x.new_empty(0)
    dweight, dbias = (sums.sum(0)[:cols].to(weight.dtype) for sums in (dweight, dbias))
    return dx, dweight, dbias
