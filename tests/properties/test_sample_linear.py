"""Draws from linear logits: those of `sample`, from a tile of the vocabulary at a time."""

import math

import pytest
import torch
from cases import DEVICE
from sample_cases import (
    assert_drawn_from,
    backends_that,
    enough_or_skip,
    float64_or_skip,
    likelihoods,
    many,
    row_of_logits,
)

import tilewise
from tilewise.rng import gumbel

backend = backends_that("linear_sample")

INFINITY, NAN = math.inf, math.nan


def layer(batch, dim, vocab, dtype=torch.float32):
    hidden = row_of_logits(batch * dim, 1).view(batch, dim) / 2
    weight = row_of_logits(vocab * dim, 2).view(vocab, dim) * 1.5 / dim**0.5
    return hidden.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("batch, dim, vocab", [(1, 8, 151936), (70, 20, 5000), (513, 4, 33)])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.0, 30.0])
def test_tokens_are_those_of_the_logits(backend, temperature, batch, dim, vocab, dtype):
    float64_or_skip(backend, dtype)
    if many(backend) < 100:
        if dtype == torch.float16 and temperature != 1:
            pytest.skip("triton: interpreted, too slow for each temperature in each dtype")
        batch, vocab = min(batch, 70), min(vocab, 1000)
    hidden, weight = layer(batch, dim, vocab, dtype)
    bias = row_of_logits(vocab, 5).to(dtype)
    options = {"temperature": temperature, "seed": torch.arange(batch, device=DEVICE) * 2**33}
    ours = tilewise.linear_sample(hidden, weight, linear_bias=bias, **options, backend=backend)
    logits = hidden.double() @ weight.double().t() + bias.double()
    theirs = tilewise.sample(logits, **options, backend="reference")
    scores = logits / (temperature or 1.0)
    rounding = 4 * dim * torch.finfo(torch.float32).eps * scores.abs().amax(1)
    if temperature:
        scores = scores + gumbel(options["seed"], 0, 0, vocab, torch.float64)
        rounding += torch.finfo(torch.float32).eps * 23
    gap = (scores.gather(1, ours[:, None]) - scores.gather(1, theirs[:, None])).abs().squeeze(1)
    assert (gap <= rounding).all()
    assert (ours != theirs).sum() <= 1


def test_frequencies(backend):
    count = enough_or_skip(backend)
    hidden, weight = layer(1, 6, 30)
    drawn = tilewise.linear_sample(
        hidden.expand(count, -1), weight, temperature=1.5, backend=backend,
        seed=torch.arange(count, device=DEVICE),
    )  # fmt: skip
    row = (hidden @ weight.t())[0].tolist()
    assert_drawn_from(drawn, likelihoods(row, temperature=1.5), 1e-6)


def test_a_row_does_not_know_its_place(backend):
    hidden, weight = layer(37, 24, 9000 if many(backend) > 100 else 500)
    options = {"temperature": torch.arange(37, device=DEVICE) / 9, "seed": torch.arange(37) * 5}
    options["seed"] = options["seed"].to(DEVICE)
    together = tilewise.linear_sample(hidden, weight, **options, backend=backend)
    order = torch.arange(37, device=DEVICE).flip(0)
    moved = {name: value[order] for name, value in options.items()}
    again = tilewise.linear_sample(hidden[order], weight, **moved, backend=backend)
    assert torch.equal(again, together[order])
    for i in (0, 20, 36):  # tiles of few rows
        own = {name: value[i : i + 1] for name, value in options.items()}
        alone = tilewise.linear_sample(hidden[i : i + 1], weight, **own, backend=backend)
        assert torch.equal(alone, together[i : i + 1])
    one_seed = tilewise.linear_sample(hidden[:1].expand(37, -1), weight, seed=3, backend=backend)
    assert len(one_seed.unique()) > 5


def test_rows_that_cannot_be_drawn_and_infinities(backend):
    vocab = 9000 if many(backend) > 100 else 200
    last = vocab - 1
    hidden, weight = torch.eye(6, device=DEVICE), torch.zeros(vocab, 6, device=DEVICE)
    weight[vocab // 2 :, 0] = 1.0
    bias = torch.zeros(vocab, device=DEVICE)
    hidden[1, 1] = NAN
    for t in (1.0, 0.0):
        each = torch.tensor([t, t, -1.0, NAN, INFINITY, t], device=DEVICE)
        drawn = tilewise.linear_sample(
            hidden, weight, linear_bias=bias, temperature=each, seed=1, backend=backend
        )
        assert (drawn >= 0).tolist() == [True, False, False, False, False, True]
        bias[[5, last]] = INFINITY
        both = tilewise.linear_sample(
            hidden, weight, linear_bias=bias, temperature=t,
            seed=torch.arange(6, device=DEVICE) + 10, backend=backend,
        )  # fmt: skip
        assert set(both.tolist()) == ({5, last, -1} if t else {5, -1})
        nothing = torch.full((vocab,), -INFINITY, device=DEVICE)
        left = nothing.clone()
        left[vocab - 30] = -3.0
        for given, token in ((nothing, -1), (left, vocab - 30)):
            drawn = tilewise.linear_sample(
                hidden[2:3], weight, linear_bias=given, temperature=t, seed=1, backend=backend
            )
            assert drawn.tolist() == [token]
        bias[[5, last]] = torch.tensor([0.0, NAN], device=DEVICE)
        drawn = tilewise.linear_sample(
            hidden[2:], weight, linear_bias=bias, temperature=t, seed=1, backend=backend
        )
        assert drawn.tolist() == [-1] * 4
        bias[last] = 0.0


@pytest.mark.parametrize("shape", [(0, 4, 9), (3, 4, 0), (3, 0, 9)])
def test_sizes_of_nothing(backend, shape):
    batch, dim, vocab = shape
    hidden, weight = torch.zeros(batch, dim, device=DEVICE), torch.zeros(vocab, dim, device=DEVICE)
    drawn = tilewise.linear_sample(hidden, weight, seed=1, backend=backend)
    assert drawn.shape == (batch,) and drawn.dtype == torch.int64
    assert (drawn >= 0).all() == (vocab > 0)


def test_of_logits_there_is_a_tile(backend, monkeypatch):
    if backend != "numba":
        pytest.skip(f"{backend}: keeps the logits, or has them in registers alone")
    from tilewise.kernels.numba import _linear_sample as kernel

    seen, product = [], kernel.logits
    monkeypatch.setattr(
        kernel, "logits", lambda out, *rest: (seen.append(out.shape), product(out, *rest))
    )
    tilewise.linear_sample(*layer(600, 2, 20_000), seed=1, backend=backend)
    assert all(rows * cols <= kernel.TILE_ELEMENTS for rows, cols in seen)
    assert sum(cols for _, cols in seen) == 20_000 and len(seen) > 2


def test_autocast_and_no_gradient(backend):
    hidden, weight = layer(4, 8, 300)
    hidden.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        drawn = tilewise.linear_sample(hidden, weight, seed=1, backend=backend)
    lower = tilewise.linear_sample(hidden.bfloat16(), weight.bfloat16(), seed=1, backend=backend)
    assert torch.equal(drawn, lower) and not drawn.requires_grad
