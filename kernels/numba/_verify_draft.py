"""Which drafted tokens stand, and the one after them: probabilities of all rows of the target, then
each sequence is a task."""

import math

import numpy as np
from torch import Tensor

from tilewise.kernels.numba._filter import filter_logits_forward
from tilewise.kernels.numba._gumbel import WORDS, score_of_gap
from tilewise.kernels.numba._options import COUNT, INT64, packed_draws
from tilewise.kernels.numba._parallel import Kernel, callee
from tilewise.kernels.numba._philox import philox
from tilewise.kernels.numba._simd import address, kind, load, offset, pointer, store

ACCEPTANCE, REPLACEMENT = np.int64(1 << 30), np.int64(1 << 31)  # groups of four columns


@callee
def _rest(p, q, j, is_drafted, takes_all):
    """What the target has more than the draft of token j."""
    more = np.float64(load(p, j))
    if is_drafted and not takes_all:
        more -= np.float64(load(q, j))
    return more


@callee
def _replacement(p, q, vocab, is_drafted, seed, place, row):
    """A draw from what the target has more; from the target where that is nothing."""
    takes_all = True
    for j in range(vocab):
        takes_all = takes_all and _rest(p, q, j, is_drafted, False) <= 0
    best, winner = -math.inf, np.int64(-1)
    for group in range((vocab + 3) // 4):
        words = philox(seed, place, row, REPLACEMENT + group)
        for i in range(min(4, vocab - group * 4)):
            j = group * 4 + i
            rest = _rest(p, q, j, is_drafted, takes_all)
            if rest > 0:
                score = score_of_gap(math.log(rest), words[i])
                if score > best:
                    best, winner = score, j
    return winner


@Kernel
def _verify(
    i, accepted_at, tokens_at, drafts_at, q_at, p_at, draws, kind, draft, vocab
):  # fmt: skip
    seeds_at, offsets_at, seed_stride, offset_stride, seed, place = draws
    tokens = offset(pointer(tokens_at, INT64), i * (draft + 1))
    drafts = offset(pointer(drafts_at, INT64), i * draft)
    seed = load(pointer(seeds_at, INT64), i * seed_stride) if seeds_at else seed
    place = load(pointer(offsets_at, INT64), i * offset_stride) if offsets_at else place
    row = 0 if seed_stride else i
    n, stands = np.int64(0), True
    p, q = pointer(p_at, kind), pointer(q_at, kind)
    while stands and n < draft:
        token = load(drafts, n)
        stands = token >= 0 and token < vocab
        if stands:
            word = philox(seed, place + n, row, ACCEPTANCE)[0]
            u = (np.float64(word) + 0.5) / WORDS
            p_drafted = np.float64(load(p, (i * (draft + 1) + n) * vocab + token))
            q_drafted = np.float64(load(q, (i * draft + n) * vocab + token))
            stands = u * q_drafted < p_drafted
        if stands:
            store(tokens, n, token)
            n += 1
    store(pointer(accepted_at, INT64), i, n)
    p = offset(p, (i * (draft + 1) + n) * vocab)
    last = np.int64(-1)
    if load(p, 0) == load(p, 0):  # a row without a token is NaN throughout
        is_drafted = n < draft and load(drafts, min(n, draft - 1)) >= 0
        is_drafted = is_drafted and load(drafts, min(n, draft - 1)) < vocab
        q = offset(q, (i * draft + min(n, draft - 1)) * vocab)
        last = _replacement(p, q, vocab, is_drafted, seed, place + n, row)
    store(tokens, n, last)
    for later in range(draft + 1):
        if later > n:
            store(tokens, later, np.int64(-1))


def verify_draft_forward(
    draft_tokens: Tensor, draft_probs: Tensor, target_logits: Tensor, *arguments
) -> tuple[Tensor, Tensor]:
    """draft_tokens [batch, draft], draft_probs [batch, draft, vocab], target_logits
    [batch * (draft + 1), vocab], its options, seeds and offsets
    -> accepted [batch], tokens [batch, draft + 1]."""
    batch, draft = draft_tokens.shape
    vocab = target_logits.shape[1]
    accepted = draft_tokens.new_empty(batch)
    tokens = draft_tokens.new_empty(batch, draft + 1)
    probs = filter_logits_forward(target_logits, *arguments[:COUNT], True)
    _verify(
        batch, probs.numel(), address(accepted), address(tokens), address(draft_tokens),
        address(draft_probs), address(probs), packed_draws(*arguments[COUNT:]), kind(probs), draft,
        vocab,
    )  # fmt: skip
    return accepted, tokens
