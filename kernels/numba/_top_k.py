"""The k largest of each row in rank: found by bisection, and only they are sorted, by merging."""

import numpy as np
import torch
from torch import Tensor

from tilewise.kernels.numba._options import INT32, INT64
from tilewise.kernels.numba._parallel import Kernel, callee
from tilewise.kernels.numba._ranks import BLOCK, INFINITY, block_maxima, gather_top
from tilewise.kernels.numba._shared import laid_out, wide_dtype
from tilewise.kernels.numba._simd import KINDS, address, kind, load, offset, pointer, real, store


@callee
def _merge(to, to_columns, values, columns, start, middle, end):
    """Two runs in rank into one; NaN is the largest, and of equals the left comes first."""
    a, b = start, middle
    for n in range(start, end):
        takes_left = b >= end
        if a < middle and b < end:
            left, right = load(values, a), load(values, b)
            takes_left = not (right > left or (right != right and left == left))
        if takes_left:
            store(to, n, load(values, a))
            store(to_columns, n, load(columns, a))
            a += 1
        else:
            store(to, n, load(values, b))
            store(to_columns, n, load(columns, b))
            b += 1


@callee
def sort_listed(values, columns, more, more_columns, count):
    """Put values that come in order of column into rank, by way of as much memory again."""
    width = np.int64(1)
    while width < count:
        for n in range((count + 2 * width - 1) // (2 * width)):
            start = n * 2 * width
            middle, end = min(start + width, count), min(start + 2 * width, count)
            _merge(more, more_columns, values, columns, start, middle, end)
        for j in range(count):
            store(values, j, load(more, j))
            store(columns, j, load(more_columns, j))
        width *= 2


@callee
def rank_top(values, columns, more, more_columns, x, maxima, vocab, k, top):
    """Write the first k logits in rank, and their columns; those of -inf are left out, unless all
    are wanted. Returns how many."""
    if k >= vocab or top != top:
        for j in range(vocab):
            store(values, j, load(x, j))
            store(columns, j, np.int32(j))
        count = vocab
    else:
        count = gather_top(values, columns, x, maxima, vocab, k, top)
    sort_listed(values, columns, more, more_columns, count)
    return min(count, k)


@Kernel
def _top_k(
    task, values_at, indices_at, x_at, scratch_at, parts, kind, wide, rows, vocab, k, x_stride,
    scratch_stride, tasks,
):  # fmt: skip
    scratch = scratch_at + task * scratch_stride
    maxima = pointer(scratch + parts[0], wide)
    listed, columns = pointer(scratch + parts[1], wide), pointer(scratch + parts[2], INT32)
    more, more_columns = pointer(scratch + parts[3], wide), pointer(scratch + parts[4], INT32)
    for i in range(task, rows, tasks):
        x = offset(pointer(x_at, kind), i * x_stride)
        values = offset(pointer(values_at, kind), i * k)
        indices = offset(pointer(indices_at, INT64), i * k)
        top = block_maxima(maxima, x, vocab)
        count = rank_top(listed, columns, more, more_columns, x, maxima, vocab, k, top)
        for n in range(count):
            store(values, n, load(listed, n))
            store(indices, n, np.int64(load(columns, n)))
        j = np.int64(0)
        while count < k:  # those of -inf
            if load(x, j) == -INFINITY:
                store(values, count, real(x, -INFINITY))
                store(indices, count, j)
                count += 1
            j += 1


def top_k_forward(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [rows, vocab] -> values, indices [rows, k]."""
    rows, vocab = x.shape
    values, indices = x.new_empty(rows, k), x.new_empty(rows, k, dtype=torch.int64)
    wide = wide_dtype(x.dtype)
    lists = (vocab, wide.itemsize), (vocab, 4)
    parts, size = laid_out((-(-vocab // BLOCK), wide.itemsize), *lists, *lists)
    tasks = min(rows, torch.get_num_threads())
    scratch = x.new_empty(tasks * size, dtype=torch.uint8)
    _top_k(
        tasks, x.numel(), address(values), address(indices), address(x), address(scratch), parts,
        kind(x), KINDS[wide], rows, vocab, k, x.stride(0), size, tasks,
    )  # fmt: skip
    return values, indices
