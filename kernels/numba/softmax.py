"""Softmax and its logarithm on the CPU: parts of the rows in parallel, three passes over a row."""

import math

import numpy as np
import torch
from torch import Tensor

from tilewise.kernels.numba._parallel import Kernel
from tilewise.kernels.numba._shared import parts_for
from tilewise.kernels.numba._simd import (
    address,
    exp,
    fma,
    kind,
    load,
    maximum,
    offset,
    pointer,
    real,
    store,
)


@Kernel
def _forward(
    part, y_at, scratch_at, x_at,
    kind, wide, rows, cols, x_stride, parts, scale,
):  # fmt: skip
    # y = exp(scale * x - peak) / total. A 16-bit y would round the exponentials: they wait in
    # scratch, which is 0 where y itself can hold them.
    factor, scratch = real(kind, scale), offset(pointer(scratch_at, wide), part * cols)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        x = offset(pointer(x_at, kind), i * x_stride)
        y = offset(pointer(y_at, kind), i * cols)

        peak = real(kind, -np.inf)
        for j in range(cols):
            peak = maximum(load(x, j) * factor, peak)

        total = real(kind, 0)
        if scratch_at:
            for j in range(cols):
                e = exp(fma(load(x, j), factor, -peak))
                total += e
                store(scratch, j, e)
            inverse = real(kind, 1) / total
            for j in range(cols):
                store(y, j, load(scratch, j) * inverse)
        else:
            for j in range(cols):
                e = exp(fma(load(x, j), factor, -peak))
                total += e
                store(y, j, e)
            inverse = real(kind, 1) / total
            for j in range(cols):
                store(y, j, load(y, j) * inverse)


@Kernel
def _log_forward(part, y_at, x_at, kind, rows, cols, x_stride, parts, scale):
    # y = (scale * x - peak) - log(total): peak + log(total) would lose the logarithm in a large
    # peak.
    factor = real(kind, scale)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        x = offset(pointer(x_at, kind), i * x_stride)
        y = offset(pointer(y_at, kind), i * cols)

        peak = real(kind, -np.inf)
        for j in range(cols):
            peak = maximum(load(x, j) * factor, peak)
        total = real(kind, 0)
        for j in range(cols):
            total += exp(fma(load(x, j), factor, -peak))
        log_total = real(kind, math.log(total))
        for j in range(cols):
            store(y, j, fma(load(x, j), factor, -peak) - log_total)


@Kernel
def _backward(
    part, dx_at, dy_at, y_at, kind, rows, cols, dy_stride, y_stride, parts, scale
):  # fmt: skip
    # dx = scale * y * (dy - dot), with dot = sum(dy * y)
    factor = real(kind, scale)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        dy = offset(pointer(dy_at, kind), i * dy_stride)
        y = offset(pointer(y_at, kind), i * y_stride)
        dx = offset(pointer(dx_at, kind), i * cols)

        dot = real(kind, 0)
        for j in range(cols):
            dot += load(dy, j) * load(y, j)
        for j in range(cols):
            store(dx, j, factor * load(y, j) * (load(dy, j) - dot))


@Kernel
def _log_backward(
    part, dx_at, dy_at, y_at, kind, rows, cols, dy_stride, y_stride, parts, scale
):  # fmt: skip
    # dx = scale * (dy - exp(y) * total), with total = sum(dy)
    factor = real(kind, scale)
    for i in range(part * rows // parts, (part + 1) * rows // parts):
        dy = offset(pointer(dy_at, kind), i * dy_stride)
        y = offset(pointer(y_at, kind), i * y_stride)
        dx = offset(pointer(dx_at, kind), i * cols)

        total = real(kind, 0)
        for j in range(cols):
            total += load(dy, j)
        for j in range(cols):
            store(dx, j, factor * (load(dy, j) - exp(load(y, j)) * total))


def softmax_forward(x: Tensor, scale: float, log: bool) -> Tensor:
    """x [rows, cols] -> y [rows, cols], probabilities or their logarithms."""
    rows, cols = x.shape
    y = x.new_empty(rows, cols)
    parts = parts_for(rows)
    sizes = (rows, cols, x.stride(0), parts, scale)
    if log:
        _log_forward(parts, x.numel(), address(y), address(x), kind(x), *sizes)
        return y
    wide = torch.promote_types(x.dtype, torch.float32)
    scratch = None if wide == x.dtype else x.new_empty(parts, cols, dtype=wide)
    _forward(
        parts, x.numel(), address(y), address(scratch), address(x),
        kind(x), kind(y if scratch is None else scratch), *sizes,
    )  # fmt: skip
    return y


def softmax_backward(dy: Tensor, y: Tensor, scale: float, log: bool) -> Tensor:
    """dy, y [rows, cols] -> dx [rows, cols]."""
    rows, cols = y.shape
    dx = y.new_empty(rows, cols)
    parts = parts_for(rows)
    kernel = _log_backward if log else _backward
    kernel(
        parts, 2 * y.numel(), address(dx), address(dy), address(y),
        kind(y), rows, cols, dy.stride(0), y.stride(0), parts, scale,
    )  # fmt: skip
    return dx
