"""Penalties, bias, mask and min-p: the order they have, by an oracle; what may never be drawn."""

import math

import pytest
import torch
from cases import DEVICE
from sample_cases import (
    MINE,
    adjusted,
    assert_drawn_from,
    backend,
    bits_of,
    likelihoods,
    many,
    row_of_logits,
)

import tilewise
from tilewise.rng import gumbel
from tilewise.sampling import adjusted as adjusted_rows

pytestmark = pytest.mark.thinned(3)

__all__ = ["backend"]

INFINITY, NAN = math.inf, math.nan

VOCAB = 47
HISTORY = [3, 3, 3, 46, -1, 10, 0, 0, 47, 99, -7, 2**40]  # once, often, padding, out of range
ALLOWED = set(range(VOCAB)) - {1, 31, 32, 45, 10}
BIAS = [0.5 * math.sin(j) if j % 5 else 2.0 for j in range(VOCAB)]
CASES = [
    {"min_p": 0.05},
    {"min_p": 0.3, "temperature": 2.0},
    {"min_p": 0.1, "top_p": 0.8},
    {"min_p": 0.05, "top_k": 9, "temperature": 1.5},
    {"min_p": 1.0},
    {"repetition": 1.7},
    {"repetition": 0.6},
    {"presence": 0.8},
    {"frequency": -0.4},
    {"repetition": 1.3, "presence": -0.5, "frequency": 0.7},
    {"bias": BIAS},
    {"allowed": ALLOWED},
    {"allowed": {17}},
    {"repetition": 1.3, "presence": 0.5, "frequency": 0.2, "bias": BIAS, "allowed": ALLOWED},
    {"repetition": 1.3, "bias": BIAS, "allowed": ALLOWED, "top_k": 20, "top_p": 0.9,
     "min_p": 0.02, "temperature": 1.4},
]  # fmt: skip
SIGNIFICANCE = 1e-6 / (len(CASES) * len(MINE))


def split(case):
    """What adjusts, and what filters."""
    names = ("repetition", "presence", "frequency", "bias", "allowed")
    adjusts = {name: value for name, value in case.items() if name in names}
    return adjusts, {name: value for name, value in case.items() if name not in names}


def arguments(case, rows, vocab=VOCAB, history=HISTORY):
    """The same for `sample`."""
    adjusts, options = split(case)
    for name in ("repetition", "presence", "frequency"):
        if name in adjusts:
            options[f"{name}_penalty"] = adjusts[name]
            options["history"] = torch.tensor(history, device=DEVICE).expand(rows, -1)
    if "bias" in adjusts:
        options["logit_bias"] = torch.tensor(adjusts["bias"], device=DEVICE)
    if "allowed" in adjusts:
        options["mask"] = bits_of(adjusts["allowed"], vocab).expand(rows, -1)
    return options


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frequencies_are_those_of_what_is_left(backend, case):
    row, count = row_of_logits(VOCAB) - 2, many(backend)  # a repetition pulls most of them down
    seeds = torch.arange(count, device=DEVICE)
    tokens = tilewise.sample(
        row.expand(count, -1), **arguments(case, count), seed=seeds, backend=backend
    )
    adjusts, filters = split(case)
    changed = adjusted(row.tolist(), history=HISTORY, **adjusts)
    assert_drawn_from(tokens, likelihoods(changed, **filters), SIGNIFICANCE)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("vocab", [1, 128, 1000, 50257])
def test_backends_draw_the_same_tokens_but_for_ties_within_rounding(backend, case, vocab):
    if many(backend) < 100 and vocab > 10_000 and len(case) < 5:
        pytest.skip("triton: interpreted, too slow for more than one case of a large vocabulary")
    rows = min(60_000 // vocab + 1, 300, many(backend) // 2)
    generator = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(rows, vocab, generator=generator) - 6).to(DEVICE)
    history = torch.randint(-1, vocab + 1, (5 + vocab // 4,), generator=generator).tolist() * 2
    if "bias" in case:
        case = case | {"bias": torch.randn(vocab, generator=generator).tolist()}
    if "allowed" in case:
        case = case | {"allowed": {j for j in range(vocab) if j % 3 == 0}}
    options = arguments(case, rows, vocab, history)
    seeds = torch.arange(rows, device=DEVICE) * 2**33
    ours = tilewise.sample(logits, **options, seed=seeds, backend=backend)
    theirs = tilewise.sample(logits.double(), **options, seed=seeds, backend="reference")
    scaled = adjusted_rows(logits.double(), **options) / options.get("temperature", 1.0)
    scores = scaled + gumbel(seeds, 0, 0, vocab, torch.float64)
    gap = (scores.gather(1, ours[:, None]) - scores.gather(1, theirs[:, None])).abs().squeeze(1)
    finite = torch.where(scaled.isfinite(), scaled, 0)
    rounding = torch.finfo(torch.float32).eps * (2 * finite.abs().amax(1) + 23)
    assert (gap <= rounding).all()
    assert (ours != theirs).sum() <= 1


@pytest.mark.parametrize("vocab", [33, 1000, 50257, 128256, 151936])
def test_what_is_forbidden_is_never_drawn(backend, vocab):
    if many(backend) < 100 and vocab > 2000:
        pytest.skip("triton: interpreted, too slow for a large vocabulary")
    rows = min(64 if vocab < 2000 else 4, many(backend))
    if many(backend) == 1000:
        rows = rows // 4  # emulated
    logits = torch.zeros(rows, vocab, device=DEVICE)
    allowed = {j for j in range(vocab) if j * 7 % 11 < 2}
    options = {"mask": bits_of(allowed, vocab).expand(rows, -1), "temperature": 5.0}
    for offset in range(3 if many(backend) > 100 else 1):
        for filters in ({}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.5}):
            drawn = tilewise.sample(
                logits, **options, **filters, seed=1, offset=offset, backend=backend
            )
            assert set(drawn.tolist()) <= allowed
            assert len(drawn.unique()) > min(rows, len(allowed), 40) // 4


def test_a_mask_leaves_nothing_or_hides_nan(backend):
    logits = torch.stack([row_of_logits(70, seed) for seed in range(4)])
    logits[1, 5], logits[2, 6], logits[3] = NAN, NAN, INFINITY
    mask = torch.stack([bits_of(s, 70) for s in ([], [6, 69], [6, 69], [33])])
    tokens = tilewise.sample(logits, mask=mask, seed=1, backend=backend).tolist()
    assert tokens[0] == -1
    assert tokens[1] in (6, 69)
    assert tokens[2:] == [-1, 33]


def test_bias_of_infinity(backend):
    logits, bias = torch.stack([row_of_logits(50)] * 3), torch.zeros(3, 50, device=DEVICE)
    bias[0, 7], bias[1, :49], bias[2] = INFINITY, -INFINITY, -INFINITY
    tokens = tilewise.sample(logits, logit_bias=bias, seed=1, backend=backend)
    assert tokens.tolist() == [7, 49, -1]


@pytest.mark.parametrize("vocab", [50, 64])
@pytest.mark.parametrize("history", [[], [-1, -1], [1000, 64, -9, 2**62]], ids=str)
def test_history_without_tokens_changes_nothing(backend, vocab, history):
    logits = torch.stack([row_of_logits(vocab, seed) for seed in range(6)])
    plain = tilewise.sample(logits, seed=1, backend=backend)
    ids = torch.tensor(history, dtype=torch.int64, device=DEVICE).expand(6, -1)
    penalties = {"repetition_penalty": 9.0, "presence_penalty": 5.0, "frequency_penalty": 5.0}
    tokens = tilewise.sample(logits, history=ids, **penalties, seed=1, backend=backend)
    assert torch.equal(tokens, plain)


def test_off_values_are_off(backend):
    logits = torch.stack([row_of_logits(50, seed) for seed in range(6)])
    history = torch.arange(48, device=DEVICE).view(6, 8)
    plain = tilewise.sample(logits, seed=1, backend=backend)
    numbers = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}
    for options in (numbers, {n: torch.full((6,), v, device=DEVICE) for n, v in numbers.items()}):
        tokens = tilewise.sample(logits, **options, history=history, seed=1, backend=backend)
        assert torch.equal(tokens, plain)


def test_rows_of_their_own_options_mixed_with_greedy_ones(backend):
    rows, vocab = 9, 300
    logits = torch.stack([row_of_logits(vocab, seed) for seed in range(rows)])
    index = torch.arange(rows, device=DEVICE)
    options = {
        "temperature": index % 3 / 2,
        "top_k": index * 4, "top_p": 1 - index / 20, "min_p": index / 50,
        "repetition_penalty": 0.5 + index / 6, "presence_penalty": index / 4 - 1,
        "frequency_penalty": 1 - index / 5,
        "history": (index[:, None] * 31 + torch.arange(12, device=DEVICE) ** 2) % 200 - 1,
        "logit_bias": torch.stack([row_of_logits(vocab, seed + 50) for seed in range(rows)]) / 4,
        "mask": torch.stack([bits_of(range(i, vocab, 2), vocab) for i in range(rows)]),
        "seed": index + 5, "offset": index * 2**35,
    }  # fmt: skip
    together = tilewise.sample(logits, **options, backend=backend)
    order = torch.tensor([3, 6, 0, 8, 1, 5, 7, 2, 4], device=DEVICE)
    moved = {name: value[order] for name, value in options.items()}
    assert torch.equal(tilewise.sample(logits[order], **moved, backend=backend), together[order])
    for i in range(rows):
        numbers = {
            name: value[i].item() if value.ndim == 1 and name != "seed" else value[i : i + 1]
            for name, value in options.items()
        }
        alone = tilewise.sample(logits[i : i + 1], **numbers, backend=backend)
        assert alone == together[i]
        if i % 3 == 0:
            row = adjusted_rows(logits[i : i + 1], **{n: v for n, v in numbers.items() if n in (
                "repetition_penalty", "presence_penalty", "frequency_penalty", "history",
                "logit_bias", "mask")})  # fmt: skip
            assert alone == row.argmax()


@pytest.mark.parametrize("batch", [1, 7, 64, 513, 4097])
def test_no_bit_of_a_row_depends_on_its_batch(backend, batch):
    if (batch > 600 and many(backend) < 10_000) or (batch > 10 and many(backend) < 100):
        pytest.skip(f"{backend}: too slow for so many rows")
    vocab = 211
    logits = row_of_logits(4097 * vocab, 3).view(4097, vocab)
    history = (torch.arange(4097 * 5, device=DEVICE) % 250).view(4097, 5)
    options = {"top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "backend": backend}
    seeds = torch.arange(4097, device=DEVICE) * 77

    def draw(rows):
        return tilewise.sample(logits[rows], history=history[rows], seed=seeds[rows], **options)

    rows = torch.arange(batch, device=DEVICE)
    tokens = draw(rows)
    assert torch.equal(draw(rows), tokens)
    assert torch.equal(draw(rows.flip(0)), tokens.flip(0))
    few = rows[:: max(batch // 5, 1)]
    assert torch.equal(torch.cat([draw(few[i : i + 1]) for i in range(len(few))]), tokens[few])


def test_a_row_whose_own_penalty_is_out_of_range_is_not_drawn(backend):
    bad = torch.tensor([0.0, -1.0, NAN, INFINITY, 1.0], device=DEVICE)
    logits = torch.zeros(5, 10, device=DEVICE)
    history = torch.zeros(5, 1, dtype=torch.int64, device=DEVICE)
    drawn = {
        name: (
            tilewise.sample(logits, **{name: bad}, history=history, seed=1, backend=backend) >= 0
        )
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_p")
    }
    assert drawn["repetition_penalty"].tolist() == [False] * 4 + [True]
    assert drawn["presence_penalty"].tolist() == [True, True, False, False, True]
    assert drawn["frequency_penalty"].tolist() == [True, True, False, False, True]
    assert drawn["min_p"].tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("top", [INFINITY, 3.0])
def test_min_p_of_ties_and_infinities(backend, top):
    count = min(many(backend), 2000)
    logits = torch.zeros(count, 40, device=DEVICE)
    logits[:, [5, 11, 30]] = top
    for m, k in ((1.0, 0), (0.2, 0), (1.0, 35)):
        tokens = tilewise.sample(logits, min_p=m, top_k=k, seed=1, backend=backend)
        assert set(tokens.tolist()) == {5, 11, 30}


def test_any_layout_of_history_bias_and_mask(backend):
    logits = torch.stack([row_of_logits(50, seed) for seed in range(4)])
    options = {
        "history": (torch.arange(24, device=DEVICE) * 7 % 50).view(4, 6),
        "logit_bias": torch.stack([row_of_logits(50, seed + 9) for seed in range(4)]),
        "mask": torch.stack([bits_of(range(i, 50, 2), 50) for i in range(4)]),
    }
    fixed = {"frequency_penalty": 1.5, "seed": 3, "backend": backend}
    expected = tilewise.sample(logits, **options, **fixed)
    turned = {name: value.t().contiguous().t() for name, value in options.items()}
    wide = {
        name: torch.cat([value, value], 1)[:, : value.shape[1]] for name, value in options.items()
    }
    assert torch.equal(tilewise.sample(logits, **turned, **fixed), expected)
    assert torch.equal(tilewise.sample(logits, **wide, **fixed), expected)
    half = options | {"logit_bias": options["logit_bias"].half()}
    near = options | {"logit_bias": options["logit_bias"].half().float()}
    assert torch.equal(
        tilewise.sample(logits, **half, **fixed), tilewise.sample(logits, **near, **fixed)
    )
