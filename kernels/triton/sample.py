"""Sampling on the GPU: one program a row, which it reads from cache as often as it must; no sort.

Top-k finds the k-th logit by four histograms of its bits. Top-p comes after the draw: a token is
left if the mass before it is short of the goal. Where it is not, no token from it on is left
either, and the draw is repeated among those before it: 1 + log(1 / p) draws on average. So what is
left is always what lies before a place in rank: above `least`, or equal to it and before `stop`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._philox import philox_words, uniform
from tilewise.kernels.triton._shared import launch_options

DIGIT = tl.constexpr(256)
LARGE = tl.constexpr(3e38)
FEW = tl.constexpr(1 / 16)


@triton.jit
def _load(x_ptr, start, vocab, BLOCK: tl.constexpr):
    col = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + col, mask=col < vocab, other=float("-inf")).to(tl.float32)
    return tl.where(x == 0, 0.0, x), col  # -0 ties with 0


@triton.jit
def _is_before(x, col, least, stop):
    return (x > least) | ((x == least) & (col < stop))


@triton.jit
def _winner(best, best_col, vocab):
    """The lowest column of the largest value."""
    return tl.min(tl.where(best == tl.max(best, 0), best_col, vocab), 0)


@triton.jit
def _first(x_ptr, vocab, BLOCK: tl.constexpr):
    """The first column of the largest logit, that logit, and whether there is a NaN."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_col = tl.zeros([BLOCK], tl.int32)
    is_nan = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        x, col = _load(x_ptr, start, vocab, BLOCK)
        is_nan |= (x != x).to(tl.int32)
        best_col = tl.where(x > best, col, best_col)
        best = tl.where(x > best, x, best)
    return _winner(best, best_col, vocab), tl.max(best, 0), tl.max(is_nan, 0) > 0


@triton.jit
def _cut_to_top_k(x_ptr, vocab, k, BLOCK: tl.constexpr):
    """`least` and `stop` of the first k logits in rank."""
    prefix = tl.cast(0, tl.int64)
    wanted = tl.cast(k, tl.int64)
    digit = tl.arange(0, DIGIT)
    for i in tl.static_range(4):
        shift = 24 - 8 * i
        counts = tl.zeros([DIGIT], tl.int32)
        for start in range(0, vocab, BLOCK):
            x, col = _load(x_ptr, start, vocab, BLOCK)
            bits = x.to(tl.int32, bitcast=True)
            key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000
            here = (col < vocab) & ((key >> (shift + 8)) == prefix)
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), DIGIT, mask=here)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        chosen = tl.max(tl.where(at_least >= wanted, digit, 0), 0)
        wanted -= tl.sum(tl.where(digit > chosen, counts, 0), 0)
        prefix = prefix * 256 + chosen
    key = (prefix - 0x80000000).to(tl.int32)
    least = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

    ties = tl.cast(0, tl.int64)
    stop = tl.cast(0, tl.int32)
    for start in range(0, vocab, BLOCK):
        x, col = _load(x_ptr, start, vocab, BLOCK)
        tie = ((x == least) & (col < vocab)).to(tl.int32)
        fits = (tie > 0) & (ties + tl.cumsum(tie, 0) <= wanted)
        stop = tl.maximum(stop, tl.max(tl.where(fits, col + 1, 0), 0))
        ties += tl.sum(tie, 0)
    return least, tl.where(least > float("-inf"), stop, 0)


@triton.jit
def _gap(x, top, inverse):
    return tl.where(x == top, 0.0, (x - top) * inverse)  # inf - inf is NaN


@triton.jit
def _mass_before(x_ptr, vocab, top, inverse, least, stop, BLOCK: tl.constexpr):
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        x, col = _load(x_ptr, start, vocab, BLOCK)
        mass += tl.where(_is_before(x, col, least, stop), tl.exp(_gap(x, top, inverse)), 0.0)
    return tl.sum(mass, 0)


@triton.jit
def _gumbel(word):
    u, rest = uniform(word), uniform(~word)  # rest = 1 - u, to full precision where u is near 1
    series = 1 / 5 + rest * (1 / 6 + rest * (1 / 7))
    series = rest * (1.0 + rest * (1 / 2 + rest * (1 / 3 + rest * (1 / 4 + rest * series))))
    return -tl.log(tl.where(rest < FEW, series, -tl.log(u)))


@triton.jit
def _draw(x_ptr, vocab, top, inverse, seed, offset, row, least, stop, BLOCK: tl.constexpr):
    """The column of the largest score of those before `least` and `stop`."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_col = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        x, col = _load(x_ptr, start, vocab, BLOCK)
        score = _gap(x, top, inverse) + _gumbel(philox_words(seed, offset, row, start, BLOCK))
        score = tl.where(_is_before(x, col, least, stop), score, float("-inf"))
        best_col = tl.where(score > best, col, best_col)
        best = tl.where(score > best, score, best)
    return _winner(best, best_col, vocab)


@triton.jit
def _option(ptr, number, row, stride, dtype: tl.constexpr):
    """The row's own, where there is a tensor, else the number for all."""
    if ptr is None:
        return tl.cast(number, dtype)
    else:
        return tl.load(ptr + row * stride).to(dtype)


@triton.jit(do_not_specialize=["k", "seed", "offset"])
def _sample_kernel(
    tokens_ptr, x_ptr, t_ptr, k_ptr, p_ptr, seed_ptr, offset_ptr,
    vocab, x_stride, t, k, p, seed, offset,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    x_ptr += row * x_stride
    t = _option(t_ptr, t, row, 1, tl.float32)
    k = _option(k_ptr, k, row, 1, tl.int64)
    p = _option(p_ptr, p, row, 1, tl.float32)
    seed = _option(seed_ptr, seed, row, SEED_STRIDE, tl.int64)
    offset = _option(offset_ptr, offset, row, OFFSET_STRIDE, tl.int64)

    token, top, is_nan = _first(x_ptr, vocab, BLOCK)
    can = (t >= 0) & (t < float("inf")) & (k >= 0) & (p >= 0) & (p <= 1)
    can = can & (top > float("-inf")) & (is_nan == 0)
    if can & (t > 0) & (k != 1) & (p > 0):
        inverse = tl.minimum(1.0 / t, LARGE)
        least, stop = tl.cast(float("-inf"), tl.float32), tl.cast(0, tl.int32)
        if (k > 0) & (k < vocab):
            least, stop = _cut_to_top_k(x_ptr, vocab, k, BLOCK)
        goal = tl.cast(float("inf"), tl.float32)
        if p < 1:
            goal = p * _mass_before(x_ptr, vocab, top, inverse, least, stop, BLOCK)
        counter_row = row * (1 - SEED_STRIDE)
        before = goal
        while before >= goal:
            token = _draw(x_ptr, vocab, top, inverse, seed, offset, counter_row, least, stop, BLOCK)
            least, stop = tl.load(x_ptr + token).to(tl.float32), token
            before = tl.cast(0.0, tl.float32)
            if p < 1:
                before = _mass_before(x_ptr, vocab, top, inverse, least, stop, BLOCK)

    tl.store(tokens_ptr + row, tl.where(can, token, -1).to(tl.int64))


def sample_forward(
    logits: Tensor, top_ks: Tensor | None, temperatures: Tensor | None, top_ps: Tensor | None,
    *rest,
) -> Tensor:  # fmt: skip
    """logits [batch, vocab]; options [batch], seeds and offsets also [], or numbers -> [batch].

    Of the rest, min-p, penalties, bias and mask are off: the front door knows they are lacking.
    """
    top_k, temperature, top_p, *off, seeds, offsets, seed, offset = rest[7:]
    assert not any(x is not None for x in rest[:7]) and off == [0.0, 1.0, 0.0, 0.0]
    rows, vocab = logits.shape
    tokens = logits.new_empty(rows, dtype=torch.int64)
    block = min(max(triton.next_power_of_2(vocab), 16), 2048)
    _sample_kernel[(rows,)](
        tokens, logits, temperatures, top_ks, top_ps, seeds, offsets,
        vocab, logits.stride(0), float(temperature), top_k, float(top_p), seed, offset,
        SEED_STRIDE=0 if seeds is None else seeds.ndim,
        OFFSET_STRIDE=0 if offsets is None else offsets.ndim,
        BLOCK=block, **launch_options(max(block // 128, 1)),
    )  # fmt: skip
    return tokens
