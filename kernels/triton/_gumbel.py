"""The Gumbel-max rule on the GPU: a program a row, or for few rows several, whose winners meet.

Of top-p the draw comes first: where the mass before the token is short of the goal, it is one of
those left, and so the winner among them. Only elsewhere the place of the goal is searched, and the
draw repeated before it. The scores are the same numbers however a row is cut.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._options import filters_of, option, strides
from tilewise.kernels.triton._philox import philox_words, uniform
from tilewise.kernels.triton._ranks import (
    DIGITS,
    cut,
    cut_to_min_p,
    cut_to_top_k,
    first_of,
    gap_of,
    goal_of,
    is_before,
    key_of,
    load,
    masses_before,
    row_block,
    winner,
)
from tilewise.kernels.triton._shared import launch_options

FEW = tl.constexpr(1 / 16)
MANY_ROWS = 64  # enough programs by themselves
PROGRAMS, MAX_PARTS = 256, 32
PART_BLOCKS = 2  # blocks of columns, at least, that are worth a program


@triton.jit
def gumbel(word):
    u, rest = uniform(word), uniform(~word)  # rest = 1 - u, to full precision where u is near 1
    series = 1 / 5 + rest * (1 / 6 + rest * (1 / 7))
    series = rest * (1.0 + rest * (1 / 2 + rest * (1 / 3 + rest * (1 / 4 + rest * series))))
    return -tl.log(tl.where(rest < FEW, series, -tl.log(u)))


@triton.jit
def _draw(
    x_ptr, begin, end, top, inverse, seed, offset, row, least, stop, BLOCK: tl.constexpr
):  # fmt: skip
    """The column of the largest score, of those before `least` and `stop`, and that score."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_col = tl.zeros([BLOCK], tl.int32) + begin
    for start in range(begin, end, BLOCK):
        x, col = load(x_ptr, start, end, BLOCK)
        score = gap_of(x, top, inverse) + gumbel(philox_words(seed, offset, row, start, BLOCK))
        score = tl.where(is_before(key_of(x), col, least, stop), score, float("-inf"))
        best_col = tl.where(score > best, col, best_col)
        best = tl.where(score > best, score, best)
    return winner(best, best_col, end), tl.max(best, 0)


@triton.jit
def _place_of(
    draw, seed_ptr, offset_ptr, seed, offset, samples,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr,
):  # fmt: skip
    """Of a draw the row it is from, the row of its counters, its seed and offset."""
    row = draw // samples
    seed = option(seed_ptr, seed, row, SEED_STRIDE, tl.int64)
    offset = option(offset_ptr, offset, row, OFFSET_STRIDE, tl.int64)
    return row, row * (1 - SEED_STRIDE), seed, offset + draw % samples


@triton.jit(do_not_specialize=["k", "seed", "offset", "samples"])
def _sample_kernel(
    tokens_ptr, x_ptr, k_ptr, t_ptr, p_ptr, m_ptr, seed_ptr, offset_ptr,
    vocab, x_stride, samples, k, t, p, m, seed, offset,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr,
    DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    draw = tl.cast(tl.program_id(0), tl.int64)
    row, counter_row, seed, offset = _place_of(
        draw, seed_ptr, offset_ptr, seed, offset, samples, SEED_STRIDE, OFFSET_STRIDE
    )
    x_ptr += row * x_stride
    t, k, p, m, can = filters_of(row, k_ptr, t_ptr, p_ptr, m_ptr, k, t, p, m)

    token, top = first_of(x_ptr, 0, vocab, BLOCK)
    can = can & (top > float("-inf"))
    if can & (t > 0) & (k != 1) & (p > 0):
        inverse = 1.0 / t
        least, stop = cut_to_top_k(x_ptr, vocab, k, DIGITS, BLOCK)
        likely, place = cut_to_min_p(least, stop, vocab, top, t, m)
        token, _ = _draw(
            x_ptr, 0, vocab, top, inverse, seed, offset, counter_row, likely, place, BLOCK
        )  # fmt: skip
        if p < 1:
            drawn = tl.load(x_ptr + token).to(tl.float32)
            drawn = key_of(tl.where(drawn == 0, 0.0, drawn))
            total, before = masses_before(
                x_ptr, vocab, top, inverse, least, stop, drawn, token, BLOCK
            )  # fmt: skip
            goal = goal_of(p, total)
            if before >= goal:
                least, stop = cut(x_ptr, vocab, goal, top, inverse, True, DIGITS, BLOCK)
                token, _ = _draw(
                    x_ptr, 0, vocab, top, inverse, seed, offset, counter_row, least, stop, BLOCK
                )  # fmt: skip

    tl.store(tokens_ptr + draw, tl.where(can, token, -1).to(tl.int64))


@triton.jit
def _part_of(vocab, BLOCK: tl.constexpr):
    """The columns of a program of those of a row."""
    size = tl.cdiv(tl.cdiv(vocab, BLOCK), tl.num_programs(1)) * BLOCK
    begin = tl.program_id(1) * size
    return begin, tl.minimum(begin + size, vocab)


@triton.jit
def _tops_kernel(tops_ptr, firsts_ptr, x_ptr, vocab, x_stride, BLOCK: tl.constexpr):
    row = tl.cast(tl.program_id(0), tl.int64)
    begin, end = _part_of(vocab, BLOCK)
    first, top = first_of(x_ptr + row * x_stride, begin, end, BLOCK)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(tops_ptr + place, top)
    tl.store(firsts_ptr + place, first)


@triton.jit
def _top_of(tops_ptr, firsts_ptr, row, parts, vocab, PARTS: tl.constexpr):
    """The largest logit of a row, NaN if there is one, and its first column."""
    part = tl.arange(0, PARTS)
    tops = tl.load(tops_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
    firsts = tl.load(firsts_ptr + row * parts + part, mask=part < parts, other=0)
    top = tl.max(tl.where(tops == tops, tops, float("-inf")), 0)
    first = tl.min(tl.where(tops == top, firsts, vocab), 0)
    is_nan = tl.max((tops != tops).to(tl.int32), 0)
    return tl.where(is_nan > 0, float("nan"), top), first


@triton.jit(do_not_specialize=["seed", "offset", "samples"])
def _scores_kernel(
    scores_ptr, places_ptr, x_ptr, tops_ptr, firsts_ptr, t_ptr, m_ptr, seed_ptr, offset_ptr,
    vocab, x_stride, samples, t, m, seed, offset,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    draw = tl.cast(tl.program_id(0), tl.int64)
    parts = tl.num_programs(1)
    row, counter_row, seed, offset = _place_of(
        draw, seed_ptr, offset_ptr, seed, offset, samples, SEED_STRIDE, OFFSET_STRIDE
    )
    t, _, _, m, can = filters_of(row, None, t_ptr, None, m_ptr, 0, t, 1.0, m)
    begin, end = _part_of(vocab, BLOCK)

    top, _ = _top_of(tops_ptr, firsts_ptr, row, parts, vocab, PARTS)
    token, score = tl.cast(0, tl.int32), tl.cast(float("-inf"), tl.float32)
    if can & (t > 0) & (top > float("-inf")):
        least, stop = tl.cast(0, tl.uint32), tl.cast(0, tl.int32)
        least, stop = cut_to_min_p(least, stop, vocab, top, t, m)
        token, score = _draw(
            x_ptr + row * x_stride, begin, end, top, 1.0 / t, seed, offset, counter_row,
            least, stop, BLOCK,
        )  # fmt: skip

    tl.store(places_ptr + draw * parts + tl.program_id(1), token)
    tl.store(scores_ptr + draw * parts + tl.program_id(1), score)


@triton.jit(do_not_specialize=["samples"])
def _winners_kernel(
    tokens_ptr, scores_ptr, places_ptr, tops_ptr, firsts_ptr, t_ptr, m_ptr,
    vocab, samples, parts, t, m, OWN_TOPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The token of each draw; with OWN_TOPS, scores count from the largest logit of their part."""
    draw = tl.cast(tl.program_id(0), tl.int64)
    row = draw // samples
    t, _, _, _, can = filters_of(row, None, t_ptr, None, m_ptr, 0, t, 1.0, m)
    top, first = _top_of(tops_ptr, firsts_ptr, row, parts, vocab, PARTS)
    part = tl.arange(0, PARTS)
    scores = tl.load(scores_ptr + draw * parts + part, mask=part < parts, other=float("-inf"))
    places = tl.load(places_ptr + draw * parts + part, mask=part < parts, other=0)
    if OWN_TOPS:
        tops = tl.load(tops_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
        scores += gap_of(tops, top, 1.0 / t)
    token = tl.where(t > 0, winner(scores, places, vocab), first)
    can = can & (top > float("-inf"))
    tl.store(tokens_ptr + draw, tl.where(can, token, -1).to(tl.int64))


def parts_of(draws: int, vocab: int) -> int:
    """How many programs share a row where nothing but the temperature and min-p selects."""
    if draws >= MANY_ROWS:
        return 1
    most = vocab // (PART_BLOCKS * row_block(vocab))
    return max(min(most, PROGRAMS // max(draws, 1), MAX_PARTS), 1)


def draw_tokens(rows: Tensor, filters: tuple, samples: int, draws: tuple) -> Tensor:
    """rows [batch, vocab]; `_options.filters`; seeds, offsets, a seed and an offset
    -> [batch * samples], sample s of a row being at its offset + s."""
    k_each, t_each, p_each, m_each, k, t, p, m = filters
    seeds, offsets, *place = draws
    (batch, vocab), block = rows.shape, row_block(rows.shape[1])
    count = batch * samples
    selects = k_each is not None or p_each is not None or k > 0 or p < 1
    parts = 1 if selects else parts_of(count, vocab)
    warps = launch_options(max(block // 128, 1))
    if parts == 1:
        tokens = rows.new_empty(count, dtype=torch.int64)
        _sample_kernel[(count,)](
            tokens, rows, k_each, t_each, p_each, m_each, seeds, offsets,
            vocab, rows.stride(0), samples, k, t, p, m, *place,
            **strides(seeds, offsets), DIGITS=DIGITS[rows.dtype], BLOCK=block, **warps,
        )  # fmt: skip
        return tokens
    floats = rows.new_empty(batch + count, parts, dtype=torch.float32)
    places = rows.new_empty(batch + count, parts, dtype=torch.int32)
    tops, firsts = floats[:batch], places[:batch]
    _tops_kernel[(batch, parts)](tops, firsts, rows, vocab, rows.stride(0), BLOCK=block, **warps)
    _scores_kernel[(count, parts)](
        floats[batch:], places[batch:], rows, tops, firsts, t_each, m_each, seeds, offsets,
        vocab, rows.stride(0), samples, t, m, *place,
        **strides(seeds, offsets), BLOCK=block, PARTS=triton.next_power_of_2(parts), **warps,
    )  # fmt: skip
    return find_winners(
        tops, firsts, floats[batch:], places[batch:], t_each, m_each, vocab, samples, t, m, False
    )


def find_winners(
    tops, firsts, scores, places, t_each, m_each, vocab, samples, t, m, own_tops
) -> Tensor:  # fmt: skip
    """Of each part [batch, parts] the largest logit and its column, and of each draw
    [batch * samples, parts] the best score and its column -> [batch * samples]."""
    draws, parts = scores.shape
    tokens, width = scores.new_empty(draws, dtype=torch.int64), triton.next_power_of_2(parts)
    _winners_kernel[(draws,)](
        tokens, scores, places, tops, firsts, t_each, m_each, vocab, samples, parts, t, m,
        OWN_TOPS=own_tops, PARTS=width, **launch_options(min(max(width // 256, 1), 16)),
    )  # fmt: skip
    return tokens
