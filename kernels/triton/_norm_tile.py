"""Both norms, with and without a sum before: tiles of rows that a program holds in registers.

Triton knows of an integer only whether 16 divides it, so sizes and strides are passed in units of
UNIT elements, which is 8 where 8 divides them all: rows of 1000 are then read 16 bytes at a time.
"""

import triton
import triton.language as tl

from tilewise.kernels.triton._dropout import dropped

# From this width on there is no room for the weight beside a row, its gradient and two sums: with
# dropout or dsum 2 to 8 local accesses (sm_80 and sm_90), none where it is loaded for each row.
FULL = tl.constexpr(8192)


@triton.jit
def start_of(
    row, middle, inner, outer_stride, middle_stride, inner_stride,
    UNIT: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    """Where rows begin, in elements, by what `grid_of` says."""
    if GRID:
        start = row // (middle * inner) * (outer_stride * UNIT)
        start += row // inner % middle * (middle_stride * UNIT)
        return start + row % inner * (inner_stride * UNIT)
    else:
        return row * (outer_stride * UNIT)


@triton.jit
def load_wide(ptr, mask):
    """What is there, in fp32; 0 beside the row."""
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """`x` as a store in `dtype` would round it."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def scaled(
    xhat, y_ptr, weight_ptr, bias_ptr, col, mask, weight_offset, LLAMA: tl.constexpr
):  # fmt: skip
    """xhat * (weight_offset + weight) + bias, with LLAMA rounded at each step."""
    y = xhat
    if LLAMA:
        y = rounded(y, y_ptr.dtype.element_ty)
    if weight_ptr is not None:
        scale = load_wide(weight_ptr + col, mask) + weight_offset
        if LLAMA:
            y = rounded(
                y * rounded(scale, weight_ptr.dtype.element_ty), weight_ptr.dtype.element_ty
            )
        else:
            y *= scale
    if bias_ptr is not None:
        y += load_wide(bias_ptr + col, mask)
        if LLAMA:
            y = rounded(y, bias_ptr.dtype.element_ty)
    return y


# --- Rows in one block.


@triton.jit(do_not_specialize=["seed", "offset", "threshold"])
def _forward_kernel(
    y_ptr, sum_ptr, mean_ptr, rstd_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr,
    rows, cols, middle, inner, outer_stride, middle_stride, inner_stride, residual_stride,
    eps, weight_offset, seeds_ptr, offsets_ptr, seed, offset, threshold, keep_scale,
    UNIT: tl.constexpr, GRID: tl.constexpr, LLAMA: tl.constexpr, DROPOUT: tl.constexpr,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cols *= UNIT
    row = (tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (col < cols)
    start = start_of(row, middle, inner, outer_stride, middle_stride, inner_stride, UNIT, GRID)
    x = load_wide(x_ptr + start + col, mask)
    if residual_ptr is not None:
        if DROPOUT:
            x = dropped(
                x, row, 0, seeds_ptr, offsets_ptr, seed, offset, threshold, keep_scale,
                SEED_STRIDE, OFFSET_STRIDE, BLOCK, row < rows,
            )  # fmt: skip
        x += load_wide(residual_ptr + row * (residual_stride * UNIT) + col, mask)
        tl.store(sum_ptr + row * cols + col, x, mask=mask)
        x = rounded(x, sum_ptr.dtype.element_ty)

    if mean_ptr is not None:
        mean = tl.sum(x, 1)[:, None] / cols
        # what rounding took from a large mean
        mean += tl.sum(tl.where(col < cols, x - mean, 0.0), 1)[:, None] / cols
        tl.store(mean_ptr + row, mean, mask=row < rows)
        x = tl.where(col < cols, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1)[:, None] / cols + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)

    y = scaled(x * rstd, y_ptr, weight_ptr, bias_ptr, col, col < cols, weight_offset, LLAMA)
    tl.store(y_ptr + row * cols + col, y, mask=mask)


@triton.jit(do_not_specialize=["seed", "offset", "threshold"])
def _backward_kernel(
    dx_ptr, dresidual_ptr, dweight_parts_ptr, dbias_parts_ptr,
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr,
    rows, cols, dy_stride, dsum_stride,
    middle, inner, outer_stride, middle_stride, inner_stride,
    weight_offset, seeds_ptr, offsets_ptr, seed, offset, threshold, keep_scale,
    UNIT: tl.constexpr, GRID: tl.constexpr, DROPOUT: tl.constexpr,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum, with g = dy * weight
    cols *= UNIT
    part = tl.cast(tl.program_id(0), tl.int64)
    col = tl.arange(0, BLOCK)[None, :]
    in_row = col < cols
    if (weight_ptr is not None) and (BLOCK < FULL):
        weight = load_wide(weight_ptr + col, in_row) + weight_offset
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)

    for i in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tl.cast(i, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        mask = (row < rows) & in_row
        start = start_of(row, middle, inner, outer_stride, middle_stride, inner_stride, UNIT, GRID)
        x = load_wide(x_ptr + start + col, mask)
        dy = load_wide(dy_ptr + row * (dy_stride * UNIT) + col, mask)
        if mean_ptr is not None:
            x -= tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)

        xhat = x * rstd  # beside the row dy, and so g, is 0
        if dweight_parts_ptr is not None:
            dweight += dy * xhat
        if dbias_parts_ptr is not None:
            dbias += dy
        if (dx_ptr is not None) or (dresidual_ptr is not None):
            g = dy
            if weight_ptr is not None:
                if BLOCK < FULL:
                    g = dy * weight
                else:
                    g = dy * (load_wide(weight_ptr + col, in_row) + weight_offset)
            dx = g - xhat * (tl.sum(g * xhat, 1)[:, None] / cols)
            if mean_ptr is not None:
                dx -= tl.sum(g, 1)[:, None] / cols
            dx *= rstd
            if dsum_ptr is not None:
                dx += load_wide(dsum_ptr + row * (dsum_stride * UNIT) + col, mask)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + row * cols + col, dx, mask=mask)
            if dx_ptr is not None:
                if DROPOUT:
                    dx = dropped(
                        dx, row, 0, seeds_ptr, offsets_ptr, seed, offset, threshold, keep_scale,
                        SEED_STRIDE, OFFSET_STRIDE, BLOCK, row < rows,
                    )  # fmt: skip
                tl.store(dx_ptr + row * cols + col, dx, mask=mask)

    place = part * cols + col
    if dweight_parts_ptr is not None:
        tl.store(dweight_parts_ptr + place, tl.sum(dweight, 0)[None, :], mask=in_row)
    if dbias_parts_ptr is not None:
        tl.store(dbias_parts_ptr + place, tl.sum(dbias, 0)[None, :], mask=in_row)
