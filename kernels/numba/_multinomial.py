"""Several draws from one row of weights, or of their logarithms."""

import math

import numpy as np
import torch
from torch import Tensor

from tilewise.kernels.numba._gumbel import draw_token, score_of_gap
from tilewise.kernels.numba._options import INT32, INT64, UINT32, draws_of, packed_draws
from tilewise.kernels.numba._parallel import Kernel, callee
from tilewise.kernels.numba._philox import philox
from tilewise.kernels.numba._ranks import BLOCK, INFINITY, block_maxima
from tilewise.kernels.numba._shared import laid_out, wide_dtype
from tilewise.kernels.numba._simd import KINDS, address, kind, load, offset, pointer, real, store
from tilewise.kernels.numba._top_k import rank_top


@callee
def _write_logs(y, x, vocab, weights):
    """Write the row as logarithms; whether it can be drawn from."""
    can = True
    if weights:
        for j in range(vocab):
            v = load(x, j)
            can = can and v >= 0 and v < INFINITY
            store(y, j, real(y, math.log(np.float64(v)) if v > 0 else -INFINITY))
    else:
        for j in range(vocab):
            store(y, j, load(x, j))
    return can


@callee
def _add_noise(y, vocab, seed, place, row):
    for group in range((vocab + 3) // 4):
        words = philox(seed, place, row, group)
        for i in range(min(4, vocab - group * 4)):
            j = group * 4 + i
            v = load(y, j)
            if v > -INFINITY:
                store(y, j, real(y, score_of_gap(np.float64(v), words[i])))


@Kernel
def _draw(
    task, out_at, x_at, draws, scratch_at, parts, kind, wide, rows, vocab, count, x_stride,
    scratch_stride, tasks, replacement, weights,
):  # fmt: skip
    scratch = scratch_at + task * scratch_stride
    maxima, masses = pointer(scratch + parts[0], wide), pointer(scratch + parts[1], wide)
    values, columns = pointer(scratch + parts[2], wide), pointer(scratch + parts[3], INT32)
    words, y = pointer(scratch + parts[3], UINT32), pointer(scratch + parts[4], wide)
    more_columns = pointer(scratch + parts[5], INT32)
    for i in range(task, rows, tasks):
        out = offset(pointer(out_at, INT64), i * count)
        own_seed, own_place, row = draws_of(i, draws)
        can = _write_logs(y, offset(pointer(x_at, kind), i * x_stride), vocab, weights)
        top = block_maxima(maxima, y, vocab)
        found = np.int64(0)
        if can and top > -INFINITY and (replacement or count == 1):
            found = count
            for s in range(count):
                token = draw_token(
                    maxima, masses, values, columns, words, y, vocab, top, real(y, 1), np.int64(0),
                    real(y, 1), real(y, 0), own_seed, own_place + s, row,
                )  # fmt: skip
                store(out, s, np.int64(token))
        elif can and top > -INFINITY:
            _add_noise(y, vocab, own_seed, own_place, row)
            top = block_maxima(maxima, y, vocab)
            found = rank_top(values, columns, masses, more_columns, y, maxima, vocab, count, top)
            for n in range(found):
                drawn = load(values, n) > -INFINITY
                store(out, n, np.int64(load(columns, n)) if drawn else np.int64(-1))
        for n in range(count):
            if n >= found:
                store(out, n, np.int64(-1))


def multinomial_forward(
    x: Tensor, num_samples: int, replacement: bool, weights: bool, *draws
) -> Tensor:
    """x [rows, vocab], weights or logarithms; seeds and offsets -> [rows, num_samples]."""
    rows, vocab = x.shape
    out = x.new_empty(rows, num_samples, dtype=torch.int64)
    wide = wide_dtype(x.dtype)
    parts, size = laid_out(  # maxima, masses, values, columns, the row, columns again
        (-(-vocab // BLOCK), wide.itemsize), *2 * [(vocab + BLOCK, wide.itemsize)],
        (vocab + BLOCK, 4), (vocab + BLOCK, wide.itemsize), (vocab, 4),
    )  # fmt: skip
    tasks = min(rows, torch.get_num_threads())
    scratch = x.new_empty(tasks * size, dtype=torch.uint8)
    _draw(
        tasks, x.numel() * num_samples, address(out), address(x), packed_draws(*draws),
        address(scratch), parts, kind(x), KINDS[wide], rows, vocab, num_samples,
        x.stride(0), size, tasks, replacement, weights,
    )  # fmt: skip
    return out
