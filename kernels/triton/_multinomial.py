"""Several draws from one row of weights, or of their logarithms, on the GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._gumbel import draw_tokens, gumbel
from tilewise.kernels.triton._options import UNFILTERED, option, strides
from tilewise.kernels.triton._philox import philox_words
from tilewise.kernels.triton._ranks import row_block
from tilewise.kernels.triton._shared import launch_options
from tilewise.kernels.triton._top_k import top_k_forward


@triton.jit(do_not_specialize=["seed", "offset"])
def _logs_kernel(
    y_ptr, x_ptr, seed_ptr, offset_ptr, vocab, x_stride, seed, offset,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr,
    NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logarithms of weights, with the noise of a draw if wanted; of what is no weight NaN."""
    row = tl.cast(tl.program_id(0), tl.int64)
    start = tl.program_id(1) * BLOCK
    col = start + tl.arange(0, BLOCK)
    mask = col < vocab
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)

    y = tl.log(tl.where(x > 0, x, 1.0))
    y = tl.where(x > 0, y, float("-inf"))
    if NOISE:
        seed = option(seed_ptr, seed, row, SEED_STRIDE, tl.int64)
        offset = option(offset_ptr, offset, row, OFFSET_STRIDE, tl.int64)
        y += gumbel(philox_words(seed, offset, row * (1 - SEED_STRIDE), start, BLOCK))
    y = tl.where((x >= 0) & (x < float("inf")), y, float("nan"))

    tl.store(y_ptr + row * vocab + col, y, mask=mask)


@triton.jit
def _places_kernel(places_ptr, scores_ptr, indices_ptr, count, BLOCK: tl.constexpr):
    """-1 where nothing is left, and throughout a row with NaN, which is the first in rank."""
    row = tl.cast(tl.program_id(0), tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    first = tl.load(scores_ptr + row * count)
    score = tl.load(scores_ptr + row * count + place, mask=mask, other=0.0)
    index = tl.load(indices_ptr + row * count + place, mask=mask, other=0)
    index = tl.where(score > float("-inf"), index, -1)
    index = tl.where(first == first, index, -1)
    tl.store(places_ptr + row * count + place, index, mask=mask)


def multinomial_forward(
    x: Tensor, num_samples: int, replacement: bool, weights: bool, *draws
) -> Tensor:
    """x [rows, vocab], weights or logarithms; seeds and offsets -> [rows, num_samples]."""
    (rows, vocab), (seeds, offsets, *place) = x.shape, draws
    together = num_samples > 1 and not replacement
    y = x
    if weights:
        y, block = x.new_empty(rows, vocab, dtype=torch.float32), row_block(vocab)
        _logs_kernel[(rows, triton.cdiv(vocab, block))](
            y, x, seeds, offsets, vocab, x.stride(0), *place, **strides(seeds, offsets),
            NOISE=together, BLOCK=block, **launch_options(max(block // 256, 1)),
        )  # fmt: skip
    if not together:
        return draw_tokens(y, UNFILTERED, num_samples, draws).view(rows, num_samples)
    scores, indices = top_k_forward(y, num_samples)
    places, block = torch.empty_like(indices), row_block(num_samples)
    _places_kernel[(rows, triton.cdiv(num_samples, block))](
        places, scores, indices, num_samples, BLOCK=block, **launch_options(max(block // 256, 1))
    )
    return places
