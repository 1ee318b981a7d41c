"""The Gumbel-max rule on the GPU: a program a row, or for few rows several, whose winners meet.

What a small top-k leaves is on a list, of which it is drawn. Of top-p in a row that one program has
the draw comes first: where the mass before the token is short of the goal, it is one of those left,
and so the winner among them. Only elsewhere the place of the goal is searched, and the draw
repeated before it. The scores are the same numbers however a row is cut or shared out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._options import filters_of, option, strides
from tilewise.kernels.triton._parts import find_tops, part_of, parts_of, top_of_parts
from tilewise.kernels.triton._philox import philox, philox_words, uniform
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
from tilewise.kernels.triton._shortlist import (
    LAST,
    ROOM,
    TILE,
    Shortlist,
    cuts_on_list,
    has_list,
    has_many,
    is_listed,
    left_of,
    listed,
    logit_of,
    place_of,
    selects,
    shortlist,
)

FEW = tl.constexpr(1 / 16)


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


@triton.jit
def _draw_listed(
    ranks_ptr, count, top, inverse, seed, offset, row, least, stop, DIGITS: tl.constexpr
):  # fmt: skip
    """As `_draw`, of those on a list."""
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_col = tl.zeros([TILE], tl.int32)
    for start in range(0, count, TILE):
        rank = listed(ranks_ptr, start, count)
        key, col = place_of(rank, DIGITS)
        a, b, c, d = philox(seed, offset, row, col // 4)
        word = tl.where(col % 4 < 2, tl.where(col % 4 == 0, a, b), tl.where(col % 4 == 2, c, d))
        score = gap_of(logit_of(key), top, inverse) + gumbel(word)
        left = (rank >= 0) & is_before(key, col, least, stop)
        score = tl.where(left, score, float("-inf"))
        best_col = tl.where((score > best) | ((score == best) & (col < best_col)), col, best_col)
        best = tl.maximum(score, best)
    return tl.min(tl.where(best == tl.max(best, 0), best_col, LAST), 0)


@triton.jit
def _draw_cut(
    x_ptr, vocab, top, seed, offset, row, t, k, p, m, DIGITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The column drawn of a row that is cut, by one program."""
    inverse = 1.0 / t
    least, stop = cut_to_top_k(x_ptr, vocab, k, DIGITS, BLOCK)
    likely, place = cut_to_min_p(least, stop, vocab, top, t, m)
    token, _ = _draw(x_ptr, 0, vocab, top, inverse, seed, offset, row, likely, place, BLOCK)
    if p < 1:
        drawn = tl.load(x_ptr + token).to(tl.float32)
        drawn = key_of(tl.where(drawn == 0, 0.0, drawn))
        total, before = masses_before(
            x_ptr, vocab, top, inverse, least, stop, drawn, token, BLOCK
        )  # fmt: skip
        goal = goal_of(p, total)
        if before >= goal:
            least, stop = cut(x_ptr, vocab, goal, top, inverse, True, DIGITS, BLOCK)
            token, _ = _draw(x_ptr, 0, vocab, top, inverse, seed, offset, row, least, stop, BLOCK)
    return token


@triton.jit(do_not_specialize=["k", "seed", "offset", "samples"])
def _sample_kernel(
    tokens_ptr, x_ptr, tops_ptr, firsts_ptr, ranks_ptr, sums_ptr, k_ptr, t_ptr, p_ptr, m_ptr,
    seed_ptr, offset_ptr, vocab, x_stride, parts, samples, k, t, p, m, seed, offset,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr, WORDS: tl.constexpr,
    DIGITS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    draw = tl.cast(tl.program_id(0), tl.int64)
    row, counter_row, seed, offset = _place_of(
        draw, seed_ptr, offset_ptr, seed, offset, samples, SEED_STRIDE, OFFSET_STRIDE
    )
    x_ptr += row * x_stride
    t, k, p, m, can = filters_of(row, k_ptr, t_ptr, p_ptr, m_ptr, k, t, p, m)

    if ranks_ptr is None:
        token, top = first_of(x_ptr, 0, vocab, BLOCK)
    else:
        top, token = top_of_parts(tops_ptr, firsts_ptr, row, parts, vocab, PARTS)
    can = can & (top > float("-inf"))
    whole = can & (t > 0) & (k != 1) & (p > 0)
    if ranks_ptr is not None:
        ranks_ptr += row * ROOM
        sums_ptr += row * WORDS
        if can & has_list(sums_ptr, t, k, p, vocab, WORDS):
            whole = False
            least, stop = cuts_on_list(ranks_ptr, sums_ptr, vocab, top, t, p, m, DIGITS)
            token = _draw_listed(
                ranks_ptr, tl.load(sums_ptr), top, 1.0 / t, seed, offset, counter_row,
                least, stop, DIGITS,
            )  # fmt: skip
    if whole:
        token = _draw_cut(x_ptr, vocab, top, seed, offset, counter_row, t, k, p, m, DIGITS, BLOCK)

    tl.store(tokens_ptr + draw, tl.where(can, token, -1).to(tl.int64))


@triton.jit(do_not_specialize=["k", "seed", "offset", "samples"])
def _scores_kernel(
    scores_ptr, places_ptr, x_ptr, tops_ptr, firsts_ptr, ranks_ptr, sums_ptr,
    k_ptr, t_ptr, p_ptr, m_ptr, seed_ptr, offset_ptr,
    vocab, x_stride, samples, k, t, p, m, seed, offset,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr, WORDS: tl.constexpr,
    DIGITS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    draw = tl.cast(tl.program_id(0), tl.int64)
    parts = tl.num_programs(1)
    row, counter_row, seed, offset = _place_of(
        draw, seed_ptr, offset_ptr, seed, offset, samples, SEED_STRIDE, OFFSET_STRIDE
    )
    x_ptr += row * x_stride
    t, k, p, m, can = filters_of(row, k_ptr, t_ptr, p_ptr, m_ptr, k, t, p, m)
    begin, end = part_of(vocab, BLOCK)

    top, first = top_of_parts(tops_ptr, firsts_ptr, row, parts, vocab, PARTS)
    token, score = tl.cast(0, tl.int32), tl.cast(float("-inf"), tl.float32)
    if can & (t > 0) & (top > float("-inf")):
        least, stop = tl.cast(0, tl.uint32), tl.cast(0, tl.int32)
        if ranks_ptr is None:
            least, stop = cut_to_min_p(least, stop, vocab, top, t, m)
        else:
            least, stop = left_of(
                x_ptr, ranks_ptr, sums_ptr, row, vocab, first, top, t, k, p, m,
                WORDS, DIGITS, BLOCK,
            )  # fmt: skip
        token, score = _draw(
            x_ptr, begin, end, top, 1.0 / t, seed, offset, counter_row, least, stop, BLOCK
        )  # fmt: skip

    tl.store(places_ptr + draw * parts + tl.program_id(1), token)
    tl.store(scores_ptr + draw * parts + tl.program_id(1), score)


@triton.jit(do_not_specialize=["k", "samples"])
def _winners_kernel(
    tokens_ptr, scores_ptr, places_ptr, tops_ptr, firsts_ptr, k_ptr, t_ptr, p_ptr, m_ptr,
    vocab, samples, parts, k, t, p, m, OWN_TOPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The token of each draw; with OWN_TOPS, scores count from the largest logit of their part."""
    draw = tl.cast(tl.program_id(0), tl.int64)
    row = draw // samples
    t, _, _, _, can = filters_of(row, k_ptr, t_ptr, p_ptr, m_ptr, k, t, p, m)
    top, first = top_of_parts(tops_ptr, firsts_ptr, row, parts, vocab, PARTS)
    part = tl.arange(0, PARTS)
    scores = tl.load(scores_ptr + draw * parts + part, mask=part < parts, other=float("-inf"))
    places = tl.load(places_ptr + draw * parts + part, mask=part < parts, other=0)
    if OWN_TOPS:
        tops = tl.load(tops_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
        scores += gap_of(tops, top, 1.0 / t)
    token = tl.where(t > 0, winner(scores, places, vocab), first)
    can = can & (top > float("-inf"))
    tl.store(tokens_ptr + draw, tl.where(can, token, -1).to(tl.int64))


def draw_tokens(
    rows: Tensor, filters: tuple, samples: int, draws: tuple, found: Shortlist | None = None
) -> Tensor:
    """rows [batch, vocab]; `_options.filters`; seeds, offsets, a seed and an offset; the lists of
    the rows, if there are -> [batch * samples], sample s of a row being at its offset + s."""
    seeds, offsets, *place = draws
    (batch, vocab), block = rows.shape, row_block(rows.shape[1])
    count = batch * samples
    parts = parts_of(count, vocab)
    on_list = is_listed(filters, vocab, parts)
    alone = parts == 1 or (not has_many(filters) if on_list else selects(filters))
    if found is None and on_list:
        found = shortlist(rows, filters, parts)
    elif found is None:
        found = Shortlist(parts, *((None, None) if alone else find_tops(rows, parts)))
    tail = *filters[:4], seeds, offsets, vocab, rows.stride(0)
    common = {
        **strides(seeds, offsets), "WORDS": found.words, "DIGITS": DIGITS[rows.dtype],
        "BLOCK": block, "PARTS": triton.next_power_of_2(found.parts),
        **launch_options(max(block // 128, 1)),
    }  # fmt: skip
    if alone:
        tokens = rows.new_empty(count, dtype=torch.int64)
        _sample_kernel[(count,)](
            tokens, rows, *found[1:], *tail, found.parts, samples, *filters[4:], *place,
            **common,
        )  # fmt: skip
        return tokens
    scores = rows.new_empty(count, found.parts, dtype=torch.float32)
    places = rows.new_empty(count, found.parts, dtype=torch.int32)
    _scores_kernel[(count, found.parts)](
        scores, places, rows, *found[1:], *tail, samples, *filters[4:], *place, **common
    )
    return find_winners(found.tops, found.firsts, scores, places, filters, vocab, samples, False)


def find_winners(tops, firsts, scores, places, filters, vocab, samples, own_tops) -> Tensor:
    """Of each part [batch, parts] the largest logit and its column, and of each draw
    [batch * samples, parts] the best score and its column -> [batch * samples]."""
    draws, parts = scores.shape
    tokens, width = scores.new_empty(draws, dtype=torch.int64), triton.next_power_of_2(parts)
    _winners_kernel[(draws,)](
        tokens, scores, places, tops, firsts, *filters[:4], vocab, samples, parts, *filters[4:],
        OWN_TOPS=own_tops, PARTS=width, **launch_options(min(max(width // 256, 1), 16)),
    )  # fmt: skip
    return tokens
