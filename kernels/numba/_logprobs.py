"""Draws with logarithms of probabilities: of the token, and of the likeliest in rank."""

import math

import numpy as np
import torch
from torch import Tensor

from tilewise.kernels.numba._filter import NAN, fill
from tilewise.kernels.numba._gumbel import draw_row
from tilewise.kernels.numba._options import (
    COUNT,
    INT32,
    INT64,
    Scratch,
    clear_counts,
    packed,
    packed_draws,
    row_kinds,
)
from tilewise.kernels.numba._parallel import Kernel, callee
from tilewise.kernels.numba._ranks import (
    BLOCK,
    INFINITY,
    block_maxima,
    inverse_of,
    is_left,
    prefix,
)
from tilewise.kernels.numba._shared import wide_dtype
from tilewise.kernels.numba._simd import address, exp, load, offset, pointer, real, store
from tilewise.kernels.numba._top_k import rank_top


@callee
def _log_of_mass(x, vocab, top, inverse, least, stop):
    """log of the sum of e**((logit - top) / temperature) of those that are left."""
    total = 0.0
    for b in range((vocab + BLOCK - 1) // BLOCK):
        start = b * BLOCK
        block, part = offset(x, start), real(x, 0)
        for j in range(min(BLOCK, vocab - start)):
            v = load(block, j)
            mass = exp(real(x, 0) if v == top else (v - top) * inverse)
            part += mass if is_left(v, start + j, least, stop) else real(x, 0)
        total += part
    return math.log(total)


@callee
def _logprob(v, top, t, log_of_mass):
    gap = 0.0 if v == top else (np.float64(v) - np.float64(top)) / t
    return gap - log_of_mass


@callee
def _write_logprobs(
    logprob, top_logprobs, top_tokens, scratch, parts, wide, x, vocab, count, token, top, t,
    least, stop,
):  # fmt: skip
    """Of a distribution whose largest logit is `top`, in which the block maxima are those of x."""
    maxima, more = pointer(scratch + parts[0], wide), pointer(scratch + parts[1], wide)
    values, columns = pointer(scratch + parts[2], wide), pointer(scratch + parts[3], INT32)
    more_columns = pointer(scratch + parts[6], INT32)
    inverse = inverse_of(real(x, t))
    mass = _log_of_mass(x, vocab, top, inverse, least, stop)
    store(logprob, 0, real(logprob, _logprob(load(x, token), top, t, mass)))
    if count == 0:
        return
    found = rank_top(values, columns, more, more_columns, x, maxima, vocab, count, top)
    for n in range(count):
        there = n < found
        v = load(values, n) if there else real(x, -INFINITY)
        j = np.int64(load(columns, n)) if there else np.int64(-1)
        there = v > -INFINITY and is_left(v, j, least, stop)
        value = _logprob(v, top, t, mass) if there else -INFINITY
        store(top_logprobs, n, real(logprob, value))
        store(top_tokens, n, j if there and value > -INFINITY else np.int64(-1))


@Kernel
def _sample_with_logprobs(
    task, tokens_at, logprobs_at, top_logprobs_at, top_tokens_at, x_at, places, k, numbers, sources,
    draws, scratch_at, parts, kinds, rows, vocab, count, x_stride, scratch_stride, tasks, processed,
):  # fmt: skip
    given, _, wide = kinds
    tokens = pointer(tokens_at, INT64)
    scratch = scratch_at + task * scratch_stride
    maxima, masses = pointer(scratch + parts[0], wide), pointer(scratch + parts[1], wide)
    values, columns = pointer(scratch + parts[2], wide), pointer(scratch + parts[3], INT32)
    clear_counts(pointer(scratch + parts[5], INT32), sources, vocab)
    for i in range(task, rows, tasks):
        logprob = offset(pointer(logprobs_at, wide), i)
        top_logprobs = offset(pointer(top_logprobs_at, wide), i * count)
        top_tokens = offset(pointer(top_tokens_at, INT64), i * count)
        token, x, top, filters = draw_row(
            i, x_at, places, k, numbers, sources, draws, scratch, parts, kinds, vocab, x_stride
        )
        store(tokens, i, token)
        raw = offset(pointer(x_at, given), i * x_stride)
        if not processed:
            top = block_maxima(maxima, raw, vocab)
        if token < 0 or not (processed or top < INFINITY):
            fill(logprob, 1, NAN)
            fill(top_logprobs, count, NAN)
            for n in range(count):
                store(top_tokens, n, np.int64(-1))
        elif processed:
            t, top_k, p, m = filters
            least, stop = prefix(maxima, masses, values, columns, x, vocab, top, t, top_k, p, m)
            exact = np.float64(t) if places[1] else numbers[0]
            _write_logprobs(
                logprob, top_logprobs, top_tokens, scratch, parts, wide, x, vocab, count, token,
                top, exact if exact > 0 else 1.0, least, stop,
            )  # fmt: skip
        else:
            _write_logprobs(
                logprob, top_logprobs, top_tokens, scratch, parts, wide, raw, vocab, count, token,
                top, 1.0, real(raw, -INFINITY), np.int64(0),
            )  # fmt: skip


def sample_with_logprobs_forward(logits: Tensor, *arguments) -> tuple[Tensor, ...]:
    """logits [batch, vocab]; options as `_options.packed`, how many of the likeliest, whether after
    all filters, seeds and offsets -> tokens, logprobs [batch]; logprobs, tokens [batch, count]."""
    rows, vocab = logits.shape
    count, processed, *draws = arguments[COUNT:]
    wide = wide_dtype(logits.dtype)
    tokens, logprobs = logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=wide)
    top_logprobs = logits.new_empty(rows, count, dtype=wide)
    top_tokens = logits.new_empty(rows, count, dtype=torch.int64)
    scratch = Scratch(logits, arguments, (vocab if count else 0, 4))
    _sample_with_logprobs(
        scratch.tasks, logits.numel(), address(tokens), address(logprobs), address(top_logprobs),
        address(top_tokens), address(logits), *packed(arguments), packed_draws(*draws),
        address(scratch.memory), scratch.places, row_kinds(logits, arguments), rows, vocab, count,
        logits.stride(0), scratch.size, scratch.tasks, processed,
    )  # fmt: skip
    return tokens, logprobs, top_logprobs, top_tokens
