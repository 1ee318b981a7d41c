"""A draw from linear logits on the GPU: a program has a tile of them, in registers alone, and keeps
of each row its best score, which counts from the largest logit of the tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._gumbel import find_winners, gumbel
from tilewise.kernels.triton._options import option, strides
from tilewise.kernels.triton._philox import philox_words
from tilewise.kernels.triton._ranks import gap_of
from tilewise.kernels.triton._shared import launch_options

TOKENS = 64  # of a tile, whatever the batch: so a score is the same number in any


@triton.jit
def _logits(
    hidden_ptr, weight_ptr, bias_ptr, row, col, rows, vocab, dim, hidden_stride, weight_stride,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Of a tile; -inf past the vocabulary."""
    hidden_ptr += tl.cast(row, tl.int64)[:, None] * hidden_stride
    weight_ptr += tl.cast(col, tl.int64)[None, :] * weight_stride
    x = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, dim, DIM):
        d = start + tl.arange(0, DIM)
        hidden = tl.load(
            hidden_ptr + d[None, :], mask=(row < rows)[:, None] & (d < dim)[None, :], other=0.0
        )
        weight = tl.load(
            weight_ptr + d[:, None], mask=(col < vocab)[None, :] & (d < dim)[:, None], other=0.0
        )
        x = tl.dot(hidden, weight, x, input_precision="ieee")
    if bias_ptr is not None:
        x += tl.load(bias_ptr + col, mask=col < vocab, other=0.0).to(tl.float32)[None, :]
    x = tl.where(x == 0, 0.0, x)  # -0 ties with 0
    return tl.where((col < vocab)[None, :], x, float("-inf"))


@triton.jit(do_not_specialize=["seed", "offset"])
def _tile_kernel(
    tops_ptr, firsts_ptr, scores_ptr, places_ptr, hidden_ptr, weight_ptr, bias_ptr, t_ptr,
    seed_ptr, offset_ptr, rows, vocab, dim, hidden_stride, weight_stride, t, seed, offset,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    col = tile * TOKENS + tl.arange(0, TOKENS)
    x = _logits(
        hidden_ptr, weight_ptr, bias_ptr, row, col, rows, vocab, dim, hidden_stride,
        weight_stride, ROWS, TOKENS, DIM,
    )  # fmt: skip

    own = tl.minimum(row, rows - 1)
    t = option(t_ptr, t, own, 1, tl.float32) + tl.zeros([ROWS], tl.float32)
    seed = option(seed_ptr, seed, own, SEED_STRIDE, tl.int64) + tl.zeros([ROWS], tl.int64)
    offset = option(offset_ptr, offset, own, OFFSET_STRIDE, tl.int64) + tl.zeros([ROWS], tl.int64)
    counter_row = tl.cast(own, tl.int64) * (1 - SEED_STRIDE)
    words = philox_words(
        seed[:, None], offset[:, None], counter_row[:, None], tile * TOKENS, TOKENS
    )  # fmt: skip
    top = tl.max(tl.where(x == x, x, float("-inf")), 1)
    score = gap_of(x, top[:, None], (1.0 / t)[:, None]) + gumbel(words)
    score = tl.where(x == x, score, float("-inf"))
    best = tl.max(score, 1)
    first = tl.min(tl.where(x == top[:, None], col[None, :], vocab), 1)
    winner = tl.min(tl.where(score == best[:, None], col[None, :], vocab), 1)
    is_nan = tl.max((x != x).to(tl.int32), 1) > 0

    mask = row < rows
    place = tl.cast(row, tl.int64) * tl.num_programs(0) + tile
    tl.store(tops_ptr + place, tl.where(is_nan, float("nan"), top), mask=mask)
    tl.store(firsts_ptr + place, first, mask=mask)
    tl.store(scores_ptr + place, best, mask=mask)
    tl.store(places_ptr + place, winner, mask=mask)


def tile_of(rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows of a tile, how much of the product's inner dimension it takes at a time, and warps."""
    few = min(max(triton.next_power_of_2(rows), 16), 64)
    return {
        "ROWS": few, "TOKENS": TOKENS, "DIM": 16 if dtype == torch.float32 else 64,
        **launch_options(8 if few == 64 else 4),
    }  # fmt: skip


def linear_sample_forward(
    hidden: Tensor, weight: Tensor, linear_bias: Tensor | None, temperatures: Tensor | None,
    seeds: Tensor | None, offsets: Tensor | None, temperature: float, seed: int, offset: int,
) -> Tensor:  # fmt: skip
    """hidden [rows, dim], weight [vocab, dim], bias [vocab]; temperatures, seeds, offsets [rows],
    or numbers -> [rows]."""
    (rows, dim), vocab = hidden.shape, weight.shape[0]
    tile, tiles = tile_of(rows, hidden.dtype), triton.cdiv(vocab, TOKENS)
    tops, scores = hidden.new_empty(2, rows, tiles, dtype=torch.float32)
    firsts, places = hidden.new_empty(2, rows, tiles, dtype=torch.int32)
    _tile_kernel[(tiles, triton.cdiv(rows, tile["ROWS"]))](
        tops, firsts, scores, places, hidden, weight, linear_bias, temperatures, seeds, offsets,
        rows, vocab, dim, hidden.stride(0), weight.stride(0), float(temperature), seed, offset,
        **strides(seeds, offsets), **tile,
    )  # fmt: skip
    filters = None, temperatures, None, None, 0, float(temperature), 1.0, 0.0
    return find_winners(tops, firsts, scores, places, filters, vocab, 1, True)
