"""The norms of `_norm_tile` where a row is wider than a program can hold: in blocks, as often as
the formula needs them, out of the L2 cache after the first time."""

import triton
import triton.language as tl

from tilewise.kernels.triton._dropout import dropped
from tilewise.kernels.triton._norm_tile import load_wide, scaled, start_of


@triton.jit(do_not_specialize=["seed", "offset", "threshold"])
def _forward_wide_kernel(
    y_ptr, sum_ptr, mean_ptr, rstd_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr,
    cols, middle, inner, outer_stride, middle_stride, inner_stride, residual_stride,
    eps, weight_offset, seeds_ptr, offsets_ptr, seed, offset, threshold, keep_scale,
    UNIT: tl.constexpr, GRID: tl.constexpr, LLAMA: tl.constexpr, DROPOUT: tl.constexpr,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cols *= UNIT
    row = tl.cast(tl.program_id(0), tl.int64)
    start = start_of(row, middle, inner, outer_stride, middle_stride, inner_stride, UNIT, GRID)
    row_ptr = x_ptr + start
    if residual_ptr is not None:
        for first in range(0, cols, BLOCK):
            col = (first + tl.arange(0, BLOCK))[None, :]
            x = load_wide(row_ptr + col, col < cols)
            if DROPOUT:
                x = dropped(
                    x, row, first, seeds_ptr, offsets_ptr, seed, offset, threshold, keep_scale,
                    SEED_STRIDE, OFFSET_STRIDE, BLOCK,
                )  # fmt: skip
            x += load_wide(residual_ptr + row * (residual_stride * UNIT) + col, col < cols)
            tl.store(sum_ptr + row * cols + col, x, mask=col < cols)
        tl.debug_barrier()  # what is read from here on other threads have written
        row_ptr = sum_ptr + row * cols

    mean, correction = 0.0, 0.0
    total = tl.zeros([1, BLOCK], tl.float32)
    left = tl.zeros([1, BLOCK], tl.float32)
    square_sum = tl.zeros([1, BLOCK], tl.float32)
    if mean_ptr is not None:
        for first in range(0, cols, BLOCK):
            col = (first + tl.arange(0, BLOCK))[None, :]
            total += load_wide(row_ptr + col, col < cols)
        mean = tl.sum(total) / cols
    for first in range(0, cols, BLOCK):
        col = (first + tl.arange(0, BLOCK))[None, :]
        x = load_wide(row_ptr + col, col < cols)
        if mean_ptr is not None:
            x = tl.where(col < cols, x - mean, 0.0)
            left += x
        square_sum += x * x
    if mean_ptr is not None:
        correction = tl.sum(left) / cols  # what rounding took from a large mean
        mean += correction
        tl.store(mean_ptr + row, mean)
    rstd = tl.rsqrt(tl.sum(square_sum) / cols - correction * correction + eps)
    tl.store(rstd_ptr + row, rstd)

    for first in range(0, cols, BLOCK):
        col = (first + tl.arange(0, BLOCK))[None, :]
        x = load_wide(row_ptr + col, col < cols)
        xhat = (x - mean) * rstd
        y = scaled(xhat, y_ptr, weight_ptr, bias_ptr, col, col < cols, weight_offset, LLAMA)
        tl.store(y_ptr + row * cols + col, y, mask=col < cols)


@triton.jit(do_not_specialize=["seed", "offset", "threshold"])
def _backward_wide_kernel(
    dx_ptr, dresidual_ptr, dy_ptr, dsum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr,
    cols, dy_stride, dsum_stride, middle, inner, outer_stride, middle_stride, inner_stride,
    weight_offset, seeds_ptr, offsets_ptr, seed, offset, threshold, keep_scale,
    UNIT: tl.constexpr, GRID: tl.constexpr, DROPOUT: tl.constexpr,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cols *= UNIT
    row = tl.cast(tl.program_id(0), tl.int64)
    start = start_of(row, middle, inner, outer_stride, middle_stride, inner_stride, UNIT, GRID)
    row_ptr = x_ptr + start
    dy_ptr += row * (dy_stride * UNIT)
    mean = 0.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    g_sum = tl.zeros([1, BLOCK], tl.float32)
    dot = tl.zeros([1, BLOCK], tl.float32)
    for first in range(0, cols, BLOCK):
        col = (first + tl.arange(0, BLOCK))[None, :]
        g = load_wide(dy_ptr + col, col < cols)
        if weight_ptr is not None:
            g *= load_wide(weight_ptr + col, col < cols) + weight_offset
        g_sum += g
        dot += g * ((load_wide(row_ptr + col, col < cols) - mean) * rstd)
    dot_mean = tl.sum(dot) / cols
    g_mean = 0.0
    if mean_ptr is not None:
        g_mean = tl.sum(g_sum) / cols

    for first in range(0, cols, BLOCK):
        col = (first + tl.arange(0, BLOCK))[None, :]
        mask = col < cols
        g = load_wide(dy_ptr + col, mask)
        if weight_ptr is not None:
            g *= load_wide(weight_ptr + col, mask) + weight_offset
        xhat = (load_wide(row_ptr + col, mask) - mean) * rstd
        dx = rstd * (g - g_mean - xhat * dot_mean)
        if dsum_ptr is not None:
            dx += load_wide(dsum_ptr + row * (dsum_stride * UNIT) + col, mask)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + row * cols + col, dx, mask=mask)
        if dx_ptr is not None:
            if DROPOUT:
                dx = dropped(
                    dx, row, first, seeds_ptr, offsets_ptr, seed, offset, threshold, keep_scale,
                    SEED_STRIDE, OFFSET_STRIDE, BLOCK,
                )  # fmt: skip
            tl.store(dx_ptr + row * cols + col, dx, mask=mask)


@triton.jit
def _dweight_wide_kernel(
    dweight_parts_ptr, dbias_parts_ptr, dy_ptr, x_ptr, mean_ptr, rstd_ptr,
    rows, cols, dy_stride, middle, inner, outer_stride, middle_stride, inner_stride,
    UNIT: tl.constexpr, GRID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cols *= UNIT
    part = tl.cast(tl.program_id(0), tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < cols
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        dy = load_wide(dy_ptr + row * (dy_stride * UNIT) + col, mask)
        if dweight_parts_ptr is not None:
            start = start_of(
                row, middle, inner, outer_stride, middle_stride, inner_stride, UNIT, GRID
            )
            x = load_wide(x_ptr + start + col, mask)
            if mean_ptr is not None:
                x -= tl.load(mean_ptr + row)
            dweight += dy * (x * tl.load(rstd_ptr + row))
        dbias += dy
    if dweight_parts_ptr is not None:
        tl.store(dweight_parts_ptr + part * cols + col, dweight, mask=mask)
    if dbias_parts_ptr is not None:
        tl.store(dbias_parts_ptr + part * cols + col, dbias, mask=mask)
