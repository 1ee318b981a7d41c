"""Rows of logits by rank, without a sort: the first, and the place where a weight is reached.

A place in rank is a key, which is ordered as the logits are, and a column: before it are greater
keys, and equal ones of lower columns. Weights are integers, so a sum of them has no order: of top-k
each counts 1, of top-p 2^40 times its mass. The search for a place takes two bits of the key in
each pass over the row, which then lies in cache: 16 passes for fp32, 10 for fp16, 8 for bf16.
"""

import torch
import triton
import triton.language as tl

ONE = tl.constexpr(2.0**40)  # of mass; rows of up to 2^23 logits have a sum that fits
SIGN = tl.constexpr(0x80000000)
NAN_KEY = tl.constexpr(0xFFFF0000)
# Pairs of bits by which keys of a dtype differ: sign, exponent and fraction of its fp32.
DIGITS = {torch.float32: 16, torch.float16: 10, torch.bfloat16: 8}


@triton.jit
def load(x_ptr, start, end, BLOCK: tl.constexpr):
    """Columns from `start` on; -inf from `end` on."""
    col = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + col, mask=col < end, other=float("-inf")).to(tl.float32)
    return tl.where(x == 0, 0.0, x), col  # -0 ties with 0


@triton.jit
def key_of(x):
    """A uint32 that is ordered as the numbers are; NaN is the largest."""
    bits = x.to(tl.int32, bitcast=True)
    key = (bits ^ (bits >> 31)).to(tl.uint32, bitcast=True)
    key = tl.where(bits < 0, key, key | SIGN)
    return tl.where(x != x, NAN_KEY, key)


@triton.jit
def is_before(key, col, least, stop):
    return (key > least) | ((key == least) & (col < stop))


@triton.jit
def winner(best, best_col, end):
    """The lowest column of the largest value."""
    return tl.min(tl.where(best == tl.max(best, 0), best_col, end), 0)


@triton.jit
def bests_of(x_ptr, begin, end, BLOCK: tl.constexpr):
    """The largest logits of BLOCK lanes, their first columns, and whether there was NaN."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_col = tl.zeros([BLOCK], tl.int32) + begin
    is_nan = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        x, col = load(x_ptr, start, end, BLOCK)
        is_nan |= (x != x).to(tl.int32)
        best_col = tl.where(x > best, col, best_col)
        best = tl.where(x > best, x, best)
    return best, best_col, is_nan


@triton.jit
def top_of(best, is_nan):
    return tl.where(tl.max(is_nan, 0) > 0, float("nan"), tl.max(best, 0))


@triton.jit
def first_of(x_ptr, begin, end, BLOCK: tl.constexpr):
    """The first column of the largest logit, and that logit: NaN if there is one."""
    best, best_col, is_nan = bests_of(x_ptr, begin, end, BLOCK)
    return winner(best, best_col, end), top_of(best, is_nan)


@triton.jit
def gap_of(x, top, inverse):
    return tl.where(x == top, 0.0, (x - top) * inverse)  # inf - inf is NaN


@triton.jit
def mass_of(x, top, inverse):
    return (tl.exp(gap_of(x, top, inverse)) * ONE + 0.5).to(tl.int64)


@triton.jit
def masses_before(
    x_ptr, vocab, top, inverse, least, stop, key, place, BLOCK: tl.constexpr
):  # fmt: skip
    """Of what is before `least` and `stop`: the mass, and that of what is before `key` too."""
    total, before = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    for start in range(0, vocab, BLOCK):
        x, col = load(x_ptr, start, vocab, BLOCK)
        own = key_of(x)
        mass = tl.where(is_before(own, col, least, stop), mass_of(x, top, inverse), 0)
        total += mass
        before += tl.where(is_before(own, col, key, place), mass, 0)
    return tl.sum(total, 0), tl.sum(before, 0)


@triton.jit
def goal_of(p, total):
    """The mass that top-p must reach: at least that of the first, at most all."""
    goal = tl.ceil(p * total.to(tl.float32)).to(tl.int64)
    return tl.minimum(tl.maximum(goal, 1), total)


@triton.jit
def _weights(x, top, inverse, MASSES: tl.constexpr):
    if MASSES:
        return mass_of(x, top, inverse)
    else:  # past the row too: there as for -inf, which is last
        return tl.full(x.shape, 1, tl.int32)


@triton.jit
def _reach(
    x_ptr, vocab, goal, top, inverse,
    MASSES: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key such that those from it on weigh `goal`."""
    SHIFT: tl.constexpr = 32 - 2 * DIGITS
    low = tl.cast(0, tl.uint32)
    step = tl.cast(1 << (2 * DIGITS - 2), tl.uint32)
    for _ in range(DIGITS):
        a = tl.zeros([BLOCK], tl.int64 if MASSES else tl.int32)
        b, c = a, a
        for start in range(0, vocab, BLOCK):
            x, _col = load(x_ptr, start, vocab, BLOCK)
            weight = _weights(x, top, inverse, MASSES)
            key = key_of(x) >> SHIFT
            a += tl.where(key >= low + step, weight, 0)
            b += tl.where(key >= low + 2 * step, weight, 0)
            c += tl.where(key >= low + 3 * step, weight, 0)
        low += tl.where(tl.sum(a, 0) >= goal, step, 0)
        low += tl.where(tl.sum(b, 0) >= goal, step, 0)
        low += tl.where(tl.sum(c, 0) >= goal, step, 0)
        step = step >> 2
    key = low << SHIFT
    # Of a negative number all bits are turned, those too that a narrower dtype does not have.
    return tl.where(key < SIGN, key + ((1 << SHIFT) - 1), key)


@triton.jit
def cut(
    x_ptr, vocab, goal, top, inverse,
    MASSES: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`least` and `stop` of the shortest prefix in rank that weighs `goal`, which is at least 1 and
    at most the weight of all."""
    key = _reach(x_ptr, vocab, goal, top, inverse, MASSES, DIGITS, BLOCK)
    above = tl.zeros([BLOCK], tl.int64)
    tie = tl.zeros([BLOCK], tl.int64)
    for start in range(0, vocab, BLOCK):
        x, col = load(x_ptr, start, vocab, BLOCK)
        own = key_of(x)
        weight = _weights(x, top, inverse, MASSES).to(tl.int64)
        above += tl.where(own > key, weight, 0)
        tie = tl.maximum(tie, tl.where(own == key, weight, 0))
    each = tl.maximum(tl.max(tie, 0), 1)
    wanted = (goal - tl.sum(above, 0) + each - 1) // each

    ties = tl.cast(0, tl.int64)
    place = tl.cast(0, tl.int32)
    for start in range(0, vocab, BLOCK):
        x, col = load(x_ptr, start, vocab, BLOCK)
        is_tie = ((key_of(x) == key) & (col < vocab)).to(tl.int32)
        fits = (is_tie > 0) & (ties + tl.cumsum(is_tie, 0) <= wanted)
        place = tl.maximum(place, tl.max(tl.where(fits, col + 1, 0), 0))
        ties += tl.sum(is_tie, 0)
    return key, place


@triton.jit
def cut_to_top_k(x_ptr, vocab, k, DIGITS: tl.constexpr, BLOCK: tl.constexpr):
    """`least` and `stop` of the first k in rank, which are all if k is 0."""
    least, stop = tl.cast(0, tl.uint32), tl.cast(0, tl.int32)
    if (k > 0) & (k < vocab):
        least, stop = cut(x_ptr, vocab, k, 0.0, 0.0, False, DIGITS, BLOCK)
    return least, stop


@triton.jit
def cut_to_min_p(least, stop, vocab, top, t, m):
    """`least` and `stop` of those that are also at least m times as likely as the first."""
    if m > 0:
        lowest = top.to(tl.float64) + t.to(tl.float64) * tl.log(m.to(tl.float64))
        key = key_of(lowest.to(tl.float32))
        stop = tl.where(key > least, vocab, stop)
        least = tl.maximum(least, key)
    return least, stop


@triton.jit
def prefix(
    x_ptr, vocab, first, top, t, k, p, m, DIGITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`least` and `stop` of what is left of a row after all filters."""
    if (t == 0) | (k == 1) | (p == 0):
        least, stop = key_of(top), first + 1
    else:
        least, stop = cut_to_top_k(x_ptr, vocab, k, DIGITS, BLOCK)
        if p < 1:
            inverse = 1.0 / t
            total, _ = masses_before(x_ptr, vocab, top, inverse, least, stop, least, stop, BLOCK)
            goal = goal_of(p, total)
            least, stop = cut(x_ptr, vocab, goal, top, inverse, True, DIGITS, BLOCK)
        least, stop = cut_to_min_p(least, stop, vocab, top, t, m)
    return least, stop


def row_block(vocab: int) -> int:
    """Columns that a program has in registers at a time."""
    return min(max(triton.next_power_of_2(vocab), 16), 2048)
