"""The Gumbel-max rule, with noise only for tokens that can still win.

The draw comes before the test for top-p: a token is left if the mass before it is short of the
goal. Where it is not, no token from it on is left either, and the draw is repeated among those
before it: 1 + log(1 / p) draws on average, against the twenty passes of a search for the threshold.
"""

import math

import numpy as np

from tilewise.kernels.numba._options import INT32, UINT32, draws_of, options_of, row_of
from tilewise.kernels.numba._parallel import callee
from tilewise.kernels.numba._philox import philox
from tilewise.kernels.numba._ranks import (
    BLOCK,
    INFINITY,
    block_maxima,
    first,
    gather_top,
    inverse_of,
    least_for_min_p,
    masses_of,
    weigh,
)
from tilewise.kernels.numba._simd import load, pointer, real, store

GROUPS = BLOCK // 4
PART = np.int64(1 << 14)  # columns whose masses are summed by themselves, and by one task
WORDS = 2.0**32
RARITY = WORDS * 1.0001  # in words, above a score of 0: masses are rounded
LOWEST_SCORE = -4.0  # below that of the first token, whose noise is above -3.2


@callee
def part_masses(values, part, count, j, top, inverse):
    """Of a part of the values: the mass before value j in rank, and all of it."""
    begin, end = part * PART, min((part + 1) * PART, count)
    v, middle = load(values, j), min(max(j, begin), end)
    before, total = masses_of(values, begin, middle, top, inverse, v, True)
    more, rest = masses_of(values, middle, end, top, inverse, v, False)
    return before + more, total + rest


@callee
def is_short(before, total, p):
    """Whether a mass is short of top-p."""
    return real(p, before) < p * real(p, total)


@callee
def _is_left(values, count, j, top, inverse, p):
    """Whether the mass before value j in rank is short of top-p."""
    before, total = 0.0, 0.0
    for part in range((count + PART - 1) // PART):
        more, rest = part_masses(values, part, count, j, top, inverse)
        before += more
        total += rest
    return is_short(before, total, p)


@callee
def _rarity(best):
    """A token of mass m gets above the score `best` by its m * rarity highest words at most, for
    noise above g is as rare as e**-g at most.
    """
    return math.exp(-best) * RARITY


@callee
def lowest_word(reach):
    return np.int64(max(WORDS - 2 - reach, 0.0)) if reach > 0.5 else np.int64(WORDS)


@callee
def score_of_gap(gap, word):
    """A gap, or a logit over the temperature, with the noise of this word."""
    return gap - math.log(-math.log((np.float64(word) + 0.5) / WORDS))


@callee
def _score(v, top, inverse, word):
    return score_of_gap(0.0 if v == top else np.float64((v - top) * inverse), word)


@callee
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


@callee
def draw(
    reaches, words, x, maxima, begin, end, vocab, top, inverse, seed, offset, row, least, stop
):  # fmt: skip
    """The winning column, and its score, of those above `least`, or equal to it and before `stop`,
    in blocks `begin` to `end`, and the first in rank."""
    winner = first(x, maxima, vocab, top)  # is always left, and a good score to begin with
    word = philox(seed, offset, row, winner >> 2)[winner & 3]
    best = _score(top, top, inverse, word)
    rarity = _rarity(best)
    for b in range(begin, end):
        lowest = lowest_word(load(reaches, b) * rarity)
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
    return winner, best


@callee
def _draw_listed(masses, values, columns, count, top, inverse, seed, offset, row, least, stop):
    """The place in the list of the winner of those above `least`, or equal and before `stop`."""
    winner, best, rarity = 0, LOWEST_SCORE, _rarity(LOWEST_SCORE)
    for j in range(count):
        v = load(values, j)
        if v > least or (v == least and j < stop):
            column = load(columns, j)
            word = philox(seed, offset, row, column >> 2)[column & 3]
            if word >= lowest_word(load(masses, j) * rarity):
                score = _score(v, top, inverse, word)
                if score > best:
                    winner, best, rarity = j, score, _rarity(score)
    return winner


@callee
def redraw(reaches, words, x, maxima, vocab, top, least, stop, inverse, p, seed, offset, row):
    """A token of those of the whole row before `least` and `stop`, cut to top-p."""
    blocks = (vocab + BLOCK - 1) // BLOCK
    while True:
        token, _ = draw(
            reaches, words, x, maxima, 0, blocks, vocab, top, inverse, seed, offset, row, least,
            stop,
        )  # fmt: skip
        if p == 1 or _is_left(x, vocab, token, top, inverse, p):
            return token
        least, stop = load(x, token), token


@callee
def _sample_listed(
    masses, values, columns, count, top, least, inverse, p, seed, offset, row
):  # fmt: skip
    """A token of those of the list from `least` on, cut to top-p."""
    stop = count
    weigh(masses, values, count, top, inverse)
    while True:
        j = _draw_listed(
            masses, values, columns, count, top, inverse, seed, offset, row, least, stop
        )
        if p == 1 or _is_left(values, count, j, top, inverse, p):
            return np.int64(load(columns, j))
        least, stop = load(values, j), j


@callee
def draw_token(
    maxima, masses, values, columns, words, x, vocab, top, t, k, p, m, seed, offset, row
):  # fmt: skip
    """A token of a row whose largest logit `top` is above -inf."""
    if t == 0 or k == 1 or p == 0:
        return first(x, maxima, vocab, top)
    inverse, least = inverse_of(t), least_for_min_p(top, t, m)
    if k == 0 or k >= vocab:
        weigh(masses, maxima, (vocab + BLOCK - 1) // BLOCK, top, inverse)
        return redraw(
            masses, words, x, maxima, vocab, top, least, vocab, inverse, p, seed, offset, row
        )
    count = gather_top(values, columns, x, maxima, vocab, k, top)
    return _sample_listed(masses, values, columns, count, top, least, inverse, p, seed, offset, row)


@callee
def draw_row(
    i, x_at, places, k, numbers, sources, draws, scratch, parts, kinds, vocab, x_stride
):  # fmt: skip
    """The token of row i, or -1; the row as it was drawn from, its largest logit and its filters.

    In `scratch` are then its block maxima. `draws` as of `draws_of`.
    """
    wide = kinds[2]
    maxima, masses = pointer(scratch + parts[0], wide), pointer(scratch + parts[1], wide)
    values, columns = pointer(scratch + parts[2], wide), pointer(scratch + parts[3], INT32)
    words, counts = pointer(scratch + parts[3], UINT32), pointer(scratch + parts[5], INT32)
    can, filters, penalties = options_of(i, places, k, numbers, wide)
    x = row_of(x_at, i, x_stride, scratch + parts[4], counts, vocab, sources, penalties, kinds)
    top = block_maxima(maxima, x, vocab)
    token = -1
    if can and top > -INFINITY:
        t, top_k, p, m = filters
        seed, place, row = draws_of(i, draws)
        token = draw_token(
            maxima, masses, values, columns, words, x, vocab, top, t, top_k, p, m, seed, place, row
        )
    return token, x, top, filters
