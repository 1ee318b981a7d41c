"""Sampling on the CPU: rows in parallel, no sort, noise only for tokens that can still win.

The largest logit of each block of 128 is found first; most of what follows looks at those. The
draw comes before the test for top-p: a token is left if the mass before it is short of the goal.
Where it is not, no token from it on is left either, and the draw is repeated among those before it:
1 + log(1 / p) draws on average, against the twenty passes of a search for the threshold.
"""

import math

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from tilewise.kernels.numba._parallel import Kernel, compiled
from tilewise.kernels.numba._philox import philox
from tilewise.kernels.numba._shared import CACHE_LINE, wide_dtype
from tilewise.kernels.numba._simd import (
    KINDS,
    address,
    exp,
    kind,
    load,
    maximum,
    offset,
    pointer,
    real,
    store,
)

BLOCK = 128  # a multiple of the 4 columns that share a counter
GROUPS = BLOCK // 4
WORDS = 2.0**32
LOWEST_SCORE = -4.0  # below that of the first token, whose noise is above -3.2
LARGE = 3e38
INFINITY = math.inf

INT32, UINT32, INT64 = np.int32(0), np.uint32(0), np.int64(0)  # kinds


@intrinsic
def ordered(typing_context, value):
    """An int64 that is ordered as the floats are."""

    def emit(context, builder, signature, args):
        wide = args[0].type == ir.DoubleType()
        bits = ir.IntType(64 if wide else 32)
        value = builder.bitcast(args[0], bits)
        sign = builder.ashr(value, bits(bits.width - 1))
        flipped = builder.xor(value, builder.lshr(sign, bits(1)))
        return flipped if wide else builder.sext(flipped, ir.IntType(64))

    return types.int64(value), emit


@intrinsic
def from_ordered(typing_context, like, value):
    """The float, of the type of `like`, that `ordered` gives `value` for."""

    def emit(context, builder, signature, args):
        wide = args[0].type == ir.DoubleType()
        bits = ir.IntType(64 if wide else 32)
        value = args[1] if wide else builder.trunc(args[1], bits)
        sign = builder.ashr(value, bits(bits.width - 1))
        flipped = builder.xor(value, builder.lshr(sign, bits(1)))
        return builder.bitcast(flipped, args[0].type)

    return like(like, types.int64), emit


@compiled
def _block_maxima(maxima, x, vocab):
    """The largest of each block, NaN where there is one; returns the largest of all."""
    top = real(x, -INFINITY)
    for b in range((vocab + BLOCK - 1) // BLOCK):
        block = offset(x, b * BLOCK)
        largest = real(x, -INFINITY)
        for j in range(min(BLOCK, vocab - b * BLOCK)):
            largest = maximum(largest, load(block, j))
        store(maxima, b, largest)
        top = maximum(top, largest)
    return top


@compiled
def _first(x, maxima, vocab, top):
    """The first column that holds the largest logit."""
    b = 0
    while load(maxima, b) != top:
        b += 1
    j = b * BLOCK
    while load(x, j) != top:
        j += 1
    return j


@compiled
def _bound(values, count, k, enough, least, top):
    """A bound that at least k of `count` values reach, and at most `enough` if ties allow; with
    `enough` = k these are the first k. By bisection between `least` and `top`.
    """
    low, high = ordered(least), ordered(top) + 1  # k values reach low, fewer high
    while low + 1 < high:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        bound = from_ordered(top, middle)
        above = 0
        for j in range(count):
            above += 1 if load(values, j) >= bound else 0
        if above >= k:
            low = middle
        else:
            high = middle
        if k <= above <= enough:
            break
    return from_ordered(top, low)


@compiled
def _gather_top(values, columns, x, maxima, vocab, k, top):
    """Write the first k logits in rank, and their columns, in order of column; return how many."""
    blocks = (vocab + BLOCK - 1) // BLOCK
    least = real(x, -INFINITY)
    if k <= blocks:  # where k blocks reach this, k logits do
        least = _bound(maxima, blocks, k, k, least, top)
    else:
        least = _bound(x, vocab, k, 2 * k, least, top)
    count = np.int64(0)
    for b in range(blocks):
        if load(maxima, b) >= least:
            for j in range(b * BLOCK, min((b + 1) * BLOCK, vocab)):
                v = load(x, j)
                if v >= least and v > -INFINITY:
                    store(values, count, v)
                    store(columns, count, np.int32(j))
                    count += 1
    if count <= k:
        return count

    least = _bound(values, count, k, k, least, top)
    ties = k
    for j in range(count):
        ties -= 1 if load(values, j) > least else 0
    kept = 0
    for j in range(count):
        v = load(values, j)
        if v > least or (v == least and ties > 0):
            ties -= 1 if v == least else 0
            store(values, kept, v)
            store(columns, kept, load(columns, j))
            kept += 1
    return kept


@compiled
def _weigh(masses, values, count, top, inverse):
    """Write e**((value - top) / temperature)."""
    for j in range(count):
        v = load(values, j)
        store(masses, j, exp(real(values, 0) if v == top else (v - top) * inverse))  # not inf - inf


@compiled
def _masses(values, start, stop, top, inverse, least, ties):
    """Mass of the values above `least`, or equal to it if `ties`; and of all."""
    before, total = 0.0, 0.0
    for b in range((stop - start + BLOCK - 1) // BLOCK):
        block = offset(values, start + b * BLOCK)
        count = min(BLOCK, stop - start - b * BLOCK)
        part, whole = real(values, 0), real(values, 0)
        if ties:  # two loops: one that asks in each turn is no vector loop
            for j in range(count):
                v = load(block, j)
                mass = exp(real(values, 0) if v == top else (v - top) * inverse)
                whole += mass
                part += mass if v >= least else real(values, 0)
        else:
            for j in range(count):
                v = load(block, j)
                mass = exp(real(values, 0) if v == top else (v - top) * inverse)
                whole += mass
                part += mass if v > least else real(values, 0)
        before += part
        total += whole
    return before, total


@compiled
def _is_left(values, count, j, top, inverse, p):
    """Whether the mass before value j in rank is short of top-p."""
    v = load(values, j)
    before, total = _masses(values, 0, j, top, inverse, v, True)
    more, rest = _masses(values, j, count, top, inverse, v, False)
    return real(values, before + more) < p * real(values, total + rest)


@compiled
def _rarity(best):
    """A token of mass m gets above the score `best` by its m * rarity highest words at most, for
    noise above g is as rare as e**-g at most.
    """
    return math.exp(-best) * WORDS * 1.0001  # the mass is rounded


@compiled
def _lowest_word(reach):
    return np.int64(max(WORDS - 2 - reach, 0.0)) if reach > 0.5 else np.int64(WORDS)


@compiled
def _score(v, top, inverse, word):
    gap = 0.0 if v == top else np.float64((v - top) * inverse)
    return gap - math.log(-math.log((np.float64(word) + 0.5) / WORDS))


@compiled
def _draw_words(words, seed, offset, row, group):
    """Write the words of a block, those of one place in their groups together; return the last."""
    highest = np.uint32(0)
    for i in range(GROUPS):
        a, b, c, d = philox(seed, offset, row, group + i)
        store(words, i, a)
        store(words, GROUPS + i, b)
        store(words, 2 * GROUPS + i, c)
        store(words, 3 * GROUPS + i, d)
        a, c = max(a, b), max(c, d)
        highest = max(highest, max(a, c))
    return highest


@compiled
def _draw(reaches, words, x, maxima, vocab, top, inverse, seed, offset, row, least, stop):
    """The winning column of those above `least`, or equal to it and before `stop`."""
    winner = _first(x, maxima, vocab, top)  # is always left, and a good score to begin with
    word = philox(seed, offset, row, winner >> 2)[winner & 3]
    best = _score(top, top, inverse, word)
    rarity = _rarity(best)
    for b in range((vocab + BLOCK - 1) // BLOCK):
        lowest = _lowest_word(load(reaches, b) * rarity)
        if load(maxima, b) < least or lowest == WORDS:
            continue
        if _draw_words(words, seed, offset, row, b * GROUPS) < lowest:
            continue
        for i in range(BLOCK):
            word = load(words, i)
            if word >= lowest:
                j = b * BLOCK + (i % GROUPS) * 4 + i // GROUPS
                v = load(x, j) if j < vocab else real(x, -INFINITY)
                if v > least or (v == least and j < stop):
                    score = _score(v, top, inverse, word)
                    if score > best:
                        winner, best, rarity = j, score, _rarity(score)
    return winner


@compiled
def _draw_listed(masses, values, columns, count, top, inverse, seed, offset, row, least, stop):
    """The place in the list of the winner of those above `least`, or equal and before `stop`."""
    winner, best, rarity = 0, LOWEST_SCORE, _rarity(LOWEST_SCORE)
    for j in range(count):
        v = load(values, j)
        if v > least or (v == least and j < stop):
            column = load(columns, j)
            word = philox(seed, offset, row, column >> 2)[column & 3]
            if word >= _lowest_word(load(masses, j) * rarity):
                score = _score(v, top, inverse, word)
                if score > best:
                    winner, best, rarity = j, score, _rarity(score)
    return winner


@compiled
def _sample_all(reaches, words, x, maxima, vocab, top, inverse, p, seed, offset, row):
    """A token of the whole row, cut to top-p."""
    least, stop = real(x, -INFINITY), np.int64(0)
    _weigh(reaches, maxima, (vocab + BLOCK - 1) // BLOCK, top, inverse)
    while True:
        token = _draw(
            reaches, words, x, maxima, vocab, top, inverse, seed, offset, row, least, stop
        )
        if p == 1 or _is_left(x, vocab, token, top, inverse, p):
            return token
        least, stop = load(x, token), token


@compiled
def _sample_listed(masses, values, columns, count, top, inverse, p, seed, offset, row):
    """A token of the list, cut to top-p."""
    least, stop = real(values, -INFINITY), np.int64(0)
    _weigh(masses, values, count, top, inverse)
    while True:
        j = _draw_listed(
            masses, values, columns, count, top, inverse, seed, offset, row, least, stop
        )
        if p == 1 or _is_left(values, count, j, top, inverse, p):
            return np.int64(load(columns, j))
        least, stop = load(values, j), j


@compiled
def _sample_row(maxima, masses, values, columns, words, x, vocab, t, k, p, seed, offset, row):
    if not (t >= 0 and t < INFINITY and k >= 0 and p >= 0 and p <= 1):
        return -1
    top = _block_maxima(maxima, x, vocab)
    if not top > -INFINITY:  # or NaN
        return -1
    if t == 0 or k == 1 or p == 0:
        return _first(x, maxima, vocab, top)
    inverse = min(real(x, 1) / t, real(x, LARGE))
    if k == 0 or k >= vocab:
        return _sample_all(masses, words, x, maxima, vocab, top, inverse, p, seed, offset, row)
    count = _gather_top(values, columns, x, maxima, vocab, k, top)
    return _sample_listed(masses, values, columns, count, top, inverse, p, seed, offset, row)


@Kernel
def _sample(
    task, tokens_at, x_at, ts_at, ks_at, ps_at, seeds_at, offsets_at, scratch_at,
    kind, wide, rows, vocab, x_stride, scratch_stride, masses, values, columns,
    seed_stride, offset_stride, tasks, t, k, p, seed, place,
):  # fmt: skip
    tokens, ts, ps = pointer(tokens_at, INT64), pointer(ts_at, wide), pointer(ps_at, wide)
    ks, seeds, places = pointer(ks_at, INT64), pointer(seeds_at, INT64), pointer(offsets_at, INT64)
    scratch = scratch_at + task * scratch_stride
    for i in range(task, rows, tasks):
        token = _sample_row(
            pointer(scratch, wide), pointer(scratch + masses, wide),
            pointer(scratch + values, wide), pointer(scratch + columns, INT32),
            pointer(scratch + columns, UINT32), offset(pointer(x_at, kind), i * x_stride), vocab,
            load(ts, i) if ts_at else real(wide, t),
            load(ks, i) if ks_at else k,
            load(ps, i) if ps_at else real(wide, p),
            load(seeds, i * seed_stride) if seeds_at else seed,
            load(places, i * offset_stride) if offsets_at else place,
            0 if seed_stride else i,
        )  # fmt: skip
        store(tokens, i, token)


def sample_forward(
    logits: Tensor, temperatures: Tensor | None, top_ks: Tensor | None, top_ps: Tensor | None,
    seeds: Tensor | None, offsets: Tensor | None,
    temperature: float, top_k: int, top_p: float, seed: int, offset: int,
) -> Tensor:  # fmt: skip
    """logits [batch, vocab]; options [batch], seeds and offsets also [], or numbers -> [batch]."""
    rows, vocab = logits.shape
    tokens = logits.new_empty(rows, dtype=torch.int64)
    wide = wide_dtype(logits.dtype)
    tasks = min(rows, torch.get_num_threads())  # each with its own scratch
    starts, size = [], 0  # of maxima, masses, values and columns
    for count, width in (-(-vocab // BLOCK), wide.itemsize), *3 * [(vocab + BLOCK, wide.itemsize)]:
        starts.append(size)
        size += -(-count * width // CACHE_LINE) * CACHE_LINE
    scratch = logits.new_empty(tasks * size, dtype=torch.uint8)
    _sample(
        tasks, logits.numel(), address(tokens), address(logits), address(temperatures),
        address(top_ks), address(top_ps), address(seeds), address(offsets), address(scratch),
        kind(logits), KINDS[wide], rows, vocab, logits.stride(0), size, *starts[1:],
        _stride(seeds), _stride(offsets), tasks,
        float(temperature), top_k, float(top_p), seed, offset,
    )  # fmt: skip
    return tokens


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.ndim
