"""A block of a row of logits: its scores, the sum of their powers, its part of the gradient."""

import math

from tilewise.kernels.numba._parallel import callee
from tilewise.kernels.numba._simd import exp, load, offset, real, store, tanh
from tilewise.kernels.numba._stream import highest

# A shift serves as long as the scores are at most this far above it, which they are if the sum of
# their powers is no larger than that of one such score.
ROOM = 40.0
MOST = math.exp(ROOM)

LOWEST = -math.inf


@callee
def score(row, j, scale, cap):
    """cap * tanh(scale * x / cap) of one element; no cap is 0."""
    s = load(row, j) * scale
    if cap > real(row, 0):
        s = cap * tanh(s / cap)
    return s


@callee
def slope(s, scale, cap):
    """The derivative of a score, from itself."""
    if cap > real(s, 0):
        r = s / cap
        return scale * (real(s, 1) - r * r)
    return scale


@callee
def read_scores(to, x, count, scale, cap):
    """The scores of a block, in scratch."""
    if cap > real(to, 0):
        inner = scale / cap
        for j in range(count):
            store(to, j, cap * tanh(load(x, j) * inner))
    else:
        for j in range(count):
            store(to, j, load(x, j) * scale)


@callee
def _sum_of_powers(x, count, shift):
    s = real(x, 0)
    for j in range(count):
        s += exp(load(x, j) - shift)
    return s


@callee
def _sum_but_one(x, count, shift, hole):
    if hole < 0 or hole >= count:
        return _sum_of_powers(x, count, shift)
    after = hole + 1
    return _sum_of_powers(x, hole, shift) + _sum_of_powers(offset(x, after), count - after, shift)


@callee
def add_block(x, count, hole, shift, s):
    """Take the scores of a block, but for element `hole`, into the sum of exp(score - shift).

    The shift is -inf before the first. It is moved only where a score is too far above it, so that
    most blocks are read once. Returns the shift and the sum.
    """
    if shift > real(x, LOWEST) and (hole < 0 or hole >= count):
        block = _sum_of_powers(x, count, shift)
        if block <= real(x, MOST):
            return shift, s + block
    m = highest(x, real(x, 1), count)
    if m == real(x, LOWEST):  # exp(-inf - 0) is 0, not NaN; what is NaN all the same is passed on
        return shift, s + _sum_but_one(x, count, real(x, 0), hole)
    if not m > shift + real(x, ROOM):
        m = shift
    s *= exp(shift - m)
    return m, s + _sum_but_one(x, count, m, hole)


@callee
def weighted_total(x, count, weights, weighted):
    """The sum of the scores of a block, each times the weight of its class."""
    total = real(x, 0)
    if weighted:
        for j in range(count):
            total += load(weights, j) * load(x, j)
    else:
        for j in range(count):
            total += load(x, j)
    return total


@callee
def _subtract(to, count, weights, weighted, pull):
    if weighted:
        for j in range(count):
            store(to, j, load(to, j) - pull * load(weights, j))
    else:
        for j in range(count):
            store(to, j, load(to, j) - pull)


@callee
def gradient_block(to, x, count, weights, weighted, plain, shift, push, pull, scale, cap):
    """to = (push * exp(s - shift) - pull * weight) * ds/dx, in scratch; plain: s is x."""
    if plain:
        for j in range(count):
            store(to, j, push * exp(load(x, j) - shift))
        if pull != real(to, 0):
            _subtract(to, count, weights, weighted, pull)
        return
    read_scores(to, x, count, scale, cap)
    inverse = real(to, 1) / cap if cap > real(to, 0) else real(to, 0)
    if weighted:
        for j in range(count):
            s = load(to, j)
            r = s * inverse
            g = push * exp(s - shift) - pull * load(weights, j)
            store(to, j, g * scale * (real(to, 1) - r * r))
    else:
        for j in range(count):
            s = load(to, j)
            r = s * inverse
            store(to, j, (push * exp(s - shift) - pull) * scale * (real(to, 1) - r * r))
