"""Which drafted tokens stand, and the one after them, on the GPU: probabilities of all rows of the
target, then a program for each sequence."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._filter import filter_logits_forward
from tilewise.kernels.triton._gumbel import gumbel
from tilewise.kernels.triton._options import COUNT, option, strides
from tilewise.kernels.triton._philox import philox, philox_words
from tilewise.kernels.triton._ranks import row_block, winner
from tilewise.kernels.triton._shared import launch_options

ACCEPTANCE = tl.constexpr(1 << 30)  # a group of four columns
REPLACEMENT = tl.constexpr(1 << 33)  # a column
WORDS = tl.constexpr(2.0**32)
PLACES = tl.constexpr(16)  # of a draft, that are written at a time


@triton.jit
def _accepted(
    drafts_ptr, q_ptr, p_ptr, draft, vocab, seed, offset, row
):  # fmt: skip
    """How many drafts stand, and whether the one after them is a token of the vocabulary."""
    count = tl.cast(0, tl.int32)
    falls = tl.cast(0, tl.int32)  # whether one before has fallen that is a token
    for place in range(draft):
        token = tl.load(drafts_ptr + place)
        known = (token >= 0) & (token < vocab)
        column = tl.where(known, token, 0) + tl.cast(place, tl.int64) * vocab
        word, _, _, _ = philox(seed, offset + place, row, tl.cast(ACCEPTANCE, tl.int64))
        u = (word.to(tl.float64) + 0.5) / WORDS
        p = tl.load(p_ptr + column).to(tl.float64)
        q = tl.load(q_ptr + column).to(tl.float64)
        stands = known & (u * q < p)
        falls = tl.where((count == place) & known & (stands == 0), 1, falls)
        count = tl.where((count == place) & stands, place + 1, count)
    return count, falls


@triton.jit
def _rest(p_ptr, q_ptr, start, vocab, known, BLOCK: tl.constexpr):
    """What the target has more than the draft, of the tokens up to `known`; beyond, all of it."""
    col = start + tl.arange(0, BLOCK)
    p = tl.load(p_ptr + col, mask=col < vocab, other=0.0)
    return p - tl.load(q_ptr + col, mask=col < known, other=0.0), col


@triton.jit
def _replacement(p_ptr, q_ptr, vocab, known, seed, offset, row, BLOCK: tl.constexpr):
    """A draw from what the target has more; from the target where that is nothing."""
    most = tl.zeros([BLOCK], tl.float32)
    for start in range(0, known, BLOCK):
        rest, _ = _rest(p_ptr, q_ptr, start, vocab, known, BLOCK)
        most = tl.maximum(most, rest)
    known = tl.where(tl.max(most, 0) > 0, known, 0)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_col = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        rest, col = _rest(p_ptr, q_ptr, start, vocab, known, BLOCK)
        word = philox_words(seed, offset, row, REPLACEMENT + tl.cast(start, tl.int64), BLOCK)
        score = tl.log(tl.where(rest > 0, rest, 1.0)) + gumbel(word)
        score = tl.where(rest > 0, score, float("-inf"))
        best_col = tl.where(score > best, col, best_col)
        best = tl.where(score > best, score, best)
    return winner(best, best_col, vocab)


@triton.jit(do_not_specialize=["draft", "seed", "offset"])
def _verify_kernel(
    accepted_ptr, tokens_ptr, drafts_ptr, q_ptr, p_ptr, seed_ptr, offset_ptr,
    draft, vocab, seed, offset,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.cast(tl.program_id(0), tl.int64)
    row = i * (1 - SEED_STRIDE)
    seed = option(seed_ptr, seed, i, SEED_STRIDE, tl.int64)
    offset = option(offset_ptr, offset, i, OFFSET_STRIDE, tl.int64)
    drafts_ptr += i * draft
    q_ptr += i * draft * vocab
    p_ptr += i * (draft + 1) * vocab

    count, falls = _accepted(drafts_ptr, q_ptr, p_ptr, draft, vocab, seed, offset, row)
    p_ptr += tl.cast(count, tl.int64) * vocab
    q_ptr += tl.cast(count, tl.int64) * vocab
    last = tl.cast(-1, tl.int32)
    first = tl.load(p_ptr)
    if first == first:  # a row without a token is NaN throughout
        known = tl.where(falls > 0, vocab, 0)
        last = _replacement(p_ptr, q_ptr, vocab, known, seed, offset + count, row, BLOCK)

    tl.store(accepted_ptr + i, count.to(tl.int64))
    for start in range(0, draft + 1, PLACES):
        place = start + tl.arange(0, PLACES)
        drafted = tl.load(drafts_ptr + place, mask=place < count, other=-1)
        token = tl.where(place == count, last, drafted)
        tl.store(tokens_ptr + i * (draft + 1) + place, token, mask=place <= draft)


def verify_draft_forward(
    draft_tokens: Tensor, draft_probs: Tensor, target_logits: Tensor, *arguments
) -> tuple[Tensor, Tensor]:
    """draft_tokens [batch, draft], draft_probs [batch, draft, vocab] in fp32, target_logits
    [batch * (draft + 1), vocab], OPTIONS, seeds and offsets
    -> accepted [batch], tokens [batch, draft + 1]."""
    (batch, draft), vocab = draft_tokens.shape, target_logits.shape[1]
    seeds, offsets, *place = arguments[COUNT:]
    probs = filter_logits_forward(target_logits, *arguments[:COUNT], True)
    accepted = target_logits.new_empty(batch, dtype=torch.int64)
    tokens = target_logits.new_empty(batch, draft + 1, dtype=torch.int64)
    block = row_block(vocab)
    _verify_kernel[(batch,)](
        accepted, tokens, draft_tokens, draft_probs, probs, seeds, offsets, draft, vocab, *place,
        **strides(seeds, offsets), BLOCK=block, **launch_options(max(block // 128, 1)),
    )  # fmt: skip
    return accepted, tokens
