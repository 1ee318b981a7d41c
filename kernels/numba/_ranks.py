"""Rows of logits by rank, without a sort: the largest, bounds by bisection, masses of a softmax.

The largest logit of each block of 128 is found first; most of what follows looks at those.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tilewise.kernels.numba._parallel import callee
from tilewise.kernels.numba._simd import exp, load, maximum, offset, real, store

BLOCK = 128  # a multiple of the 4 columns that share a counter
INFINITY = math.inf
LARGE = 3e38


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


@callee
def block_maxima(maxima, x, vocab):
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


@callee
def first(x, maxima, vocab, top):
    """The first column that holds the largest logit."""
    b = 0
    while load(maxima, b) != top:
        b += 1
    j = b * BLOCK
    while load(x, j) != top:
        j += 1
    return j


@callee
def bound_of(values, count, k, enough, least, top):
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


@callee
def gather_top(values, columns, x, maxima, vocab, k, top):
    """Write the first k logits in rank, and their columns, in order of column; return how many."""
    blocks = (vocab + BLOCK - 1) // BLOCK
    least = real(x, -INFINITY)
    if k <= blocks:  # where k blocks reach this, k logits do
        least = bound_of(maxima, blocks, k, k, least, top)
    else:
        least = bound_of(x, vocab, k, 2 * k, least, top)
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

    least = bound_of(values, count, k, k, least, top)
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


@callee
def weigh(masses, values, count, top, inverse):
    """Write e**((value - top) / temperature)."""
    for j in range(count):
        v = load(values, j)
        store(masses, j, exp(real(values, 0) if v == top else (v - top) * inverse))  # not inf - inf


@callee
def masses_of(values, start, stop, top, inverse, least, ties):
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


@callee
def inverse_of(t):
    """What differences of logits are multiplied by: finite, so that 0 of them stays 0."""
    return min(real(t, 1) / t, real(t, LARGE))


@callee
def least_for_min_p(top, t, m):
    """The lowest logit that is at least `m` times as likely as the largest."""
    if m > 0:
        return real(top, np.float64(top) + np.float64(t) * math.log(np.float64(m)))
    return real(top, -INFINITY)


@callee
def _mass_above(masses, values, count, least):
    above = 0.0
    for b in range((count + BLOCK - 1) // BLOCK):
        block, weights = offset(values, b * BLOCK), offset(masses, b * BLOCK)
        part = real(values, 0)
        for j in range(min(BLOCK, count - b * BLOCK)):
            part += load(weights, j) if load(block, j) > least else real(values, 0)
        above += part
    return above


@callee
def cut_to_top_p(masses, values, count, p, top):
    """`least` and `stop`: those values above `least`, and equal to it before place `stop`, are the
    shortest prefix in rank whose mass reaches p of all, for p below 1."""
    infinity = real(values, INFINITY)
    goal = np.float64(p * real(values, _mass_above(masses, values, count, -infinity)))
    low, high = ordered(-infinity), ordered(top)  # the mass above high is short of the goal
    while low + 1 < high:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        if _mass_above(masses, values, count, from_ordered(top, middle)) < goal:
            high = middle
        else:
            low = middle
    least = from_ordered(top, high)
    before = _mass_above(masses, values, count, least)
    stop = np.int64(0)
    for j in range(count):
        if load(values, j) == least and before < goal:
            before += load(masses, j)
            stop = np.int64(j + 1)
    return least, stop


@callee
def is_left(v, j, least, stop):
    """Whether the logit v of column j is, of those above `least`, and equal to it before `stop`."""
    return (v > least) | ((v == least) & (j < stop))


@callee
def prefix(maxima, masses, values, columns, x, vocab, top, t, k, p, m):
    """`least` and `stop`, by which `is_left` tells what of the row is left after all filters."""
    if t == 0 or k == 1 or p == 0:
        return top, first(x, maxima, vocab, top) + 1
    least, stop = real(x, -INFINITY), np.int64(0)
    inverse = inverse_of(t)
    if 0 < k < vocab:
        count = gather_top(values, columns, x, maxima, vocab, k, top)
        if p < 1:
            weigh(masses, values, count, top, inverse)
            least, stop = cut_to_top_p(masses, values, count, p, top)
        else:
            least = load(values, 0)
            for j in range(count):
                least = min(least, load(values, j))
            for j in range(count):
                if load(values, j) == least:
                    stop = np.int64(j + 1)
        stop = np.int64(load(columns, stop - 1)) + 1
    elif p < 1:
        weigh(masses, x, vocab, top, inverse)
        least, stop = cut_to_top_p(masses, x, vocab, p, top)
    lowest = least_for_min_p(top, t, m)
    return (lowest, vocab) if lowest > least else (least, stop)
