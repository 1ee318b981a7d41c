"""Several draws from weights: frequencies, with and without replacement; what is never drawn."""

import math
from itertools import permutations

import pytest
import torch
from cases import DEVICE
from sample_cases import assert_drawn_from, backends_that, enough_or_skip, many, row_of_logits

import tilewise

backend = backends_that("multinomial")

INFINITY, NAN = math.inf, math.nan
SIGNIFICANCE = 1e-6 / 20


def test_without_replacement_the_order_is_that_of_draws_one_after_the_other(backend):
    weights, count = [3.0, 0.0, 1.0, 0.5, 2.0], enough_or_skip(backend)
    probs = torch.tensor(weights, device=DEVICE).expand(count, -1)
    seeds = torch.arange(count, device=DEVICE)
    drawn = tilewise.multinomial(probs, 3, seed=seeds, backend=backend)
    expected = {}
    for places in permutations([0, 2, 3, 4], 3):
        p, left = 1.0, sum(weights)
        for place in places:
            p, left = p * weights[place] / left, left - weights[place]
        expected[places[0] * 25 + places[1] * 5 + places[2]] = p
    code = drawn[:, 0] * 25 + drawn[:, 1] * 5 + drawn[:, 2]
    assert_drawn_from(code, expected, SIGNIFICANCE)


@pytest.mark.parametrize("apart", ["seeds", "places"])
def test_with_replacement_draws_are_independent(backend, apart):
    weights, count = [3.0, 0.0, 1.0, 0.5], enough_or_skip(backend)
    probs = torch.tensor(weights, device=DEVICE).expand(count, -1)
    seed = torch.arange(count, device=DEVICE) if apart == "seeds" else 7
    drawn = tilewise.multinomial(probs, 2, True, seed=seed, backend=backend)
    total = sum(weights)
    expected = {a * 4 + b: weights[a] * weights[b] / total**2 for a in (0, 2, 3) for b in (0, 2, 3)}
    assert_drawn_from(drawn[:, 0] * 4 + drawn[:, 1], expected, SIGNIFICANCE)


@pytest.mark.parametrize("vocab", [1, 300, 4099])
@pytest.mark.parametrize("replacement", [False, True])
def test_backends_draw_the_same_places(backend, replacement, vocab):
    rows, count = (30, min(vocab, 12)) if many(backend) > 100 else (4, min(vocab, 5))
    probs = row_of_logits(rows * vocab).view(rows, vocab).exp()
    probs[:, 1::4] = 0
    options = {"seed": torch.arange(rows, device=DEVICE) * 2**33, "offset": 5}
    ours = tilewise.multinomial(probs, count, replacement, **options, backend=backend)
    theirs = tilewise.multinomial(
        probs.double(), count, replacement, **options, backend="reference"
    )
    assert ((ours != theirs).any(1)).sum() <= 1
    assert not ((ours >= 0) & (ours % 4 == 1)).any()


def test_draws_with_replacement_are_those_at_the_next_offsets(backend):
    probs = row_of_logits(5 * 400).view(5, 400).exp()
    seeds = torch.arange(5, device=DEVICE)
    together = tilewise.multinomial(probs, 6, True, seed=seeds, offset=9, backend=backend)
    one_by_one = [
        tilewise.multinomial(probs, 1, seed=seeds, offset=9 + s, backend=backend) for s in range(6)
    ]
    assert torch.equal(together, torch.cat(one_by_one, 1))
    tokens = tilewise.sample(probs.log(), seed=seeds, offset=9, backend=backend)
    assert torch.equal(together[:, 0], tokens)


@pytest.mark.parametrize("vocab, rows", [(4099, 130), (50257, 4)])
def test_no_place_depends_on_how_its_row_is_shared_out(backend, vocab, rows, monkeypatch):
    """One block a row, a cluster that holds it, one that reads it again; teams that share draws."""
    if backend != "cuda":
        pytest.skip(f"{backend}: has none of these ways")
    logits = torch.stack([row_of_logits(vocab, seed) for seed in range(rows)])
    seeds = torch.arange(rows, device=DEVICE) + 7

    def drawn(i):
        options = {"seed": seeds[i], "backend": backend}
        several = tilewise.multinomial(logits[i].exp(), 5, True, **options)
        distinct = tilewise.multinomial(logits[i].exp(), 5, **options)
        one = tilewise.gumbel_argmax(logits[i], **options)
        return torch.cat([several, distinct, one[:, None]], 1)

    together = drawn(slice(None))
    assert torch.equal(together[:, 0], together[:, 5])
    for major in "98" if DEVICE == "cpu" else "9":  # which only the emulator asks for
        monkeypatch.setenv("TILEWISE_EMULATION_MAJOR", major)
        for i in range(min(rows, 4)):
            assert torch.equal(drawn(slice(i, i + 1)), together[i : i + 1])


def test_the_rest_is_missing_and_bad_rows_are_not_drawn(backend):
    probs = torch.zeros(6, 200, device=DEVICE)
    probs[0, [3, 190]] = 1.0
    probs[2:] = 1.0
    probs[2, 7], probs[3, 199], probs[4, 0] = -1.0, NAN, INFINITY
    drawn = tilewise.multinomial(probs, 4, seed=1, backend=backend)
    assert set(drawn[0, :2].tolist()) == {3, 190}
    assert drawn[0, 2:].tolist() == [-1, -1]
    all_of_them = tilewise.multinomial(probs[:1], 200, seed=1, backend=backend)
    assert all_of_them[0, :2].tolist() == drawn[0, :2].tolist()
    assert (all_of_them[0, 2:] == -1).all()
    assert (drawn[1:5] == -1).all()
    assert len(set(drawn[5].tolist())) == 4 and (drawn[5] >= 0).all()
    again = tilewise.multinomial(probs, 4, True, seed=1, backend=backend)
    assert set(again[0].tolist()) <= {3, 190} and (again[1:5] == -1).all()


def test_of_one_row_and_of_none(backend):
    one = tilewise.multinomial(torch.ones(9, device=DEVICE), 9, seed=1, backend=backend)
    assert sorted(one.tolist()) == list(range(9))
    none = tilewise.multinomial(torch.ones(0, 9, device=DEVICE), 2, seed=1, backend=backend)
    assert none.shape == (0, 2) and none.dtype == torch.int64
    empty = tilewise.multinomial(torch.ones(2, 0, device=DEVICE), 2, True, backend=backend)
    assert (empty == -1).all()


@pytest.mark.parametrize("shape", [(5, 300), (2, 3, 50), (70,), (0, 8), (3, 0)])
def test_gumbel_argmax_is_sample_without_options(backend, shape):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(shape, generator=generator)).to(DEVICE)
    tokens = tilewise.gumbel_argmax(logits, seed=4, offset=2, backend=backend)
    rows = logits.reshape(math.prod(shape[:-1]), shape[-1])
    expected = tilewise.sample(rows, seed=4, offset=2, backend=backend)
    assert torch.equal(tokens, expected.view(shape[:-1]))


def test_gumbel_argmax_of_rows_that_cannot_be_drawn(backend):
    logits = torch.zeros(4, 30, device=DEVICE)
    logits[0, 3], logits[1], logits[2, [4, 9]] = NAN, -INFINITY, INFINITY
    tokens = tilewise.gumbel_argmax(logits, seed=4, backend=backend).tolist()
    assert tokens[:2] == [-1, -1] and tokens[2] in (4, 9) and tokens[3] >= 0
