"""What is left after all filters: token by token as an oracle says, and as `sample` draws."""

import math

import pytest
import torch
from cases import DEVICE
from sample_cases import (
    adjusted,
    assert_drawn_from,
    backend,
    enough_or_skip,
    float64_or_skip,
    likelihoods,
    many,
    row_of_logits,
)

import tilewise

pytestmark = pytest.mark.thinned(3)

__all__ = ["backend"]

INFINITY, NAN = math.inf, math.nan

FILTERS = [
    {},
    {"temperature": 0.0},
    {"temperature": 2.5},
    {"top_k": 1, "temperature": 2.0},
    {"top_k": 7},
    {"top_k": 200},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"top_k": 30, "top_p": 0.7, "temperature": 1.5},
    {"top_k": 100, "top_p": 0.95, "min_p": 0.05},
    {"top_p": 0.5, "min_p": 0.9},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 128, 300, 4097])
def test_probabilities_and_logits_are_those_of_the_oracle(backend, vocab, options):
    if many(backend) < 100 and vocab > 300 and len(options) < 2:
        pytest.skip("triton: interpreted, too slow for more than some filters of many blocks")
    rows = min(4, many(backend) // 4)
    logits = torch.stack([row_of_logits(vocab, seed) for seed in range(rows)])
    probs = tilewise.filtered_probs(logits, **options, backend=backend)
    kept = tilewise.filter_logits(logits, **options, backend=backend)
    for row, p, left in zip(logits.tolist(), probs.tolist(), kept.tolist(), strict=True):
        expected = likelihoods(row, **options)
        assert {j for j in range(vocab) if p[j] > 0} == set(expected)
        assert {j for j in range(vocab) if left[j] > -INFINITY} == set(expected)
        # An exponential in fp32 is right to two roundings, its argument below 30 to half of one.
        for j, q in expected.items():
            assert abs(p[j] - q) <= (3 + 30) * 2**-24 * q
            assert left[j] == pytest.approx(
                row[j] / (options.get("temperature", 1.0) or 1.0), rel=2**-22
            )


@pytest.mark.parametrize(
    "cut",
    [{"top_k": 4}, {"top_p": 0.4}, {"top_k": 8, "top_p": 0.45}, {"top_k": 4, "min_p": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("zeros", ["alike", "of both signs"])
def test_ties_go_to_the_lowest_tokens(backend, cut, zeros):
    logits = torch.full((2, 300), -INFINITY, device=DEVICE)
    places = [3, 120, 127, 128, 129, 200, 255, 256, 298, 299]
    logits[:, places] = 0.0
    if zeros == "of both signs":
        logits[:, places[::2]] = -0.0
    kept = tilewise.filter_logits(logits, **cut, backend=backend)
    left = [j for j in range(300) if kept[1, j] > -INFINITY]
    assert left == places[:4]
    probs = tilewise.filtered_probs(logits, **cut, backend=backend)
    assert probs[0, left].tolist() == [0.25] * 4


def test_rows_that_cannot_be_drawn(backend):
    logits = torch.stack([row_of_logits(150, seed) for seed in range(5)])
    logits[0, 149], logits[1], logits[2, [7, 140]] = NAN, -INFINITY, INFINITY
    logits[4, :149] = -INFINITY
    bad = torch.tensor([1.0, 1, 1, -1, 1], device=DEVICE)
    for options in ({}, {"top_k": 9}, {"top_p": 0.9}, {"min_p": 0.2}):
        kept = tilewise.filter_logits(logits, temperature=bad, **options, backend=backend)
        probs = tilewise.filtered_probs(logits, temperature=bad, **options, backend=backend)
        assert kept[[0, 3]].isnan().all() and (kept[1] == -INFINITY).all()
        assert probs[[0, 1, 3]].isnan().all()
        assert kept[2, [7, 140]].tolist() == [INFINITY] * 2
        assert (kept[2] > -INFINITY).sum() == 2
        assert probs[2, [7, 140]].tolist() == [0.5, 0.5]
        assert probs[4, 149] == 1 and probs[4].sum() == 1 and kept[4, 149] == logits[4, 149]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(backend, dtype):
    float64_or_skip(backend, dtype)
    logits = row_of_logits(500).to(torch.bfloat16) / 4
    logits = torch.stack([logits, logits - 8]).to(torch.bfloat16).to(dtype)  # also below 0
    kept = tilewise.filter_logits(logits, top_p=0.9, backend=backend)
    probs = tilewise.filtered_probs(logits, top_p=0.9, backend=backend)
    assert kept.dtype == dtype
    assert probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    left = kept > -INFINITY
    assert torch.equal(kept[left], logits[left])
    assert torch.equal(probs > 0, left)
    expected = tilewise.filter_logits(logits.double(), top_p=0.9, backend="reference")
    assert torch.equal(left, expected > -INFINITY)


def test_ties_in_many_blocks(backend):
    logits = torch.zeros(1, 5000, device=DEVICE)
    logits[0, 4990] = 1.0
    kept = tilewise.filter_logits(logits, top_k=4501, backend=backend)
    assert (kept[0] > -INFINITY).nonzero().flatten().tolist() == [*range(4500), 4990]


@pytest.mark.parametrize("options", FILTERS[2:], ids=str)
def test_sample_draws_by_these_probabilities(backend, options):
    row, count = row_of_logits(40, 5), enough_or_skip(backend)
    exact = row if backend in ("cuda", "triton") else row.double()  # they take no float64
    probs = tilewise.filtered_probs(exact[None], **options, backend=backend)[0].tolist()
    seeds = torch.arange(count, device=DEVICE)
    tokens = tilewise.sample(row.expand(count, -1), **options, seed=seeds, backend=backend)
    expected = {j: p / math.fsum(probs) for j, p in enumerate(probs) if p > 0}
    assert_drawn_from(tokens, expected, 1e-6 / (2 * len(FILTERS)))


def test_adjustments_come_first(backend):
    row, history = row_of_logits(60), [5, 5, 7, 59, -1]
    bias = [math.cos(j) for j in range(60)]
    probs = tilewise.filtered_probs(
        row[None], repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.4,
        history=torch.tensor([history], device=DEVICE),
        logit_bias=torch.tensor(bias, device=DEVICE), top_p=0.8, backend=backend,
    )  # fmt: skip
    changed = adjusted(row.tolist(), 1.5, 0.3, 0.4, history, bias)
    expected = likelihoods(changed, top_p=0.8)
    assert {j for j in range(60) if probs[0, j] > 0} == set(expected)
    assert all(abs(probs[0, j] - q) < 1e-5 * q for j, q in expected.items())


@pytest.mark.parametrize("shape", [(0, 10), (3, 0)])
def test_nothing_to_filter(backend, shape):
    logits = torch.zeros(shape, device=DEVICE, dtype=torch.float16)
    kept = tilewise.filter_logits(logits, top_k=3, backend=backend)
    probs = tilewise.filtered_probs(logits, top_k=3, backend=backend)
    assert (kept.shape, kept.dtype) == (shape, torch.float16)
    assert (probs.shape, probs.dtype) == (shape, torch.float32)


@pytest.mark.parametrize("k", [0, 1, 7, 50, 299, 300])
def test_top_k_is_the_stable_sort(backend, k):
    x = torch.stack([row_of_logits(300, seed) for seed in range(6)])
    x[1] = x[1].round()  # ties
    x[2] = 0.0
    x[2, ::2] = -0.0
    x[3, 20:] = -INFINITY
    x[4, [5, 250, 251]], x[4, [6, 130]] = NAN, INFINITY
    x[4, 250:251].neg_()  # of the other sign
    x[5] = -INFINITY
    values, indices = tilewise.top_k(x, k, backend=backend)
    order = [
        sorted(range(300), key=lambda j: (row[j] == row[j], -row[j] if row[j] == row[j] else 0, j))
        for row in x.tolist()
    ]  # fmt: skip
    assert indices.tolist() == [row[:k] for row in order]
    assert torch.equal(values.nan_to_num(7.5), x.gather(1, indices).nan_to_num(7.5))


@pytest.mark.parametrize("vocab, k", [(40, 3), (40, 39), (90, 90), (300, 4), (300, 100)])
def test_pieces_of_a_row_meet_in_rank(backend, vocab, k, monkeypatch):
    if backend != "triton":
        pytest.skip(f"{backend}: ranks a row in one piece")
    from tilewise.kernels.triton import _top_k as kernel

    monkeypatch.setattr(kernel, "PIECE", 16)
    monkeypatch.setattr(kernel, "FEW", 4)
    x = torch.stack([row_of_logits(vocab, seed) for seed in range(2)])
    x[1, ::2], x[1, 5], x[1, 36] = x[1, ::2].round(), NAN, -INFINITY
    values, indices = tilewise.top_k(x, k, backend=backend)
    expected, places = x.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(indices, places[:, :k])
    assert torch.equal(values.nan_to_num(7.5), expected[:, :k].nan_to_num(7.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_top_k_of_a_large_vocabulary_and_many_dims(backend, dtype):
    float64_or_skip(backend, dtype)
    vocab = 262144 if many(backend) > 100 else 9000
    x = row_of_logits(vocab * 2).view(1, 2, vocab).to(dtype)
    values, indices = tilewise.top_k(x, 20, backend=backend)
    expected, places = x.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(indices, places[..., :20])
    assert torch.equal(values, expected[..., :20])
    assert values.dtype == dtype and indices.dtype == torch.int64


@pytest.mark.parametrize("vocab, k", [(2048, 2048), (5000, 2049), (9000, 3), (33000, 40)])
def test_top_k_of_many_is_the_stable_sort(backend, vocab, k):
    x = torch.stack([row_of_logits(vocab), row_of_logits(vocab, 1).round()])
    x[0, [0, vocab - 1, vocab // 2]], x[1, vocab // 3] = NAN, INFINITY
    x.view(torch.int32)[0, vocab // 5] = -1  # NaN, and negative
    values, indices = tilewise.top_k(x, k, backend=backend)
    _, places = x.nan_to_num(2e38, 1e38).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(indices, places[:, :k])
    assert torch.equal(values.nan_to_num(1.5), x.gather(1, indices).nan_to_num(1.5))


def test_top_k_values_have_a_gradient(backend):
    float64_or_skip(backend)
    x = row_of_logits(40).double().view(2, 20).requires_grad_()
    values, indices = tilewise.top_k(x, 3, backend=backend)
    grad = torch.autograd.grad((values * torch.arange(3.0, device=DEVICE)).sum(), x)[0]
    expected = torch.zeros_like(x).scatter(1, indices, torch.arange(3.0).expand(2, 3).to(x))
    assert torch.equal(grad, expected)
    assert torch.autograd.gradgradcheck(lambda t: tilewise.top_k(t, 3, backend=backend)[0], x)
