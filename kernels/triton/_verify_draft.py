"""Which drafted tokens stand, and the one after them, on the GPU: probabilities of all rows of the
target, then programs that share the row from which a sequence is drawn, and whose winners meet."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._filter import filter_logits_forward
from tilewise.kernels.triton._gumbel import gumbel
from tilewise.kernels.triton._options import COUNT, option, strides
from tilewise.kernels.triton._parts import part_of, parts_of
from tilewise.kernels.triton._philox import philox, philox_words
from tilewise.kernels.triton._ranks import row_block, winner
from tilewise.kernels.triton._shared import launch_options

ACCEPTANCE = tl.constexpr(1 << 30)  # a group of four columns
REPLACEMENT = tl.constexpr(1 << 33)  # a column
WORDS = tl.constexpr(2.0**32)
PLACES = tl.constexpr(32)  # of a draft, at a time


@triton.jit
def _accepted(drafts_ptr, q_ptr, p_ptr, draft, vocab, seed, offset, row):
    """How many drafts stand, and whether the one after them is a token of the vocabulary."""
    count, falls = tl.cast(0, tl.int32), tl.cast(0, tl.int32)
    start = 0
    while start < draft:
        place = start + tl.arange(0, PLACES)
        token = tl.load(drafts_ptr + place, mask=place < draft, other=-1)
        known = (token >= 0) & (token < vocab)
        column = token + place.to(tl.int64) * vocab
        zero = tl.zeros([PLACES], tl.int64)
        word, _, _, _ = philox(seed, offset + place, row, zero + ACCEPTANCE)
        u = (word.to(tl.float64) + 0.5) / WORDS
        p = tl.load(p_ptr + column, mask=known, other=0.0).to(tl.float64)
        q = tl.load(q_ptr + column, mask=known, other=0.0).to(tl.float64)
        fallen = (known & (u * q < p)) == 0
        count = tl.min(tl.where(fallen, place, start + PLACES), 0)
        falls = tl.max((known & (place == count)).to(tl.int32), 0)
        start = tl.where(count == start + PLACES, count, draft)
    return tl.minimum(count, draft), falls


@triton.jit
def _rest(p_ptr, q_ptr, start, end, known, BLOCK: tl.constexpr):
    """What the target has more than the draft, of the tokens up to `known`; beyond, all of it."""
    col = start + tl.arange(0, BLOCK)
    p = tl.load(p_ptr + col, mask=col < end, other=0.0)
    return p - tl.load(q_ptr + col, mask=col < tl.minimum(known, end), other=0.0), col


@triton.jit
def _replacement(
    p_ptr, q_ptr, begin, end, known, seed, offset, row, BLOCK: tl.constexpr
):  # fmt: skip
    """A draw from what the target has more; from the target where that is nothing. Which column,
    its score, and whether there was more."""
    most = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, tl.minimum(known, end), BLOCK):
        rest, _ = _rest(p_ptr, q_ptr, start, end, known, BLOCK)
        most = tl.maximum(most, rest)
    has_more = tl.max(most, 0) > 0
    known = tl.where(has_more, known, 0)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_col = tl.zeros([BLOCK], tl.int32) + begin
    for start in range(begin, end, BLOCK):
        rest, col = _rest(p_ptr, q_ptr, start, end, known, BLOCK)
        word = philox_words(seed, offset, row, REPLACEMENT + tl.cast(start, tl.int64), BLOCK)
        score = tl.log(tl.where(rest > 0, rest, 1.0)) + gumbel(word)
        score = tl.where(rest > 0, score, float("-inf"))
        best_col = tl.where(score > best, col, best_col)
        best = tl.where(score > best, score, best)
    return winner(best, best_col, end), tl.max(best, 0), has_more


@triton.jit(do_not_specialize=["draft", "seed", "offset"])
def _replace_kernel(
    accepted_ptr, places_ptr, scores_ptr, more_ptr, drafts_ptr, q_ptr, p_ptr, seed_ptr, offset_ptr,
    draft, vocab, seed, offset,
    SEED_STRIDE: tl.constexpr, OFFSET_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.cast(tl.program_id(0), tl.int64)
    row = i * (1 - SEED_STRIDE)
    seed = option(seed_ptr, seed, i, SEED_STRIDE, tl.int64)
    offset = option(offset_ptr, offset, i, OFFSET_STRIDE, tl.int64)
    q_ptr += i * draft * vocab
    p_ptr += i * (draft + 1) * vocab
    count, falls = _accepted(drafts_ptr + i * draft, q_ptr, p_ptr, draft, vocab, seed, offset, row)

    p_ptr += tl.cast(count, tl.int64) * vocab
    q_ptr += tl.cast(count, tl.int64) * vocab
    begin, end = part_of(vocab, BLOCK)
    known = tl.where(falls > 0, vocab, 0)
    token, score, has_more = _replacement(
        p_ptr, q_ptr, begin, end, known, seed, offset + count, row, BLOCK
    )
    first = tl.load(p_ptr)
    token = tl.where(first == first, token, -1)  # a row without a token is NaN throughout

    place = i * tl.num_programs(1) + tl.program_id(1)
    tl.store(places_ptr + place, token)
    tl.store(scores_ptr + place, score)
    tl.store(more_ptr + place, has_more.to(tl.int32))
    if tl.program_id(1) == 0:
        tl.store(accepted_ptr + i, count.to(tl.int64))


@triton.jit(do_not_specialize=["draft"])
def _verify_kernel(
    tokens_ptr, accepted_ptr, places_ptr, scores_ptr, more_ptr, drafts_ptr, draft, vocab, parts,
    PARTS: tl.constexpr,
):  # fmt: skip
    i = tl.cast(tl.program_id(0), tl.int64)
    count = tl.load(accepted_ptr + i)
    part = tl.arange(0, PARTS)
    place, mask = i * parts + part, part < parts
    more = tl.load(more_ptr + place, mask=mask, other=0)
    scores = tl.load(scores_ptr + place, mask=mask, other=float("-inf"))
    scores = tl.where(more == tl.max(more, 0), scores, float("-inf"))
    last = winner(scores, tl.load(places_ptr + place, mask=mask, other=-1), vocab)
    for start in range(0, draft + 1, PLACES):
        col = start + tl.arange(0, PLACES)
        drafted = tl.load(drafts_ptr + i * draft + col, mask=col < count, other=-1)
        token = tl.where(col == count, last, drafted)
        tl.store(tokens_ptr + i * (draft + 1) + col, token, mask=col <= draft)


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
    block, parts = row_block(vocab), parts_of(batch, vocab)
    places, more = target_logits.new_empty(2, batch, parts, dtype=torch.int32)
    scores = target_logits.new_empty(batch, parts, dtype=torch.float32)
    _replace_kernel[(batch, parts)](
        accepted, places, scores, more, draft_tokens, draft_probs, probs, seeds, offsets,
        draft, vocab, *place,
        **strides(seeds, offsets), BLOCK=block, **launch_options(max(block // 128, 1)),
    )  # fmt: skip
    _verify_kernel[(batch,)](
        tokens, accepted, places, scores, more, draft_tokens, draft, vocab, parts,
        PARTS=triton.next_power_of_2(parts), **launch_options(1),
    )  # fmt: skip
    return accepted, tokens
