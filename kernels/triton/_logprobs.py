"""Draws with logarithms of probabilities, on the GPU: of the token, and of the likeliest."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._filter import cut_of_parts, find_cuts, find_list
from tilewise.kernels.triton._gumbel import draw_tokens
from tilewise.kernels.triton._options import COUNT, UNFILTERED, adjusted, filters, filters_of
from tilewise.kernels.triton._parts import find_tops, top_of_parts
from tilewise.kernels.triton._ranks import (
    DIGITS,
    ONE,
    first_of,
    is_before,
    key_of,
    masses_before,
    prefix,
    row_block,
)
from tilewise.kernels.triton._shared import launch_options
from tilewise.kernels.triton._shortlist import Shortlist
from tilewise.kernels.triton._top_k import top_k_forward

NAMED = 128  # of the likeliest at a time


@triton.jit
def _logprob(v, top, t, log_of_mass):
    gap = tl.where(v == top, 0.0, v - top)  # inf - inf is NaN
    return tl.div_rn(gap, tl.zeros_like(gap) + t) - log_of_mass


@triton.jit(do_not_specialize=["k"])
def _logprobs_kernel(
    logprobs_ptr, top_logprobs_ptr, top_tokens_ptr, x_ptr, tokens_ptr, indices_ptr,
    tops_ptr, firsts_ptr, cuts_ptr, masses_ptr, k_ptr, t_ptr, p_ptr, m_ptr,
    vocab, x_stride, count, parts, k, t, p, m, PROCESSED: tl.constexpr,
    DIGITS: tl.constexpr, BLOCK: tl.constexpr, NAMED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    x_ptr += row * x_stride
    token = tl.load(tokens_ptr + row)
    t, k, p, m, can = filters_of(row, k_ptr, t_ptr, p_ptr, m_ptr, k, t, p, m)
    if cuts_ptr is None:
        first, top = first_of(x_ptr, 0, vocab, BLOCK)
    else:
        top, _ = top_of_parts(tops_ptr, firsts_ptr, row, parts, vocab, PARTS)

    least, stop = tl.cast(0, tl.uint32), tl.cast(0, tl.int32)
    log_of_mass = tl.cast(float("nan"), tl.float32)
    own_t = t
    if PROCESSED:
        there = token >= 0
        t = tl.where(t > 0, t, 1.0)
    else:
        there = can & (token >= 0) & (top < float("inf"))
        t = tl.cast(1.0, tl.float32)
    if there:
        if cuts_ptr is not None:
            least, stop, total = cut_of_parts(cuts_ptr, masses_ptr, row, parts, PARTS)
        else:
            if PROCESSED:
                least, stop = prefix(x_ptr, vocab, first, top, own_t, k, p, m, DIGITS, BLOCK)
            total, _ = masses_before(
                x_ptr, vocab, top, 1.0 / t, least, stop, least, stop, BLOCK
            )  # fmt: skip
        log_of_mass = tl.log(total.to(tl.float64) / ONE).to(tl.float32)

    drawn = tl.load(x_ptr + tl.maximum(token, 0)).to(tl.float32)
    tl.store(logprobs_ptr + row, _logprob(drawn, top, t, log_of_mass))
    for start in range(0, count, NAMED):
        place = start + tl.arange(0, NAMED)
        mask = place < count
        index = tl.load(indices_ptr + row * count + place, mask=mask, other=0)
        v = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
        v = tl.where(v == 0, 0.0, v)  # -0 ties with 0
        value = _logprob(v, top, t, log_of_mass)
        left = is_before(key_of(v), index, least, stop) & (v > float("-inf"))
        value = tl.where(left, value, tl.where(there, float("-inf"), float("nan")))
        tl.store(top_logprobs_ptr + row * count + place, value, mask=mask)
        index = tl.where(value > float("-inf"), index, -1)
        tl.store(top_tokens_ptr + row * count + place, index, mask=mask)


def sample_with_logprobs_forward(logits: Tensor, *arguments) -> tuple[Tensor, ...]:
    """logits [batch, vocab]; OPTIONS, how many of the likeliest, whether after all filters, seeds
    and offsets -> tokens, logprobs [batch]; logprobs, tokens [batch, count]."""
    count, processed, *draws = arguments[COUNT:]
    rows, options = adjusted(logits, arguments), filters(arguments)
    found = find_list(rows, options)
    tokens = draw_tokens(rows, options, 1, tuple(draws), found)
    x = rows if processed else logits
    (batch, vocab), block = x.shape, row_block(x.shape[1])
    parts, tops, firsts, cuts, masses = 1, None, None, None, None
    if found is not None:
        parts, tops, firsts = found[:3]
        if x is not rows:
            tops, firsts = find_tops(x, parts)
        if not processed:
            found = Shortlist(parts, tops, firsts)
        cuts, masses = find_cuts(x, options if processed else UNFILTERED, found)
    logprobs = x.new_empty(batch, dtype=torch.float32)
    top_logprobs = x.new_empty(batch, count, dtype=torch.float32)
    top_tokens = x.new_empty(batch, count, dtype=torch.int64)
    indices = top_k_forward(x, count)[1] if count else top_tokens
    _logprobs_kernel[(batch,)](
        logprobs, top_logprobs, top_tokens, x, tokens, indices, tops, firsts, cuts, masses,
        *options[:4], vocab, x.stride(0), count, parts, *options[4:], PROCESSED=processed,
        DIGITS=DIGITS[x.dtype], BLOCK=block, NAMED=NAMED, PARTS=triton.next_power_of_2(parts),
        **launch_options(max(block // 128, 1)),
    )  # fmt: skip
    return tokens, logprobs, top_logprobs, top_tokens
