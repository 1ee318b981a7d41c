"""The options of rows of logits; and the rows with penalties, bias and mask, in fp32.

A row with any of these is written once, and from there on is a row like any other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._ranks import row_block
from tilewise.kernels.triton._shared import launch_options

COUNT = 17  # of the arguments of a launcher that are options
UNFILTERED = (None, None, None, None, 0, 1.0, 1.0, 0.0)  # as `filters`
TOKENS = 1024  # of a history, that a program counts


@triton.jit
def option(ptr, number, row, stride, dtype: tl.constexpr):
    """The row's own, where there is a tensor, else the number for all."""
    if ptr is None:
        return tl.cast(number, dtype)
    else:
        return tl.load(ptr + row * stride).to(dtype)


@triton.jit
def filters_of(row, k_ptr, t_ptr, p_ptr, m_ptr, k, t, p, m):
    """Temperature, top-k, top-p and min-p of a row, and whether they are in their ranges."""
    k = option(k_ptr, k, row, 1, tl.int64)
    t = option(t_ptr, t, row, 1, tl.float32)
    p = option(p_ptr, p, row, 1, tl.float32)
    m = option(m_ptr, m, row, 1, tl.float32)
    can = (t >= 0) & (t < float("inf")) & (k >= 0) & (p >= 0) & (p <= 1) & (m >= 0) & (m <= 1)
    return t, k, p, m, can


@triton.jit
def _count_kernel(counts_ptr, history_ptr, length, vocab, BLOCK: tl.constexpr):
    row = tl.cast(tl.program_id(0), tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(history_ptr + row * length + place, mask=place < length, other=-1)
    known = (token >= 0) & (token < vocab)
    tl.atomic_add(counts_ptr + row * vocab + token, 1, mask=known, sem="relaxed")


@triton.jit
def _adjust_kernel(
    y_ptr, x_ptr, counts_ptr, bias_ptr, mask_ptr, repetitions_ptr, presences_ptr, frequencies_ptr,
    vocab, x_stride, bias_stride, mask_stride, repetition, presence, frequency,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < vocab
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)

    if counts_ptr is not None:
        count = tl.load(counts_ptr + row * vocab + col, mask=mask, other=0)
        repetition = option(repetitions_ptr, repetition, row, 1, tl.float32)
        presence = option(presences_ptr, presence, row, 1, tl.float32)
        frequency = option(frequencies_ptr, frequency, row, 1, tl.float32)
        repeated = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + repetition), x * repetition)
        penalised = repeated - frequency * count.to(tl.float32) - presence
        x = tl.where(count > 0, penalised, x)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + row * bias_stride + col, mask=mask, other=0.0)
    if mask_ptr is not None:
        words = tl.load(mask_ptr + row * mask_stride + col // 32, mask=mask, other=0)
        x = tl.where((words >> (col % 32)) & 1 > 0, x, float("-inf"))
    if counts_ptr is not None:  # a row without a token is NaN throughout
        can = (repetition > 0) & (repetition < float("inf"))
        can = can & (tl.abs(presence) < float("inf")) & (tl.abs(frequency) < float("inf"))
        x = tl.where(can, x, float("nan"))

    tl.store(y_ptr + row * vocab + col, x, mask=mask)


def adjusted(logits: Tensor, arguments: tuple) -> Tensor:
    """logits [batch, vocab] and what OPTIONS says -> rows to draw from: themselves, or fp32."""
    repetitions, presences, frequencies, history, bias, mask = arguments[4:10]
    if history is None and bias is None and mask is None:
        return logits
    (rows, vocab), counts = logits.shape, None
    if history is None:
        y = logits.new_empty(rows, vocab, dtype=torch.float32)
    else:
        counts = logits.new_zeros(rows, vocab, dtype=torch.int32)
        y = counts.view(torch.float32)  # each is read before it is written over
        if (length := history.shape[1]) > 0:
            grid = rows, triton.cdiv(length, TOKENS)
            _count_kernel[grid](counts, history, length, vocab, BLOCK=TOKENS, **launch_options(4))
    block = row_block(vocab)
    _adjust_kernel[(rows, triton.cdiv(vocab, block))](
        y, logits, counts, bias, mask, repetitions, presences, frequencies,
        vocab, logits.stride(0), 0 if bias is None else bias.stride(0),
        0 if mask is None else mask.stride(0), *map(float, arguments[14:COUNT]),
        BLOCK=block, **launch_options(max(block // 256, 1)),
    )  # fmt: skip
    return y


def filters(arguments: tuple) -> tuple:
    """What `filters_of` takes: tensors of top-k, temperature, top-p and min-p, and the numbers."""
    return *arguments[:4], int(arguments[10]), *map(float, arguments[11:14])


def strides(seeds: Tensor | None, offsets: Tensor | None) -> dict[str, int]:
    """How far the seeds and offsets of rows are apart: 0 where there is one for all."""
    return {
        "SEED_STRIDE": 0 if seeds is None else seeds.ndim,
        "OFFSET_STRIDE": 0 if offsets is None else offsets.ndim,
    }
