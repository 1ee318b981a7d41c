"""Both norms, with and without a sum before: parts of the rows in parallel, each row read again
from L1. A kernel is compiled for what it is given: what an argument that is None stands for is left
out.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tilewise.kernels.numba._dropout import SCALE, mark_kept
from tilewise.kernels.numba._norm_rows import (
    add_gradients,
    add_row,
    row_statistics,
    write_gradient,
    write_row,
)
from tilewise.kernels.numba._parallel import SERIAL_BELOW, Kernel, callee
from tilewise.kernels.numba._shared import (
    partial_sums,
    parts_for,
    sum_parts_for,
    summed,
    wide_dtype,
)
from tilewise.kernels.numba._simd import (
    address,
    kind,
    load,
    offset,
    pointer,
    real,
    store,
)
from tilewise.kernels.numba._stream import CHUNK, finish_writes, scratch, streamed

CONTIGUOUS = torch.contiguous_format
FEW = 8  # rows, of which a sum is as near as sums of parts


# --- Pieces of a row.


@callee
def _start(i, grid):
    """Where row `i` begins, by what `_grid_of` says."""
    middle, inner, outer_stride, middle_stride, inner_stride = grid
    if middle * inner == 1:
        return i * outer_stride
    outer = i // (middle * inner) * outer_stride
    return outer + i // inner % middle * middle_stride + i % inner * inner_stride


@callee
def _add_row(total, line, x, residual, cols, dropout, row, past_caches):
    """total = line = dropout(x) + residual, where `line` is not None in the caches."""
    if dropout is None:
        add_row((total, line), (x, residual, None), (), cols, past_caches)
    else:
        factors = scratch(total)
        for start in range(0, cols, CHUNK):
            count = min(CHUNK, cols - start)
            mark_kept(factors, start, count, row, dropout, dropout[SCALE])
            branch, stream = offset(x, start), offset(residual, start)
            outs = offset(total, start), offset(line, start)
            add_row(outs, (branch, stream, factors), (), count, past_caches)


@callee
def _sum_gradients(dweight, dbias, dy, x, weight, mean, rstd, cols, weight_offset):
    """Add a row to the gradients of weight and bias; the means of g and g * xhat."""
    ins, numbers = (dy, x, weight, dweight, dbias), (mean, rstd, real(dy, weight_offset))
    g_sum, dot = add_gradients((dweight, dbias), ins, numbers, cols)
    return g_sum / real(dy, cols), dot / real(dy, cols)


@callee
def _write_gradient(
    dx, dresidual, dy, dsum, x, weight, mean, rstd, g_mean, dot_mean,
    cols, weight_offset, dropout, row, past_caches,
):  # fmt: skip
    numbers = mean, rstd, g_mean, dot_mean, real(dy, weight_offset)
    if dropout is None:
        ins = dy, x, dsum, weight, None
        write_gradient((dresidual, dx), ins, numbers, cols, past_caches)
    else:
        factors = scratch(dy)
        for start in range(0, cols, CHUNK):
            count = min(CHUNK, cols - start)
            mark_kept(factors, start, count, row, dropout, dropout[SCALE])
            outs = offset(dresidual, start), offset(dx, start)
            ins = (
                offset(dy, start), offset(x, start), offset(dsum, start), offset(weight, start),
                factors,
            )  # fmt: skip
            write_gradient(outs, ins, numbers, count, past_caches)


# --- The kernels.


@Kernel
def _forward(
    part, y_at, sum_at, line_at, mean_at, rstd_at, x_at, residual_at, weight_at, bias_at, kinds,
    rows, cols, grid, residual_stride, parts, eps, weight_offset, llama, dropout, past_caches,
):  # fmt: skip
    kind, sum_kind, line_kind, mean_kind, wide, weight_kind, bias_kind = kinds
    means, rstds = pointer(mean_at, mean_kind), pointer(rstd_at, wide)
    weight, bias = pointer(weight_at, weight_kind), pointer(bias_at, bias_kind)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        x = offset(pointer(x_at, kind), _start(i, grid))
        y = offset(pointer(y_at, kind), i * cols)
        added = real(y, weight_offset)
        if residual_at is None:
            mean, rstd = row_statistics(x, cols, eps, means)
            write_row(y, x, weight, bias, mean, rstd, added, cols, llama, past_caches)
        else:
            residual = offset(pointer(residual_at, sum_kind), i * residual_stride)
            total = offset(pointer(sum_at, sum_kind), i * cols)
            line = offset(pointer(line_at, line_kind), part * cols)
            _add_row(total, line, x, residual, cols, dropout, i, past_caches)
            row = total if line_at is None else line
            mean, rstd = row_statistics(row, cols, eps, means)
            write_row(y, row, weight, bias, mean, rstd, added, cols, llama, past_caches)
        if mean_at is not None:
            store(means, i, mean)
        store(rstds, i, rstd)
    if past_caches:
        finish_writes()


@Kernel
def _backward(
    part, dx_at, dresidual_at, dweight_at, dbias_at,
    dy_at, dsum_at, x_at, weight_at, mean_at, rstd_at, kinds,
    rows, cols, dy_stride, dsum_stride, grid, sum_stride, parts,
    weight_offset, wanted, dropout, past_caches,
):  # fmt: skip
    kind, x_kind, mean_kind, wide, weight_kind = kinds[0], kinds[1], kinds[2], kinds[3], kinds[4]
    dx_kind, dresidual_kind, dsum_kind, dweight_kind, dbias_kind = kinds[5:]
    means, rstds = pointer(mean_at, mean_kind), pointer(rstd_at, wide)
    weight = pointer(weight_at, weight_kind)
    dweight = offset(pointer(dweight_at, dweight_kind), part * sum_stride)
    dbias = offset(pointer(dbias_at, dbias_kind), part * sum_stride)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        x = offset(pointer(x_at, x_kind), _start(i, grid))
        dy = offset(pointer(dy_at, kind), i * dy_stride)
        mean, rstd = real(dy, 0), load(rstds, i)
        if mean_at is not None:
            mean = load(means, i)
        g_mean, dot_mean = _sum_gradients(
            dweight, dbias, dy, x, weight, mean, rstd, cols, weight_offset
        )
        if mean_at is None:
            g_mean = real(dy, 0)
        if wanted is not None:
            dx = offset(pointer(dx_at, dx_kind), i * cols)
            dresidual = offset(pointer(dresidual_at, dresidual_kind), i * cols)
            dsum = offset(pointer(dsum_at, dsum_kind), i * dsum_stride)
            _write_gradient(
                dx, dresidual, dy, dsum, x, weight, mean, rstd, g_mean, dot_mean,
                cols, weight_offset, dropout, i, past_caches,
            )  # fmt: skip
    if past_caches:
        finish_writes()


# --- Their launches.


def _optional(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _kind(x: Tensor | None) -> np.generic | None:
    return None if x is None else kind(x)


def _grid_of(x: Tensor) -> tuple[int, ...]:
    """Sizes of the middle and the inner of the dims of rows, and the strides of all three."""
    if x.ndim == 2:
        return 1, 1, x.stride(0), 0, 0
    if x.ndim == 3:
        return 1, x.shape[1], x.stride(0), 0, x.stride(1)
    return x.shape[1], x.shape[2], x.stride(0), x.stride(1), x.stride(2)


def normalise(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    casting: str,
    dropout: tuple[float, ...] | None,
    centred: bool,
) -> list[Tensor]:
    """x [..., cols], residual [rows, cols], weight, bias [cols]
    -> y [..., cols], sum [rows, cols] if there is a residual, mean [rows] if centred, rstd [rows].
    """
    cols = x.shape[-1]
    rows = x.numel() // cols
    y = torch.empty_like(x, memory_format=CONTIGUOUS)
    total = None if residual is None else torch.empty_like(residual, memory_format=CONTIGUOUS)
    rstd = x.new_empty(rows, dtype=wide_dtype(x.dtype))
    mean = torch.empty_like(rstd) if centred else None
    parts = parts_for(rows)
    llama = 1 if casting == "llama" and x.itemsize == 2 else None  # else nothing is rounded
    past_caches = streamed(y) if total is None else streamed(y, total)
    # A sum past the caches is kept in them for one row of each part.
    line = total.new_empty(parts, cols) if past_caches and total is not None else None
    tensors = (residual, line, mean, rstd, weight, bias)
    _forward(
        parts, x.numel(), address(y), _optional(total), _optional(line), _optional(mean),
        address(rstd), address(x), _optional(residual), _optional(weight), _optional(bias),
        (kind(x), *map(_kind, tensors)), rows, cols, _grid_of(x),
        0 if residual is None else residual.stride(0), parts,
        eps, weight_offset, llama, dropout, past_caches,
    )  # fmt: skip
    return [out for out in (y, total, mean, rstd) if out is not None]


def differentiate(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    dropout: tuple[float, ...] | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """dy, dsum [rows, cols], x [..., cols] (or the sum), weight [cols], mean, rstd [rows]
    -> dx, dresidual [..., cols], dweight, dbias [cols], empty where they are not `wanted`."""
    cols = x.shape[-1]
    rows = x.numel() // cols
    dx = torch.empty_like(x, dtype=dy.dtype, memory_format=CONTIGUOUS) if wanted[0] else None
    dresidual = torch.empty_like(x, memory_format=CONTIGUOUS) if wanted[1] else None
    parts = 1 if rows <= FEW and x.numel() < SERIAL_BELOW else sum_parts_for(rows, cols)
    dweight, dbias = (partial_sums(x, parts, rstd.dtype) if w else None for w in wanted[2:])
    outs = [out for out in (dx, dresidual) if out is not None]
    kinds = tuple(map(_kind, (dy, x, mean, rstd, weight, dx, dresidual, dsum, dweight, dbias)))
    sums = next((t for t in (dweight, dbias) if t is not None), rstd)
    _backward(
        parts, 2 * x.numel(),
        _optional(dx), _optional(dresidual), _optional(dweight), _optional(dbias),
        address(dy), _optional(dsum), address(x), _optional(weight), _optional(mean), address(rstd),
        kinds, rows, cols, dy.stride(0), 0 if dsum is None else dsum.stride(0), _grid_of(x),
        sums.stride(0), parts, weight_offset, 1 if outs else None, dropout,
        bool(outs) and streamed(*outs),
    )  # fmt: skip
    return [
        x.new_empty(0, dtype=dy.dtype) if dx is None else dx,
        x.new_empty(0) if dresidual is None else dresidual,
        x.new_empty(0) if dweight is None else summed(dweight, weight),
        x.new_empty(0) if dbias is None else summed(dbias, bias),
    ]
