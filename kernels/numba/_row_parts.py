"""Draws from fewer rows than there are threads: each row in parts, which tasks share.

Every part looks for its largest logits, then for its winner, then for its share of the masses; what
they found is put together in their order, so that the token is that of the row by itself.
"""

import numpy as np
import torch
from torch import Tensor

from tilewise.kernels.numba._gumbel import (
    PART,
    draw,
    draw_token,
    is_short,
    part_masses,
    redraw,
)
from tilewise.kernels.numba._options import (
    INT32,
    INT64,
    NUMBERS,
    UINT32,
    draws_of,
    is_adjusted,
    options_of,
)
from tilewise.kernels.numba._parallel import Kernel, callee
from tilewise.kernels.numba._ranks import (
    BLOCK,
    INFINITY,
    block_maxima,
    inverse_of,
    least_for_min_p,
    weigh,
)
from tilewise.kernels.numba._simd import load, maximum, offset, pointer, real, store

BLOCKS = PART // BLOCK
NUMBER = np.float64(0)
TOP, SCORE, BEFORE, TOTAL, FOUND = range(5)  # of what a part finds, beside its winner


def is_split(logits: Tensor, arguments: tuple) -> bool:
    """Whether rows are so few and long: not those that are written anew, nor of which few logits
    are left, for a launch takes as long as to find these.

    One row of 128256 logits, fp32, by 2 threads instead of 1: 78 us for 108, and with top-p 121 for
    173 (Emerald Rapids, 2026-11).
    """
    rows, vocab = logits.shape
    each_top_k, top_k, temperature = arguments[0], *arguments[NUMBERS + 4 : NUMBERS + 6]
    few = rows < torch.get_num_threads() and vocab > 2 * PART
    is_cut = each_top_k is not None or 0 < top_k < vocab or temperature == 0
    return few and not is_cut and not is_adjusted(arguments)


def parts_of(vocab: int) -> int:
    return -(-vocab // int(PART))


@callee
def _found(scratch, parts, part):
    """What a part found, and its winner."""
    numbers = offset(pointer(scratch + parts[6], NUMBER), part * FOUND)
    return numbers, offset(pointer(scratch + parts[7], INT64), part)


@callee
def _blocks_of(part, vocab):
    return part * BLOCKS, min((part + 1) * BLOCKS, (vocab + BLOCK - 1) // BLOCK)


@callee
def _top_of(scratch, parts, count, wide):
    """The largest logit of a row, NaN if there is one."""
    top = real(wide, -INFINITY)
    for part in range(count):
        top = maximum(top, real(wide, load(_found(scratch, parts, part)[0], TOP)))
    return top


@callee
def _whole_row(can, top, filters, vocab):
    """Whether all of a row is drawn from, but for min-p and top-p."""
    t, k, p, _ = filters
    return can and top > -INFINITY and t > 0 and p > 0 and (k == 0 or k >= vocab)


@Kernel
def find_tops(task, x_at, scratch_at, parts, kinds, vocab, x_stride, scratch_stride, count):
    row, part = task // count, task % count
    scratch = scratch_at + row * scratch_stride
    begin, _ = _blocks_of(part, vocab)
    x = offset(pointer(x_at, kinds[1]), row * x_stride + part * PART)
    maxima = offset(pointer(scratch + parts[0], kinds[2]), begin)
    top = block_maxima(maxima, x, min(PART, vocab - part * PART))
    store(_found(scratch, parts, part)[0], TOP, np.float64(top))


@Kernel
def draw_parts(
    task, x_at, places, k, numbers, draws, scratch_at, parts, kinds, vocab, x_stride,
    scratch_stride, count,
):  # fmt: skip
    row, part = task // count, task % count
    scratch, wide = scratch_at + row * scratch_stride, kinds[2]
    can, filters, _ = options_of(row, places, k, numbers, wide)
    top = _top_of(scratch, parts, count, wide)
    if _whole_row(can, top, filters, vocab):
        x, maxima = (
            offset(pointer(x_at, kinds[1]), row * x_stride), pointer(scratch + parts[0], wide)
        )  # fmt: skip
        reaches = pointer(scratch + parts[1], wide)
        words = offset(pointer(scratch + parts[3], UINT32), part * PART)
        t, _, _, m = filters
        inverse, least = inverse_of(t), least_for_min_p(top, t, m)
        begin, end = _blocks_of(part, vocab)
        weigh(offset(reaches, begin), offset(maxima, begin), end - begin, top, inverse)
        seed, place, counter_row = draws_of(row, draws)
        token, score = draw(
            reaches, words, x, maxima, begin, end, vocab, top, inverse, seed, place, counter_row,
            least, vocab,
        )  # fmt: skip
        found, winner = _found(scratch, parts, part)
        store(found, SCORE, score)
        store(winner, 0, np.int64(token))


@callee
def _winner(scratch, parts, count):
    best, token = -INFINITY, np.int64(0)
    for part in range(count):
        found, winner = _found(scratch, parts, part)
        if load(found, SCORE) > best:
            best, token = load(found, SCORE), load(winner, 0)
    return token


@Kernel
def weigh_parts(
    task, x_at, places, k, numbers, scratch_at, parts, kinds, vocab, x_stride, scratch_stride, count
):  # fmt: skip
    row, part = task // count, task % count
    scratch, wide = scratch_at + row * scratch_stride, kinds[2]
    can, filters, _ = options_of(row, places, k, numbers, wide)
    top = _top_of(scratch, parts, count, wide)
    if _whole_row(can, top, filters, vocab) and filters[2] < 1:
        x = offset(pointer(x_at, kinds[1]), row * x_stride)
        token = _winner(scratch, parts, count)
        before, total = part_masses(x, part, vocab, token, top, inverse_of(filters[0]))
        found, _ = _found(scratch, parts, part)
        store(found, BEFORE, before)
        store(found, TOTAL, total)


@Kernel
def finish_rows(
    row, tokens_at, x_at, places, k, numbers, draws, scratch_at, parts, kinds, vocab, x_stride,
    scratch_stride, count,
):  # fmt: skip
    scratch, wide = scratch_at + row * scratch_stride, kinds[2]
    can, filters, _ = options_of(row, places, k, numbers, wide)
    top = _top_of(scratch, parts, count, wide)
    token = np.int64(-1)
    if can and top > -INFINITY:
        x = offset(pointer(x_at, kinds[1]), row * x_stride)
        maxima, masses = pointer(scratch + parts[0], wide), pointer(scratch + parts[1], wide)
        values, columns = pointer(scratch + parts[2], wide), pointer(scratch + parts[3], INT32)
        words = pointer(scratch + parts[3], UINT32)
        t, top_k, p, m = filters
        seed, place, counter_row = draws_of(row, draws)
        if not _whole_row(can, top, filters, vocab):
            token = np.int64(draw_token(
                maxima, masses, values, columns, words, x, vocab, top, t, top_k, p, m, seed, place,
                counter_row,
            ))  # fmt: skip
        else:
            token = _winner(scratch, parts, count)
            before, total = 0.0, 0.0
            for part in range(count):
                found, _ = _found(scratch, parts, part)
                before += load(found, BEFORE)
                total += load(found, TOTAL)
            if p < 1 and not is_short(before, total, p):
                token = np.int64(redraw(
                    masses, words, x, maxima, vocab, top, load(x, token), token, inverse_of(t), p,
                    seed, place, counter_row,
                ))  # fmt: skip
    store(pointer(tokens_at, INT64), row, token)
