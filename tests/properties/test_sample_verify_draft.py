"""Speculative decoding: what comes out is distributed as the target, whatever was drafted."""

import math

import pytest
import torch
from cases import DEVICE
from sample_cases import (
    assert_drawn_from,
    backends_that,
    bits_of,
    enough_or_skip,
    likelihoods,
    many,
    row_of_logits,
)

import tilewise

pytestmark = pytest.mark.thinned(3)

backend = backends_that("verify_draft")

INFINITY, NAN = math.inf, math.nan

VOCAB, DRAFT = 12, 2
CASES = [
    {},
    {"temperature": 1.7},
    {"top_k": 4},
    {"top_p": 0.7, "temperature": 1.5},
    {"min_p": 0.2},
    {"temperature": 0.0},
]
SIGNIFICANCE = 1e-6 / (4 * len(CASES))


def drafted(count, nearness, seed, distinct=False):
    """Logits of the target, drafts and what they were drawn from, at the same seed and offsets."""
    target = torch.stack([row_of_logits(VOCAB, i) for i in range(DRAFT + 1)])
    other = torch.stack([row_of_logits(VOCAB, i + 10) for i in range(DRAFT)])
    probs = tilewise.filtered_probs(nearness * target[:-1] + (1 - nearness) * other)
    logs = probs.log().repeat(count, 1)
    seeds = seed.repeat_interleave(DRAFT) if isinstance(seed, torch.Tensor) else seed
    place = torch.arange(DRAFT, device=DEVICE).repeat(count) + 5
    tokens = tilewise.sample(logs, seed=seeds, offset=place).view(count, DRAFT)
    return target, tokens, probs.expand(count, -1, -1), target.expand(count, -1, -1)


@pytest.mark.parametrize("nearness", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_tokens_are_distributed_as_the_target(backend, options, nearness):
    count = enough_or_skip(backend)
    seeds = torch.arange(count, device=DEVICE)
    target, drafts, probs, logits = drafted(count, nearness, seeds)
    accepted, tokens = tilewise.verify_draft(
        drafts, probs, logits, **options, seed=seeds, offset=5, backend=backend
    )
    for place in range(DRAFT + 1):
        there = accepted >= place
        expected = likelihoods(target[place].tolist(), **options)
        assert_drawn_from(tokens[there, place], expected, SIGNIFICANCE)
        assert (tokens[~there, place] == -1).all()
    stood = torch.arange(DRAFT, device=DEVICE) < accepted[:, None]
    assert torch.equal(tokens[:, :-1][stood], drafts[stood])
    if nearness == 1.0 and not options:
        assert (accepted == DRAFT).float().mean() > 0.999


def test_a_pair_of_tokens_is_one_of_independent_draws(backend):
    count = enough_or_skip(backend)
    seeds = torch.arange(count, device=DEVICE)
    target, drafts, probs, logits = drafted(count, 0.9, seeds)
    accepted, tokens = tilewise.verify_draft(
        drafts, probs, logits, top_k=3, seed=seeds, offset=5, backend=backend
    )
    first, second = (likelihoods(row.tolist(), top_k=3) for row in target[:2])
    p = {a: min(first[a], float(probs[0, 0, a])) for a in first}
    both = accepted >= 1
    total = sum(p.values())
    assert abs(both.float().mean() - total) < 5 * math.sqrt(total / count)
    expected = {a * VOCAB + b: p[a] / total * q for a in p for b, q in second.items()}
    assert_drawn_from(tokens[both, 0] * VOCAB + tokens[both, 1], expected, SIGNIFICANCE)


def test_backends_agree_and_a_row_does_not_know_its_place(backend):
    batch, draft, vocab = (17, 3, 999) if many(backend) > 100 else (4, 2, 300)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(batch, draft + 1, vocab, generator=generator)).to(DEVICE)
    near = logits[:, :-1] + row_of_logits(batch * draft * vocab).view(batch, draft, vocab) / 2
    probs = near.softmax(-1)
    drafts = tilewise.gumbel_argmax(near, seed=9)
    options = {
        "temperature": 1 + torch.arange(batch, device=DEVICE) / 8, "top_p": 0.9,
        "seed": torch.arange(batch, device=DEVICE) * 2**40,
        "history": torch.arange(batch * 4, device=DEVICE).view(batch, 4),
        "frequency_penalty": 0.5,
        "mask": bits_of(range(vocab - 5), vocab).expand(batch, -1),
        "logit_bias": row_of_logits(vocab, 4),
    }  # fmt: skip
    ours = tilewise.verify_draft(drafts, probs, logits, **options, backend=backend)
    theirs = tilewise.verify_draft(
        drafts, probs.double(), logits.double(), **options, backend="reference"
    )
    assert (ours[1] != theirs[1]).any(1).sum() <= 1
    assert 0 < ours[0].sum() < batch * draft
    order = torch.arange(batch, device=DEVICE).flip(0)
    each = {n: options[n][order] for n in ("temperature", "seed", "history")}
    again = tilewise.verify_draft(
        drafts[order], probs[order], logits[order], **options | each, backend=backend
    )
    assert torch.equal(again[0], ours[0][order]) and torch.equal(again[1], ours[1][order])


@pytest.mark.parametrize("vocab, batch", [(4099, 44), (50257, 4)])
def test_no_token_depends_on_how_rows_are_shared_out(backend, vocab, batch, monkeypatch):
    """One block a row, a cluster that holds it, one that reads it again and again."""
    if backend != "cuda":
        pytest.skip(f"{backend}: has none of these ways")
    draft = 2
    rows = torch.stack([row_of_logits(vocab, seed) for seed in range(batch * (draft + 1))])
    logits = rows.view(batch, draft + 1, vocab)
    near = logits[:, :-1] + row_of_logits(vocab, 1000) / 4
    drafts, probs = tilewise.gumbel_argmax(near, seed=9), near.softmax(-1)
    seeds = torch.arange(batch, device=DEVICE) + 7
    history = torch.arange(batch * 9, device=DEVICE).view(batch, 9)

    def verified(i):
        return tilewise.verify_draft(
            drafts[i], probs[i], logits[i], top_p=0.97, top_k=vocab // 2, seed=seeds[i],
            history=history[i], presence_penalty=0.5, backend=backend,
        )  # fmt: skip

    accepted, tokens = verified(slice(None))
    assert 0 < accepted.sum() < batch * draft
    for major in "98" if DEVICE == "cpu" else "9":  # which only the emulator asks for
        monkeypatch.setenv("TILEWISE_EMULATION_MAJOR", major)
        for i in range(3):
            alone = verified(slice(i, i + 1))
            assert torch.equal(alone[0], accepted[i : i + 1])
            assert torch.equal(alone[1], tokens[i : i + 1])


def test_penalties_know_the_tokens_drafted_before(backend):
    """A token that may come once only: drafted twice, the second one falls."""
    drafts = torch.tensor([[3, 3]], device=DEVICE)
    probs = torch.zeros(1, 2, 8, device=DEVICE)
    probs[..., 3] = 1.0
    logits = torch.zeros(1, 3, 8, device=DEVICE)
    logits[..., 3], logits[..., 6] = 60.0, 20.0
    history = torch.empty(1, 0, dtype=torch.int64, device=DEVICE)
    accepted, tokens = tilewise.verify_draft(
        drafts, probs, logits, presence_penalty=100.0, history=history, seed=1, backend=backend
    )
    assert accepted.tolist() == [1] and tokens.tolist() == [[3, 6, -1]]
    accepted, tokens = tilewise.verify_draft(drafts, probs, logits, seed=1, backend=backend)
    assert accepted.tolist() == [2] and tokens.tolist() == [[3, 3, 3]]


def test_masks_of_positions(backend):
    drafts = torch.tensor([[3, 4]] * 2, device=DEVICE)
    probs = torch.full((2, 2, 40), 1 / 40, device=DEVICE)
    logits = torch.zeros(2, 3, 40, device=DEVICE)
    masks = torch.stack([torch.stack([bits_of(s, 40) for s in sets]) for sets in (
        ([3], [39], [7]), ([3], [4], [7]))])  # fmt: skip
    accepted, tokens = tilewise.verify_draft(
        drafts, probs, logits, mask=masks, seed=1, backend=backend
    )
    assert accepted.tolist() == [1, 2]
    assert tokens.tolist() == [[3, 39, -1], [3, 4, 7]]


def test_what_is_no_draft_and_rows_without_a_token(backend):
    drafts = torch.tensor([[-1, 2], [2, 9], [2, 2], [2, 2]], device=DEVICE)
    probs = torch.zeros(4, 2, 9, device=DEVICE)
    probs[..., 2] = 1.0
    logits = torch.full((4, 3, 9), -INFINITY, device=DEVICE)
    logits[..., 2] = 0.0
    logits[2, 1], logits[3, 2, 0] = -INFINITY, NAN
    accepted, tokens = tilewise.verify_draft(drafts, probs, logits, seed=1, backend=backend)
    assert accepted.tolist() == [0, 1, 1, 2]
    assert tokens.tolist() == [[2, -1, -1], [2, 2, -1], [2, -1, -1], [2, 2, -1]]


def test_where_nothing_was_drafted_the_target_alone_counts(backend):
    """Its draft probabilities, whatever they are, are not looked at."""
    count = min(many(backend), 200)
    drafts = torch.full((count, 1), -1, device=DEVICE)
    probs = torch.zeros(count, 1, 4, device=DEVICE)
    probs[..., 2] = 1.0
    logits = torch.zeros(count, 2, 4, device=DEVICE)
    logits[..., 2] = 3.0
    seeds = torch.arange(count, device=DEVICE)
    accepted, tokens = tilewise.verify_draft(drafts, probs, logits, seed=seeds, backend=backend)
    assert (accepted == 0).all()
    assert (tokens[:, 0] == 2).float().mean() > 0.7
    drafts[:] = 4  # none of the vocabulary
    again = tilewise.verify_draft(drafts, probs, logits, seed=seeds, backend=backend)
    assert torch.equal(again[1], tokens)


def test_where_the_target_has_nothing_more_it_is_drawn_from(backend):
    """Drafted as if each token were sure."""
    drafts = torch.zeros(8, 1, dtype=torch.int64, device=DEVICE)
    probs, logits = torch.ones(8, 1, 16, device=DEVICE), torch.zeros(8, 2, 16, device=DEVICE)
    seeds = torch.arange(8, device=DEVICE)
    accepted, tokens = tilewise.verify_draft(drafts, probs, logits, seed=seeds, backend=backend)
    expected = tilewise.verify_draft(drafts, probs, logits, seed=seeds, backend="reference")
    assert torch.equal(tokens, expected[1])
    assert len(tokens[accepted == 0, 0].unique()) > 2


@pytest.mark.parametrize("batch, draft, vocab", [(0, 2, 8), (3, 0, 8), (2, 2, 0)])
def test_sizes_of_nothing(backend, batch, draft, vocab):
    accepted, tokens = tilewise.verify_draft(
        torch.zeros(batch, draft, dtype=torch.int64, device=DEVICE),
        torch.zeros(batch, draft, vocab, device=DEVICE),
        torch.zeros(batch, draft + 1, vocab, device=DEVICE),
        seed=1, backend=backend,
    )  # fmt: skip
    assert accepted.tolist() == [0] * batch and tokens.shape == (batch, draft + 1)
    assert (tokens[:, 0] >= 0).all() if vocab else (tokens == -1).all()
