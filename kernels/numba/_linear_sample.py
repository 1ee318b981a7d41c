"""A draw from linear logits, of which there are never more than a tile of the vocabulary."""

import math

import numpy as np
import torch
from torch import Tensor

from tilewise.kernels.numba._gumbel import RARITY, lowest_word, score_of_gap
from tilewise.kernels.numba._options import INT64, packed_draws
from tilewise.kernels.numba._parallel import Kernel, callee
from tilewise.kernels.numba._philox import philox
from tilewise.kernels.numba._products import logits
from tilewise.kernels.numba._shared import wide_dtype
from tilewise.kernels.numba._simd import KINDS, address, exp, load, offset, pointer, real, store

INFINITY = math.inf
NONE = np.int64(-1)
TILE, TILE_ELEMENTS = 8192, 1 << 22  # tokens at a time, and logits, at most
FEWEST = 256


@callee
def _greedy(x, count, first, top, token):
    """The first of the largest, of those before and of this tile."""
    for j in range(count):
        v = load(x, j)
        if v > top or v != v:
            top, token = (v, first + j) if top == top else (top, token)
    return top, token


@callee
def _best(x, count, first, t, highest, best, token, seed, place, row):
    """The largest logit, the best score and its token, of those before and of this tile.

    A score is logit / temperature + noise; of infinite logits it is the noise, and once there is
    one no finite logit counts. Noise is drawn where its word is high enough to win.
    """
    for group in range((count + 3) // 4):
        words = philox(seed, place, row, first // 4 + group)
        for i in range(min(4, count - group * 4)):
            v = load(x, group * 4 + i)
            if v != v:
                highest = v
            if v == INFINITY and highest < INFINITY:
                best = -INFINITY
            highest = v if v > highest else highest
            if v > -INFINITY and (v == INFINITY or highest < INFINITY):
                gap = 0.0 if v == INFINITY else np.float64(v) / t
                reach = exp(real(x, min(gap - best, 80.0)))
                if np.int64(words[i]) >= lowest_word(np.float64(reach) * RARITY):
                    score = score_of_gap(gap, words[i])
                    if score > best:
                        best, token = score, first + group * 4 + i
    return highest, best, token


@Kernel
def _update(
    i, tokens_at, tops_at, scores_at, x_at, ts_at, draws, wide, first, count, x_stride, t
):  # fmt: skip
    seeds_at, offsets_at, seed_stride, offset_stride, seed, place = draws
    tokens, tops = pointer(tokens_at, INT64), pointer(tops_at, wide)
    scores = pointer(scores_at, np.float64(0))
    x = offset(pointer(x_at, wide), i * x_stride)
    t = np.float64(load(pointer(ts_at, wide), i)) if ts_at else t
    token, top = load(tokens, i), load(tops, i)
    if not (t >= 0 and t < INFINITY):
        return
    if t == 0:
        top, token = _greedy(x, count, first, top, token)
    else:
        top, score, token = _best(
            x, count, first, t, top, load(scores, i), token,
            load(pointer(seeds_at, INT64), i * seed_stride) if seeds_at else seed,
            load(pointer(offsets_at, INT64), i * offset_stride) if offsets_at else place,
            0 if seed_stride else i,
        )  # fmt: skip
        store(scores, i, score)
    store(tops, i, top)
    store(tokens, i, token if top > -INFINITY else NONE)


def linear_sample_forward(
    hidden: Tensor, weight: Tensor, linear_bias: Tensor | None, temperatures: Tensor | None,
    seeds: Tensor | None, offsets: Tensor | None, temperature: float, seed: int, offset: int,
) -> Tensor:  # fmt: skip
    """hidden [rows, dim], weight [vocab, dim], bias [vocab]; temperatures, seeds, offsets [rows],
    or numbers -> [rows]."""
    rows, vocab, wide = len(hidden), len(weight), wide_dtype(hidden.dtype)
    tokens = torch.full((rows,), -1)
    tops = torch.full((rows,), -INFINITY, dtype=wide)
    scores = torch.full((rows,), -INFINITY, dtype=torch.float64)
    hidden = hidden.to(wide)
    tile = max(min(TILE, TILE_ELEMENTS // rows // FEWEST * FEWEST), FEWEST)
    memory = hidden.new_empty(rows, min(tile, vocab))
    draws = packed_draws(seeds, offsets, seed, offset)
    for first in range(0, vocab, tile):
        part = weight[first : first + tile].to(wide)
        bias = None if linear_bias is None else linear_bias[first : first + tile].to(wide)
        x = memory[:, : len(part)]
        logits(x, hidden, part, bias)
        _update(
            rows, x.numel(), address(tokens), address(tops), address(scores), address(x),
            address(temperatures), draws, KINDS[wide], first, len(part), x.stride(0),
            float(temperature),
        )  # fmt: skip
    return tokens
