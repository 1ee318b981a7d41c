"""Whole matrix products of fp32 rows in memory, out of the microkernels of `_matmul`.

PyTorch's reach half of the peak where its BLAS does not use all of the vectors (MKL on AMD); what
is no multiple of a vector wide is left to it. The last few rows are padded: for so few of them it
sums in long chains, with twice the error. A result's sum runs over the depth in the same order
whatever the number of threads.
"""

import numpy as np
import torch
from torch import Tensor

from tilewise import linear_loss
from tilewise.kernels.numba._matmul import (
    HEIGHT,
    LANES,
    SET,
    UNIT,
    multiply,
    transpose,
)
from tilewise.kernels.numba._parallel import Kernel, callee, take
from tilewise.kernels.numba._shared import thread_scratch
from tilewise.kernels.numba._simd import address, kind, load, offset, pointer, real, store
from tilewise.kernels.numba._stream import scratch_of

# A tile of the result and what it is made of are to lie in L1, and the B of a block in L2.
TALL, WIDE, DEEP = np.int64(32), np.int64(192), np.int64(512)
SIDE = np.int64(64)  # of a square tile of logits
LINKED = np.int64(256)  # of the depth of a logit, what is summed by itself


_tile = scratch_of(TALL * WIDE)


@callee
def _add_tile(c, c_stride, part, part_stride, rows, cols):
    """Chains are added to what is as small as they are, and that once to what may be large."""
    for i in range(rows):
        row, more = offset(c, i * c_stride), offset(part, i * part_stride)
        for j in range(cols):
            store(row, j, load(row, j) + load(more, j))


@Kernel
def _product(
    task, c_at, a_at, b_at, kind, rows, cols, depth, c_stride, a_row, a_step, b_stride,
    row_group, col_group, groups, add,
):  # fmt: skip
    top, left = task // groups * row_group, task % groups * col_group
    bottom, right = min(top + row_group, rows), min(left + col_group, cols)
    a, b, c = pointer(a_at, kind), pointer(b_at, kind), pointer(c_at, kind)
    part = _tile(c)
    for deep in range((depth + DEEP - 1) // DEEP):
        k = deep * DEEP
        for tile in range((bottom - top + TALL - 1) // TALL):
            i = top + tile * TALL
            for strip in range((right - left + WIDE - 1) // WIDE):
                j = left + strip * WIDE
                height, width = min(TALL, bottom - i), min(WIDE, right - j)
                to, to_stride = offset(c, i * c_stride + j), c_stride
                if add or deep > 0:
                    to, to_stride = part, WIDE
                multiply(
                    to, to_stride, offset(a, i * a_row + k * a_step), a_row, a_step,
                    offset(b, k * b_stride + j), b_stride, height, width, min(DEEP, depth - k), SET,
                )  # fmt: skip
                if add or deep > 0:
                    _add_tile(offset(c, i * c_stride + j), c_stride, part, WIDE, height, width)


@Kernel
def _logits(
    thread, out_at, weight_at, hidden_at, bias_at, counter, scratch_at, size, kind,
    tokens, classes, dim, out_stride, weight_stride, width,
):  # fmt: skip
    # Classes times tokens, so that what is read a scalar at a time lies as it is; then transposed.
    scratch = offset(pointer(scratch_at, kind), thread * size)
    turned, part = offset(scratch, SIDE * SIDE), offset(scratch, 2 * SIDE * SIDE)
    tiles = (classes + SIDE - 1) // SIDE
    bias = pointer(bias_at, kind)
    tile = take(counter)
    while tile < tiles:
        first = tile * SIDE
        count = min(SIDE, classes - first)
        weight = offset(pointer(weight_at, kind), first * weight_stride)
        for block in range((width + SIDE - 1) // SIDE):
            token = block * SIDE
            cols = min(SIDE, width - token)
            height = (count + HEIGHT - 1) // HEIGHT * HEIGHT
            for k in range(0, dim, LINKED):
                to = part if k > 0 else scratch
                multiply(
                    to, SIDE, offset(weight, k), weight_stride, UNIT,
                    offset(pointer(hidden_at, kind), k * width + token), width,
                    height, cols, min(LINKED, dim - k), SET,
                )  # fmt: skip
                if k > 0:
                    _add_tile(scratch, SIDE, part, SIDE, height, cols)
            transpose(turned, SIDE, scratch, SIDE, SIDE, cols)
            for i in range(min(cols, tokens - token)):
                x = offset(turned, i * SIDE)
                y = offset(pointer(out_at, kind), (token + i) * out_stride + first)
                if bias_at:
                    b = offset(bias, first)
                    for j in range(count):
                        store(y, j, load(x, j) + load(b, j))
                else:
                    for j in range(count):
                        store(y, j, load(x, j) + real(x, 0))
        tile = take(counter)


def logits(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out [tokens, classes] = hidden weight^T + bias."""
    tokens, dim = hidden.shape
    if hidden.dtype != torch.float32 or weight.stride(1) != 1 or out.stride(1) != 1:
        linear_loss.logits_by_torch(out, hidden, weight, bias)
        return
    width = -(-tokens // LANES) * LANES
    packed = hidden.new_zeros(dim, width)
    packed[:, :tokens] = hidden.t()
    whole = len(weight) // int(HEIGHT) * int(HEIGHT)
    for first, classes, rows in ((0, whole, weight), (whole, len(weight) - whole, None)):
        if classes == 0:
            continue
        rows = _padded_rows(weight[first:]) if rows is None else rows
        counter, scratch, size = thread_scratch(hidden, 3 * SIDE * SIDE)
        threads = min(torch.get_num_threads(), -(-classes // int(SIDE)))
        _logits(
            threads, tokens * classes * dim, address(out[:, first:]), address(rows),
            address(packed), address(None if bias is None else bias[first:]),
            address(counter), address(scratch), size, kind(out),
            tokens, classes, dim, out.stride(0), rows.stride(0), width,
        )  # fmt: skip


def _padded_rows(few: Tensor) -> Tensor:
    """The rows, and zeros for as many as a microkernel takes."""
    rows = few.new_zeros(int(HEIGHT), few.shape[1])
    rows[: len(few)] = few
    return rows


def product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out [rows, cols] = a b, added to what it holds with `add`."""
    rows, cols = out.shape
    dtypes = out.dtype == a.dtype == b.dtype == torch.float32
    lying = out.stride(1) == 1 and b.stride(1) == 1 and cols % LANES == 0
    if not dtypes or not lying or b.numel() == 0:
        linear_loss.product_by_torch(out, a, b, add)
        return
    whole = rows // int(HEIGHT) * int(HEIGHT)
    if whole:
        _multiply(out[:whole], a[:whole], b, add)
    if whole < rows:
        last = out.new_empty(int(HEIGHT), cols)
        _multiply(last, _padded_rows(a[whole:]), b, False)
        last = last[: rows - whole]
        out[whole:] = out[whole:] + last if add else last


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """The same for whole tiles."""
    rows, depth = a.shape
    cols = b.shape[1]
    # Few rows: all of them with some columns of b. Many: some of them with all of b.
    tall, wide, threads = int(TALL), int(WIDE), torch.get_num_threads()
    row_group, col_group = (2 * tall, cols) if rows > depth else (rows, wide)
    groups = -(-cols // col_group)
    while row_group > tall and -(-rows // row_group) * groups < 2 * threads:
        row_group = max(-(-row_group // 2) // tall * tall, tall)
    _product(
        -(-rows // row_group) * groups, out.numel() * depth, address(out), address(a), address(b),
        kind(out), rows, cols, depth, out.stride(0), a.stride(0), a.stride(1), b.stride(0),
        row_group, col_group, groups, add,
    )  # fmt: skip
